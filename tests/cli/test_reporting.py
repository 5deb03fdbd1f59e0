"""The command `report`: the page it writes, what it prints, and errors of one line."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import separable
from separable.cli import main

pytest.importorskip("torchvision", reason="needs the extra `zoo`")
pytest.importorskip("plotly", reason="needs the extra `report`")

pytestmark = pytest.mark.usefixtures("hasty")

SOURCE = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
    )

def interrupted():
    raise KeyboardInterrupt
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a network, its weights and images of two classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(SOURCE)
    space = {}
    exec(SOURCE, space)
    torch.manual_seed(0)
    save_file(space["net"]().state_dict(), tmp_path / "weights.safetensors")
    generator = torch.Generator().manual_seed(0)
    for i in range(32):
        pixels = torch.randint(0, 256, (18, 18, 3), generator=generator, dtype=torch.uint8)
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path


def report(*arguments):
    common = ["--input-size=1x3x16x16", "--threads=1", "--repeats=2"]
    return CliRunner().invoke(main, ["report", "nets.py:net", *common, *arguments])


def test_the_page_is_written_and_the_answer_printed(place):
    arguments = ["--weights=weights.safetensors", "--convert=macs=0.5", "--calibration=photos"]
    result = report(*arguments, "--frontier=0.3", "--labelled=photos", "--out=page.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Converted, net needs ")
    assert "of 32 test inputs" in result.stdout
    assert "The report is page.html." in result.stderr
    page = (place / "page.html").read_text()
    command = "separable report nets.py:net --input-size=1x3x16x16 --threads=1 --repeats=2 "
    assert command + " ".join(arguments) in page
    assert "macs=0.3" in page


def test_json_is_alone_on_stdout_and_beside_the_file(place):
    result = report("--json", "--out=layers.csv")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["title"] == "net"
    assert figures["converted"] is None
    assert (place / "layers.csv").read_text().startswith("name,kind,calls,output_shape,")


def test_a_converted_file_is_reported(place):
    space = {}
    exec(SOURCE, space)
    torch.manual_seed(0)
    model = space["net"]().eval()
    slim = separable.convert(model, torch.randn(64, 3, 16, 16), "macs=0.5", progress=False)
    separable.save(slim, place / "slim.safetensors")
    result = report(
        "--weights=weights.safetensors", "--converted=slim.safetensors", "--json", "--out=a.json"
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["plan"]["budget"] == "macs=0.5"
    assert figures["error"] == slim.report.error
    assert json.loads((place / "a.json").read_text()) == figures


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--convert=speed=2"], "--convert (='speed=2')"),
        (["--convert=macs=0.0001", "--calibration=photos"], "cannot be met; the nearest one"),
        (["--convert=macs=0.5", "--converted=x"], "--convert and --converted exclude each other"),
        (["--converted=missing"], "(='missing') is no file"),
        (["--frontier=0.5"], "--frontier belongs to a conversion"),
        (["--frontier=half"], "must be numbers with commas between them"),
        (["--convert=macs=0.5", "--frontier=2"], "--frontier (='macs=2')"),
        (["--weights=missing"], "--weights: there is no file"),
        (["--calibration=missing"], "--calibration: there is no folder"),
        (["--labelled=missing"], "--labelled: there is no folder"),
        (["--input-size=1x5x16x16", "--labelled=photos"], "Nx1xHxW or Nx3xHxW for images"),
        (["--input-size=1x3"], "RuntimeError"),
        (["--out=missing/page.html"], "--out: there is no folder"),
        (["--out=photos"], "is a directory"),
        (["--out=page.txt"], "--format (='txt') must be one of html, json"),
        (["--format=pdf"], "'pdf' is not one of 'html'"),
        (["--threads=0"], "'--threads'"),
        (["--repeats=0"], "'--repeats'"),
    ],
)
@pytest.mark.filterwarnings("ignore:conversion without calibration inputs")
def test_errors_are_one_line_and_leave_no_file(place, arguments, words):
    before = sorted(place.rglob("*"))
    result = report(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    lines = [line for line in re.split("[\r\n]", result.stderr) if line.startswith("Error")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    assert sorted(place.rglob("*")) == before


def test_images_without_a_browser_fail_before_the_work(place, monkeypatch):
    chromium = pytest.importorskip("choreographer.browsers.chromium")
    monkeypatch.setattr(chromium.Chromium, "find_browser", lambda **_: None)
    result = report("--out=plots.png")
    assert result.exit_code == 2
    assert "apt-get install chromium" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_exits_130_and_leaves_no_file(place):
    result = CliRunner().invoke(main, ["report", "nets.py:interrupted", "--out=page.html"])
    assert result.exit_code == 130
    assert not (place / "page.html").exists()
