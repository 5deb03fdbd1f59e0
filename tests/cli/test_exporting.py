"""The command `export`: the files it writes, and errors of one line."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import separable
from separable.cli import main

pytest.importorskip("torchvision", reason="needs the extra `zoo`")
pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")

pytestmark = pytest.mark.usefixtures("hasty")

MODEL = "separable:mobilenet_v1,conv=regular,width=0.125,num_classes=10"
SIZE = "--input-size=1x3x32x32"


def export(*arguments, model=MODEL):
    return CliRunner().invoke(main, ["export", model, SIZE, *arguments])


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (80 * i, 10, 200)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


def test_onnx_with_real_inputs(place):
    result = export("--out=net.onnx", "--check=photos", "--opset=20", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["format"] == "onnx"
    assert figures["opset"] == 20
    assert figures["checks"] == 4  # the example, noise of two sizes, the photos
    assert figures["deviation"] < 1e-4
    assert (place / "net.onnx").stat().st_size == figures["size"]


@pytest.mark.filterwarnings("ignore:layer .* more calibration inputs would help")
def test_a_converted_network(place):
    regular = separable.models.create_model(MODEL).eval()
    slim = separable.convert(regular, torch.randn(64, 3, 32, 32), "macs=0.5", progress=False)
    separable.save(slim, place / "slim.safetensors")
    result = export("--converted=slim.safetensors", "--format=torch-export", "--out=slim.pt2")
    assert result.exit_code == 0, result.output
    assert "largest deviation" in result.stdout
    x = torch.randn(4, 3, 32, 32)
    found = torch.export.load(place / "slim.pt2").module()(x)
    torch.testing.assert_close(found, slim(x).detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing option '--out'"),
        (["--out=net.tflite"], "must be one of onnx, torch-export, safetensors"),
        (["--out=missing/net.onnx"], "--out: there is no folder"),
        (["--out=net.onnx", "--format=tflite"], "'tflite' is not one of"),
        (["--out=net.pt2", "--opset=18"], "--opset (=18) is for onnx"),
        (["--out=net.onnx", "--opset=99"], "99"),
        (["--out=net.onnx", "--converted=missing"], "(='missing') is no file"),
        (["--out=net.onnx", "--weights=missing"], "--weights: there is no file"),
        (["--out=net.onnx", "--check=missing"], "--check: there is no folder"),
        (
            ["--out=net.onnx", "--input-size=1x5x32x32"],
            "MODEL does not take an input of --input-size",
        ),
    ],
)
def test_errors_are_one_line_and_leave_no_file(place, arguments, words):
    before = sorted(place.rglob("*"))
    result = export(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    lines = [line for line in re.split("[\r\n]", result.stderr) if line.startswith("Error")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    assert sorted(place.rglob("*")) == before


def test_ctrl_c_exits_130(place):
    (place / "nets.py").write_text("def net():\n    raise KeyboardInterrupt\n")
    result = export("--out=net.onnx", model="nets.py:net")
    assert result.exit_code == 130
    assert not (place / "net.onnx").exists()
