"""What all tests of the conversion share."""

import pytest
import torch
from torch import nn

from separable.conversion import refining


@pytest.fixture(scope="package", autouse=True)
def short_last_pass():
    """Most tests look at other things than how far the last pass gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refining, "STEPS", 20)
        yield


@pytest.fixture
def classifier():
    """Three convolutions and scores that are far apart."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, 5)).eval()
    with torch.no_grad():
        model[-1].weight.mul_(30)
    return model
