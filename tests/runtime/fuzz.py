"""Random small networks against eager.

    python -m tests.runtime.fuzz --networks 500

Each seed is one network, so that a failure can be repeated: `--first 7 --networks 1`.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import separable

from .kernels import assert_as_exact_as_eager

KINDS = (
    *("dense", "depthwise", "grouped", "pool", "gate", "around", "shuffle", "norm", "upsample"),
    *("foreign", "pad", "adaptive", "pixels", "transposed", "attention"),
)
PADS = (nn.ZeroPad2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
_INPUTS = 8  # per network: the error of a few outputs of one input is small by chance
ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Sigmoid, nn.GELU, nn.LeakyReLU,
    lambda: nn.GELU("tanh"), nn.Tanh, nn.Identity,
    nn.Softplus, nn.Mish,
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


class Attention(nn.Module):
    """Between the pixels, of one head or two."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = 2 - channels % 2
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).mT.unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v)
        return attended.mT.flatten(1, 2).unflatten(2, x.shape[2:]) + x


class Foreign(nn.Module):
    """What torch runs: an operator without a kernel, of one result or of several."""

    TARGETS = ("aten.flip.default", "aten.unbind.int", "aten.stack.default", "getitem")

    def __init__(self, several: bool) -> None:
        super().__init__()
        self.several = several

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(x.unbind(1)[::-1], 1) if self.several else x.flip(1, 3) + x


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
    if kernel == 1:
        spatial["padding"] = draws.choice([0, 0, 0, 1])
    out = draws.randint(1, 40)
    activation = draws.choice(ACTIVATIONS)()
    kind = draws.choice(KINDS)
    if kind == "dense":
        conv = nn.Conv2d(channels, out, kernel, bias=draws.random() < 0.5, **spatial)
        return nn.Sequential(conv, nn.BatchNorm2d(out), activation), out
    if kind == "depthwise":
        many = channels * draws.choice([1, 1, 2, 3])
        conv = nn.Conv2d(channels, many, kernel, groups=channels, **spatial)
        return nn.Sequential(conv, activation, nn.Conv2d(many, out, 1)), out
    if kind == "grouped" and channels % 2 == 0:
        return nn.Sequential(nn.Conv2d(channels, 2 * out, kernel, groups=2, **spatial)), 2 * out
    if kind == "grouped":
        many = channels * draws.choice([2, 4])
        conv = nn.Conv2d(many, many, kernel, groups=channels, **spatial)
        return nn.Sequential(nn.Conv2d(channels, many, 1), activation, conv), many
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
        return draws.choice([ChannelNorm, nn.InstanceNorm2d])(channels), channels
    if kind == "upsample":
        mode = draws.choice(["nearest", "bilinear"])
        return nn.Upsample(scale_factor=2, mode=mode), channels
    if kind == "pad":
        pad = draws.choice(PADS)(tuple(draws.choice([0, 0, 1, 3]) for _ in range(4)))
        return nn.Sequential(pad, nn.Conv2d(channels, out, kernel, **spatial), activation), out
    if kind == "adaptive":
        pool = draws.choice([nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
        return pool((draws.randint(1, 12), draws.randint(1, 12))), channels
    if kind == "attention":
        return Attention(channels), channels
    if kind == "transposed":
        stride = draws.choice([1, 2, 2, 3])
        grown = nn.ConvTranspose2d(channels, out, kernel, stride, kernel // 3, stride - 1)
        return nn.Sequential(grown, nn.BatchNorm2d(out), activation), out
    if kind == "pixels" and channels % 4 == 0:
        return nn.PixelShuffle(2), channels // 4
    if kind == "pixels":
        return nn.PixelUnshuffle(2), channels * 4
    if kind == "foreign":
        return nn.Sequential(activation, Foreign(draws.random() < 0.5)), channels
    return activation, channels


def _draw_network(draws: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    channels = draws.randint(1, 20)
    height = draws.choice([1, *[draws.randint(9, 20)] * 5])
    shape = (draws.randint(1, 2), channels, height, draws.randint(9, 20))
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
    return model.eval(), shape


def network(seed: int) -> tuple[nn.Module, list[torch.Tensor]]:
    """The first network of this seed's that torch accepts (windows may outgrow the image)."""
    draws = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        model, shape = _draw_network(draws)
        try:
            with torch.no_grad():
                model(torch.zeros(shape))
        except RuntimeError:
            continue
        return model, [torch.randn(shape) for _ in range(_INPUTS)]


def check(seed: int) -> None:
    """Compile one network and compare it with eager; raises `AssertionError`."""
    model, inputs = network(seed)
    compiled = separable.compile(model, inputs[0], threads=1 + seed % 2)
    steps = compiled.program.schedule.steps
    for step in steps:
        target = "" if step.kernel or not step.node else str(step.node.attributes["target"])
        assert not target or any(name in target for name in Foreign.TARGETS), f"no kernel: {target}"
    with torch.no_grad():
        eager = torch.stack([model(x) for x in inputs])
    results = torch.stack([compiled(x) for x in inputs])
    with torch.no_grad():
        exact = torch.stack([model.double()(x.double()) for x in inputs])
    assert_as_exact_as_eager(results, eager, exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    failures: dict[int, str] = {}
    seeds = range(arguments.first, arguments.first + arguments.networks)
    for seed in (progress := tqdm(seeds, desc="networks")):
        try:
            check(seed)
        except Exception as error:  # whatever it is, the other networks are still of interest
            failures[seed] = f"{type(error).__name__}: {error}".splitlines()[0]
            progress.set_postfix(failed=len(failures))
    print(f"{len(seeds)} networks, seeds {seeds.start} to {seeds.stop - 1}: {len(failures)} failed")
    for seed, reason in failures.items():
        print(f"  seed {seed}: {reason}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
