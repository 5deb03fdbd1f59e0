"""Random small networks against eager; `SEPARABLE_FUZZ=500` draws more of them.

Each seed is one network, so that a failure can be repeated: `pytest -k "test_random_network[7]"`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import separable

from .kernels import assert_as_exact_as_eager

COUNT = int(os.environ.get("SEPARABLE_FUZZ", "24"))
ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Sigmoid, nn.GELU, nn.LeakyReLU,
    lambda: nn.GELU("tanh"), nn.Tanh, nn.Identity,
]  # fmt: skip


class Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, max(1, channels // 4), 1)
        self.excite = nn.Conv2d(max(1, channels // 4), channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return x * self.excite(squeezed).sigmoid()


class Around(nn.Module):
    """A block and a way around it: added, or concatenated."""

    def __init__(self, block: nn.Module, joined: bool) -> None:
        super().__init__()
        self.block, self.joined = block, joined

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        return torch.cat([y, x], 1) if self.joined else x + y


class Shuffle(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([second, first * 2], 1).unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


class ChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def draw(draws: random.Random, channels: int, depth: int = 0) -> tuple[nn.Module, int]:
    """A random layer or block, and its output channels."""
    kernel, dilation = draws.choice([1, 1, 3, 3, 5]), draws.choice([1, 1, 1, 2])
    spatial = {
        "stride": draws.choice([1, 1, 2]),
        "dilation": dilation,
        "padding": draws.choice([0, 1, 1]) * (kernel // 2) * dilation,
    }
    if kernel > 1 and spatial["padding"] == 0:
        spatial["padding"] = dilation * (kernel // 2) - draws.choice([0, 1])
    out = draws.randint(1, 40)
    activation = draws.choice(ACTIVATIONS)()
    kind = draws.choice(
        ["dense", "depthwise", "grouped", "pool", "gate", "around", "shuffle", "norm", "upsample"]
    )
    if kind == "dense":
        conv = nn.Conv2d(channels, out, kernel, bias=draws.random() < 0.5, **spatial)
        return nn.Sequential(conv, nn.BatchNorm2d(out), activation), out
    if kind == "depthwise":
        many = channels * draws.choice([1, 1, 2, 3])
        conv = nn.Conv2d(channels, many, kernel, groups=channels, **spatial)
        return nn.Sequential(conv, activation, nn.Conv2d(many, out, 1)), out
    if kind == "grouped" and channels % 2 == 0:
        return nn.Sequential(nn.Conv2d(channels, 2 * out, kernel, groups=2, **spatial)), 2 * out
    if kind == "pool":
        pool = draws.choice([nn.MaxPool2d, nn.AvgPool2d])
        return pool(3, draws.choice([1, 2]), 1), channels
    if kind == "gate":
        return Gate(channels), channels
    if kind == "around" and depth < 2:
        joined = draws.random() < 0.5
        inner = nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1), activation, nn.Conv2d(out, channels, 1)
        )
        return Around(inner, joined), channels * (1 + joined)
    if kind == "shuffle" and channels % 4 == 0:
        return Shuffle(), channels
    if kind == "norm" and channels > 2:
        return ChannelNorm(channels), channels
    if kind == "upsample":
        mode = draws.choice(["nearest", "bilinear"])
        return nn.Upsample(scale_factor=2, mode=mode), channels
    return activation, channels


def network(seed: int) -> tuple[nn.Module, torch.Tensor]:
    draws = random.Random(seed)
    torch.manual_seed(seed)
    channels = draws.randint(1, 20)
    x = torch.randn(draws.randint(1, 2), channels, draws.randint(9, 20), draws.randint(9, 20))
    layers: list[nn.Module] = []
    for _ in range(draws.randint(2, 6)):
        layer, channels = draw(draws, channels)
        layers.append(layer)
    if draws.random() < 0.5:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, draws.randint(1, 30))]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval(), x


@pytest.mark.parametrize("seed", range(COUNT))
def test_random_network(seed: int) -> None:
    model, x = network(seed)
    try:
        with torch.no_grad():
            eager, exact = model(x), model.double()(x.double())
    except RuntimeError as error:
        pytest.skip(f"torch refuses it: {str(error)[:60]}")
    compiled = separable.compile(model.float(), x, threads=1 + seed % 2)
    assert not compiled.explain(repeats=1).fallbacks
    # In a chain of layers rounding errors add up, or cancel, by chance.
    assert_as_exact_as_eager(compiled(x), eager, exact, times=8)
