"""The command `convert`: from weights and a folder of images to a file that loads again."""

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import separable
from separable.cli import main

pytest.importorskip("torchvision", reason="needs the extra `zoo`")

SOURCE = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )
"""


@pytest.fixture
def place(tmp_path):
    """A network, its weights and a folder with 40 images, one of them broken."""
    (tmp_path / "nets.py").write_text(SOURCE)
    space = {}
    exec(SOURCE, space)
    torch.manual_seed(0)
    save_file(space["net"]().state_dict(), tmp_path / "weights.safetensors")
    folder = tmp_path / "photos" / "class"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        pixels = torch.randint(0, 256, (20, 24 + i % 3, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return tmp_path


def convert(place, *arguments, **options):
    given = {
        "weights": place / "weights.safetensors",
        "calibration": place / "photos",
        "budget": "macs=0.5",
        "out": place / "slim.safetensors",
        "input-size": "1x3x16x16",
        **options,
    }
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return CliRunner().invoke(main, ["convert", f"{place / 'nets.py'}:net", *flags, *arguments])


@pytest.mark.filterwarnings("ignore:layer .* more calibration inputs would help")
def test_the_file_loads_again_and_the_report_is_json(place, hasty):
    result = convert(place, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["plan"]["budget"] == "macs=0.5"
    assert report["error"] >= 0
    assert "Skipped 1 image that can't be read" in result.stderr
    assert "broken.png" in result.stderr

    model = separable.models.create_model(f"{place / 'nets.py'}:net").eval()
    slim = separable.load(place / "slim.safetensors", model=model)
    before = separable.count(model, (1, 3, 16, 16)).macs - 64
    after = separable.count(slim, (1, 3, 16, 16)).macs - 64
    assert 0 < after <= 0.5 * before
    assert slim(torch.zeros(2, 3, 16, 16)).shape == (2, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "speed=2"}, "--budget (='speed=2')"),
        ({"budget": "macs=0.0001"}, "cannot be met; the nearest one that can be is 'macs="),
        ({"weights": "missing.safetensors"}, "--weights: there is no file"),
        ({"calibration": "missing"}, "--calibration: there is no folder"),
        ({"out": "missing/slim.safetensors"}, "--out: there is no folder"),
        ({"input-size": "1x5x16x16"}, "must be Nx1xHxW or Nx3xHxW for images"),
        ({"mean": "0.5,0.5"}, "--mean (=0.5,0.5) must be one number, or 3"),
        ({"mean": "grey"}, "must be numbers with commas between them"),
        ({"format": "csv"}, "'csv' is not one of 'table', 'json'"),
    ],
)
def test_errors_are_one_line_and_leave_no_file(place, options, words):
    result = convert(place, **options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not list(place.glob("*slim*"))


def test_foreign_weights_are_refused(place):
    save_file({"other": torch.zeros(1)}, place / "weights.safetensors")
    result = convert(place)
    assert result.exit_code == 2
    assert "of another network" in result.stderr
    (place / "weights.safetensors").write_bytes(b"nonsense")
    assert "is no safetensors file" in convert(place).stderr


def test_the_forms_offered_are_those_there_are():
    from separable.cli import conversion as command
    from separable.conversion.forms import FORMS

    assert command.FORMS == FORMS
