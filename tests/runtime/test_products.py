"""Products of two activations against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import separable
from separable.runtime.emit.conv import Conv
from separable.runtime.emit.expression import operand
from separable.runtime.emit.kernel import Kernel
from separable.runtime.machine import Machine, host
from separable.runtime.scheduling.tiles import choose_conv_tile

from .kernels import assert_as_exact_as_eager, run


def check(lead: tuple[int, int], sizes: tuple[int, int, int], form: int, machine: Machine) -> None:
    """`[*lead, m, k]` times `[*lead, k, n]`, divided, plus a residual."""
    m, k, n = sizes
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = random(*lead, k, m).mT if form & 1 else random(*lead, m, k)
    # all heads of a pixel side by side, or the same matrix for all
    w = (
        random(lead[0], k, lead[1], n).transpose(1, 2)
        if form & 2
        else random(k, n).expand(*lead, k, n)
    )
    extra = random(*lead, m, n)
    does = Conv(
        batch=lead[0],
        size=(lead[1], m),
        in_size=(lead[1], m),
        channels=(k, n),
        x_strides=tuple(x.stride()),
        y_strides=(lead[1] * m * n, m * n, n),
        w_strides=tuple(w.stride()[:3]),
        extra_strides=((lead[1] * m * n, m * n, n, 1),),
        epilogue=("add", ("mul", operand(0), 0.125), operand(1)),
    )
    kernel = Kernel(does, machine, choose_conv_tile(does, machine, 2))
    memory = [x.mT if form & 1 else x, w.transpose(1, 2) if form & 2 else w[0, 0], extra]
    y = run(kernel, memory, extra.numel()).view(*lead, m, n)
    exact = x.double() @ w.double() * 0.125 + extra.double()
    assert_as_exact_as_eager(y, x @ w * 0.125 + extra, exact, least=2.4e-7)


@pytest.mark.parametrize("form", range(4))
@pytest.mark.parametrize(
    ("lead", "sizes"),
    [
        ((1, 1), (1, 1, 1)),
        ((2, 3), (49, 32, 49)),
        ((1, 4), (7, 300, 33)),
        ((3, 1), (16, 5, 70)),
        ((1, 2), (64, 640, 16)),
    ],
)
def test_products(
    lead: tuple[int, int], sizes: tuple[int, int, int], form: int, machine: Machine
) -> None:
    check(lead, sizes, form, machine)


@settings(max_examples=30, deadline=None)
@given(
    lead=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70)),
    form=st.integers(0, 3),
)
def test_drawn_sizes(lead: tuple[int, int], sizes: tuple[int, int, int], form: int) -> None:
    check(lead, sizes, form, host())


class Tokens(nn.Module):
    """Pixels as tokens, for what follows."""

    def __init__(self, follows: nn.Module) -> None:
        super().__init__()
        self.project, self.follows = nn.Conv2d(3, 24, 1), follows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.follows(self.project(x).flatten(2).transpose(1, 2))
        return result


class MultiHead(nn.MultiheadAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class Relative(nn.Module):
    """Attention with a learned bias, as of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(24, 72), nn.Parameter(torch.randn(1, 3, 35, 35))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, self.bias, scale=0.3)
        return y.transpose(1, 2).flatten(2) + x


class OverChannels(nn.Module):
    """Attention between channels, and a gate of all pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.normalize(x, dim=-1)
        mixed = x @ (y.mT @ y * 2).softmax(-1)
        blocks = y.unflatten(1, (5, 7)).unflatten(0, (-1, 1))
        y = y + F.scaled_dot_product_attention(blocks, blocks, blocks).flatten(0, 1).flatten(1, 2)
        return torch.baddbmm(x, mixed, y.mT @ x, beta=0.5, alpha=2) + x.mean(2, True) @ y[:, :1]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "follows", [MultiHead(24, 4, batch_first=True), Relative(), OverChannels()], ids=type
)
def test_attention(follows: nn.Module, batch: int, threads: int) -> None:
    model = Tokens(follows).eval()
    x = torch.randn(batch, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    compiled = separable.compile(model, x, threads=threads)
    assert all(step.kernel for step in compiled.program.schedule.steps)
    y = compiled(x)
    with torch.no_grad():
        eager, exact = model(x), model.double()(x.double())
    model.float()
    assert_as_exact_as_eager(y, eager, exact)
