"""Images of a folder as inputs: errors name the caller's arguments."""

import pytest
import torch
from PIL import Image

pytest.importorskip("lightning", reason="needs the extra `train`")
pytest.importorskip("torchvision", reason="needs the extra `train`")

import separable
from separable.images import read_images, read_labelled


@pytest.fixture
def photos(tmp_path):
    for name in ("dark", "light"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8), (40 * i,) * 3).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_errors_name_arguments_in_python(photos):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.AdaptiveAvgPool2d(1))
    words = r"^`mean` \(=0.5,0.5\) must be one number, or 3, one per channel$"
    with pytest.raises(ValueError, match=words):
        separable.train(model, photos, mean=(0.5, 0.5), batch_size=2, progress=False)
    words = r"^`input_size` \(=1x4x8x8\) must be Nx1xHxW or Nx3xHxW for images$"
    with pytest.raises(ValueError, match=words):
        read_images("`folder`", photos, (1, 4, 8, 8), (0.5,), (0.5,), 4, 0)
    with pytest.raises(
        ValueError, match=r"^`data`: .* must hold a folder of images for each class"
    ):
        read_labelled("`data`", photos / "dark", (1, 3, 8, 8), (0.5,), (0.5,))
