"""The commands `train` and `finetune`: from a folder of images to a folder with the run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("lightning")
pytest.importorskip("torchvision")

import separable
from separable.cli import main
from separable.models import create_model

SOURCE = """
from torch import nn

def net(num_classes=2, channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""


def draw(folder, count, level, size=20):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(level)
    for i in range(count):
        pixels = level + torch.randint(0, 60, (size, size + i % 3, 3), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")


@pytest.fixture
def place(tmp_path):
    """A network's file, and two classes of 16 images, one of them broken."""
    (tmp_path / "nets.py").write_text(SOURCE)
    for level, name in ((20, "dark"), (150, "light")):
        draw(tmp_path / "photos" / name, 16, level)
    path = tmp_path / "photos" / "dark" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    return tmp_path


def run(command, *flags, **options):
    named = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    return CliRunner().invoke(main, [command, *flags, *named])


def trained(place, *flags, **options):
    given = {
        "model": f"{place / 'nets.py'}:net",
        "data": place / "photos",
        "out": place / "run",
        "epochs": 2,
        "batch_size": 8,
        "image_size": 16,
        "workers": 0,
        **options,
    }
    return run("train", *flags, **given)


def test_training_on_a_folder(place):
    result = trained(place, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    # 32 images, 3 held out
    assert told["steps"] == 2 * (29 // 8)
    assert told["skipped"] == [str(place / "photos" / "dark" / "3.png")]
    assert "Skipped 1 image that can't be read" in result.stderr
    assert set(told["metrics"]) >= {"val_loss", "val_accuracy", "train_loss"}
    weights = place / "run" / "best.safetensors"
    model = f"{place / 'nets.py'}:net"
    counted = CliRunner().invoke(main, ["train", "--help"])
    assert counted.exit_code == 0
    again = run("finetune", student=weights, teacher=model, data=place / "photos", image_size=16)
    assert again.exit_code == 2
    assert "is no converted network" in again.stderr


def test_the_configuration_trains_the_same_again(place):
    assert trained(place, "--no-channels-last", lr=0.02, mean="0.5").exit_code == 0
    written = place / "run" / "config.yaml"
    config = yaml.safe_load(written.read_text())
    assert (config["lr"], config["mean"], config["channels_last"]) == (0.02, [0.5], False)
    assert run("train", config=written, out=place / "again").exit_code == 0
    assert run("train", "--json", config=written, out=place / "less", epochs=1).exit_code == 0
    states = [(place / name / "last.safetensors").read_bytes() for name in ("run", "again", "less")]
    assert states[0] == states[1] != states[2]


def test_parts_of_their_own(place):
    (place / "photos").rename(place / "train")
    for level, name in ((20, "dark"), (150, "light")):
        draw(place / "val" / name, 4, level)
    result = trained(place, "--json", data=place)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 2 * (32 // 8)


def test_finetuning_without_labels(place, hasty):
    model = create_model(f"{place / 'nets.py'}:net").eval()
    torch.manual_seed(0)
    slim = separable.convert(model, torch.rand(600, 3, 16, 16), "macs=0.4", progress=False)
    separable.save(slim, place / "slim.safetensors")
    from safetensors.torch import save_file

    save_file(model.state_dict(), place / "weights.safetensors")
    (place / "photos" / "dark").rename(place / "photos" / "anything")
    result = run(
        "finetune",
        "--json",
        student=place / "slim.safetensors",
        teacher=f"{place / 'nets.py'}:net",
        weights=place / "weights.safetensors",
        data=place / "photos",
        out=place / "run",
        batch_size=4,
        image_size=16,
        workers=0,
        validation=0.2,
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["steps"] == 26 // 4
    assert {"val_loss", "val_agreement"} <= set(told["metrics"])
    again = separable.load(place / "run" / "last.safetensors", model=model)
    assert again.report.plan == slim.report.plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "empty"}, "has no folders in it; put the images of each class into a folder"),
        ({"data": "hollow"}, "has no images in the folders a; put some there"),
        ({"data": "one"}, "has one class; telling apart takes two"),
        ({"data": "missing"}, "there is no folder 'missing'"),
        ({"data": "hf:no/such"}, "can't be loaded, which needs the network"),
        (
            {"model": "separable:mobilenet_v1"},
            "are smaller than the stride of --model, which is 32",
        ),
        ({"optimizer": "adam"}, "Invalid value for '--optimizer'"),
        ({"epochs": 0}, "--epochs (=0) must be at least 1"),
        ({"config": "bad.yaml"}, "has no `epoch`; the nearest is `epochs`"),
        ({"format": "csv"}, "'csv' is not one of 'table', 'json'"),
        ({"devices": "none"}, "`devices`"),
        ({"strategy": "fsdp", "ema": 0}, "requires a GPU accelerator"),
        ({"augment": "shift", "workers": -1}, "--workers (=-1) must be 0 to 256"),
    ],
)
def test_errors_are_one_line_and_leave_no_run(place, options, words, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (place / "empty").mkdir()
    (place / "hollow" / "a").mkdir(parents=True)
    draw(place / "one" / "a", 4, 20)
    (place / "bad.yaml").write_text("epoch: 1\n")
    result = trained(place, **options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert words in line
    assert not (place / "run" / "last.ckpt").exists()


def test_what_is_missing_is_named(place):
    assert "--data is missing" in run("train", model="separable:mobilenet_v1").stderr
    assert "--student is missing" in run("finetune", data="digits").stderr
    assert trained(place).exit_code == 0
    assert "holds a run already" in trained(place).stderr
    assert trained(place, "--resume").exit_code == 0


def test_a_missing_extra_is_named(place):
    code = (
        "import sys; sys.modules['lightning'] = None; sys.modules['lightning.pytorch'] = None\n"
        "from separable.cli import main; main(['train', '--model', 'separable:mobilenet_v1',"
        "'--data', 'digits'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not installed: pip install 'separable[train]'" in done.stderr


def test_ctrl_c_leaves_the_last_checkpoint(place):
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from separable.cli import main; main()"
    )
    flags = [
        *("train", "--model", f"{place / 'nets.py'}:net", "--data", place / "photos"),
        *("--out", place / "run", "--epochs", "5000", "--batch-size", "8", "--image-size", "16"),
        *("--checkpoint-every", "2", "--workers", "0"),
    ]
    with subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        while not (place / "run" / "last.ckpt").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            stdout, stderr = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == 130, stderr.decode()
    assert b"Traceback" not in stderr
    assert stdout == b""
    assert torch.load(place / "run" / "last.ckpt", weights_only=True)["global_step"] > 0
