"""A small network, converted and reported once for all tests."""

import shutil

import pytest
import torch
from torch import nn

import separable

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = "<script>alert(1)</script>"
"""a module's name may be anything without a dot"""


def network():
    """Two convolutions worth converting, one too small, one under a hostile name."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    model.add_module("body", nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.ReLU()))
    model.add_module(HOSTILE, nn.Conv2d(24, 24, 3, padding=1))
    model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.add_module("classifier", nn.Linear(24, 4))
    return model


def images(number=64, seed=1):
    return torch.randn(number, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def labelled(model):
    """Images with the classes that the network itself puts them into, one in four made wrong."""
    seen = images(40, seed=2)
    with torch.no_grad():
        labels = model.eval()(seen).argmax(1)
    labels[::4] = (labels[::4] + 1) % 4
    return [(seen, labels)]


QUICK = {"repeats": 3, "min_seconds": 0.0, "threads": 1, "progress": False}


@pytest.fixture(scope="session")
def findings(few_steps):
    """With a conversion, a second point of the frontier, and labels."""
    model = network()
    # or the runtime would join all of so small a network, and no layer had a time of its own
    with few_steps(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("separable.runtime.scheduling.fusing._LONGEST", 3)
        return separable.report(
            model,
            (1, 3, 12, 12),
            budget="macs=0.5",
            calibration=images(),
            frontier=["macs=0.3"],
            data=labelled(model),
            seed=3,
            title="A & <b>net</b>",
            command="separable report net.py:net",
            **QUICK,
        )


@pytest.fixture(scope="session")
def alone():
    """Of one network, without a conversion."""
    return separable.report(network(), (1, 3, 12, 12), **QUICK)
