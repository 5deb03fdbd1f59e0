"""Files that are read and written: images of any depth, and names that can't be written to."""

import os
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from separable.images import open_image
from separable.writing import whole_file

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


def test_where_no_file_can_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"), whole_file(tmp_path / "a/b"):
        pass
    with pytest.raises(IsADirectoryError, match="name a file"), whole_file(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
