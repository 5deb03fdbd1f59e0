"""Files that are read and written: images of any depth, and names that can't be written to."""

import os
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from separable.images import open_image
from separable.writing import whole_file, whole_files

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_keep_their_upper_eight(tmp_path, suffix):
    values = np.random.default_rng(0).integers(0, 1 << 16, (9, 7)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep{suffix}")
    for channels in (1, 3):
        read = np.asarray(open_image(tmp_path / f"deep{suffix}", channels))
        assert (read.reshape(9, 7, -1) == (values >> 8)[..., None]).all()


def test_values_without_a_range_are_no_image(tmp_path):
    Image.fromarray(np.random.default_rng(0).random((9, 7), np.float32)).save(tmp_path / "f.tif")
    assert open_image(tmp_path / "f.tif", 1) is None


def test_files_have_the_usual_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        with whole_file(tmp_path / "weights") as partial:
            save_file({"weight": torch.ones(2)}, partial)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == 0o644


def test_names_as_long_as_can_be(tmp_path):
    names = [letter * 249 + suffix for letter in "ab" for suffix in (".json", ".csv")]
    with whole_files([tmp_path / name for name in names]) as partial:
        for path in partial.values():
            path.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_where_no_file_can_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"), whole_file(tmp_path / "a/b"):
        pass
    with pytest.raises(IsADirectoryError, match="name a file"), whole_file(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_links_stay_links_and_modes_stay(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    with whole_file(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="is no regular file"), whole_file(tmp_path / "pipe"):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
