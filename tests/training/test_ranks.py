"""Two processes on the CPU train as one does on the same steps."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

SOURCE = """
from torch import nn

def net(num_classes=10):  # without batch norm, whose statistics are each process's own
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=8),
        nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )
"""
FLAGS = "--data digits --image-size 8 --epochs 1 --batch-size 32 --accelerator cpu --seed 3".split()
SCRIPT = "import sys; from separable.cli import main; main()"


def run(place, out, *launcher, flags=()):
    script = place / "command.py"
    script.write_text(SCRIPT)
    command = [
        *(launcher or (sys.executable,)),
        *(str(script), "train", "--model", f"{place / 'nets.py'}:net", "--out", str(place / out)),
        *(*FLAGS, *flags),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done, load_file(place / out / "last.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "nets.py").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module")
def alone(place):
    return run(place, "alone")


LAUNCHERS = {
    "torchrun": (
        (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        (),
    ),
    "devices": ((), ("--devices", "2", "--strategy", "ddp")),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one(place, alone, launcher):
    prefix, flags = LAUNCHERS[launcher]
    done, weights = run(place, launcher, *prefix, flags=flags)
    told, expected = alone
    assert weights.keys() == expected.keys()
    gap = max((weights[key] - expected[key]).abs().max().item() for key in expected)
    assert gap < 1e-5
    assert any(not torch.equal(weights[key], torch.zeros_like(weights[key])) for key in weights)
    # one of the two speaks
    assert done.stdout.count("1 epochs, 39 steps") == 1
    metrics = [text.splitlines()[1].split(", ") for text in (told.stdout, done.stdout[-400:])]
    assert [m for m in metrics[0] if "val_" in m] == [m for m in metrics[1] if "val_" in m]
    shutil.rmtree(place / launcher)
