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
# Lightning and torch refuse to shard on a CPU, which does all that it takes.
SHARDED = """
import torch
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch.distributed.fsdp import FullyShardedDataParallel as Sharded

_AcceleratorConnector._check_strategy_and_fallback = lambda self: None
init = Sharded.__init__
Sharded.__init__ = lambda *args, **named: init(*args, **{**named, "device_id": torch.device("cpu")})
"""
HALF = """
import shutil
from pathlib import Path

from separable.training.checkpoints import Checkpoints

save = Checkpoints.save_checkpoint

def save_and_keep(self, checkpoint, path, **named):
    save(self, checkpoint, path, **named)
    if checkpoint["global_step"] == 39:
        shutil.copy(path, Path(path).with_name("half.ckpt"))

Checkpoints.save_checkpoint = save_and_keep
"""


def run(place, out, *launcher, flags=(), source=SCRIPT):
    script = place / "command.py"
    script.write_text(source)
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


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
LAUNCHERS = {
    "torchrun": (TORCHRUN, ()),
    "devices": ((), ("--devices", "2", "--strategy", "ddp")),
}


def largest_gap(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(weights[key].shape == expected[key].shape for key in expected)
    return max((weights[key] - expected[key]).abs().max().item() for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one(place, alone, launcher):
    prefix, flags = LAUNCHERS[launcher]
    done, weights = run(place, launcher, *prefix, flags=flags)
    told, expected = alone
    assert largest_gap(weights, expected) < 1e-5
    assert any(not torch.equal(weights[key], torch.zeros_like(weights[key])) for key in weights)
    # one of the two speaks
    assert done.stdout.count("1 epoch, 39 steps") == 1
    metrics = [text.splitlines()[1].split(", ") for text in (told.stdout, done.stdout[-400:])]
    assert [m for m in metrics[0] if "val_" in m] == [m for m in metrics[1] if "val_" in m]
    shutil.rmtree(place / launcher)


@pytest.mark.slow
def test_two_processes_that_share_the_weights_out_train_as_one(place):
    flags = ("--ema", "0", "--clip", "0.2", "--epochs", "2")
    _, expected = run(place, "whole", flags=flags)
    flags = (*flags, "--strategy", "fsdp")
    source = SHARDED + HALF + SCRIPT
    done, weights = run(place, "sharded", *TORCHRUN, flags=flags, source=source)
    assert largest_gap(weights, expected) < 1e-5
    assert done.stdout.count("2 epochs, 78 steps") == 1
    (place / "sharded" / "half.ckpt").replace(place / "sharded" / "last.ckpt")
    flags = (*flags, "--resume")
    _, again = run(place, "sharded", *TORCHRUN, flags=flags, source=source)
    assert largest_gap(again, weights) == 0
