"""Convolution kernels against torch in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from separable.runtime.emit import conv as kernel_file
from separable.runtime.emit.conv import Conv
from separable.runtime.emit.expression import ACTIVATIONS, operand
from separable.runtime.emit.kernel import Kernel
from separable.runtime.machine import Machine, host
from separable.runtime.scheduling.tiles import choose_conv_tile

from .kernels import assert_as_exact_as_eager, run


@dataclass(frozen=True)
class Case:
    """A convolution in torch's terms."""

    batch: int = 1
    channels: tuple[int, int] = (8, 16)  # per group
    size: tuple[int, int] = (6, 7)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    epilogue: str = "relu"
    residual: bool = False
    threads: int = 1
    image_first: bool = False  # input in [N, C, H, W] order
    bias: float = 1.0  # how large it is


CASES = {
    "one-pixel": Case(size=(1, 1)),
    "one-channel": Case(channels=(1, 1)),
    "pointwise": Case(channels=(32, 48), size=(14, 14)),
    "odd-channels": Case(channels=(19, 23), size=(5, 9), residual=True),
    "page-stride": Case(channels=(1024, 24), size=(3, 3)),
    "many-panels-shared": Case(channels=(9, 200), size=(2, 2), threads=4),
    "pointwise-strided": Case(channels=(7, 9), size=(9, 8), stride=(2, 2)),
    "stem": Case(channels=(3, 32), size=(17, 18), kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    "stem-image-first": Case(
        channels=(3, 20), size=(17, 18), kernel=(7, 7), stride=(2, 2), padding=(3, 3),
        image_first=True,
    ),
    "dense-3x3": Case(2, (16, 24), (9, 11), (3, 3), padding=(1, 1), residual=True),
    "dense-5x5-threads": Case(2, (8, 40), (7, 7), (5, 5), padding=(2, 2), threads=4),
    "dilated": Case(
        channels=(6, 10), size=(13, 12), kernel=(3, 3), padding=(4, 4), dilation=(4, 4)
    ),
    "no-padding": Case(channels=(5, 12), size=(8, 9), kernel=(3, 2)),
    "stride-over-kernel": Case(channels=(5, 9), size=(11, 13), kernel=(2, 2), stride=(3, 4)),
    "grouped": Case(2, (4, 6), (6, 5), (3, 3), padding=(1, 1), groups=5),
    "groups-of-2": Case(2, (2, 2), (9, 21), (3, 3), padding=(1, 1), groups=19, residual=True),
    "groups-of-4": Case(
        channels=(4, 4), size=(8, 9), kernel=(5, 3), stride=(2, 1), padding=(2, 0), groups=9
    ),
    "groups-of-8": Case(
        channels=(8, 8), size=(13, 9), kernel=(3, 3), padding=(2, 2), dilation=(2, 2), groups=5,
        threads=4,
    ),
    "groups-of-1-pointwise": Case(2, (1, 1), (3, 7), groups=70),
    "groups-of-4-pointwise": Case(2, (4, 4), (3, 7), groups=60, threads=2),
    "groups-image-first": Case(
        channels=(4, 4), size=(6, 5), kernel=(3, 3), padding=(1, 1), groups=3, image_first=True
    ),
    "row": Case(channels=(12, 9), size=(1, 30), kernel=(1, 5), padding=(0, 2)),
    "long-sum": Case(channels=(4096, 64), size=(14, 14)),
    "long-sum-3x3": Case(channels=(150, 20), size=(5, 7), kernel=(3, 3), padding=(1, 1)),
    "large-bias": Case(channels=(40, 24), size=(9, 9), bias=100.0),
    "wide-padding": Case(channels=(4, 8), size=(2, 3), kernel=(3, 3), padding=(2, 2)),
}  # fmt: skip


def check(case: Case, machine: Machine, special: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    (inputs, outputs), groups = case.channels, case.groups
    x = random(case.batch, groups * inputs, *case.size)
    if special:
        x.view(-1)[:: max(1, x.numel() // 5)] = torch.tensor(float("nan"))
        x.view(-1)[1 :: max(2, x.numel() // 3)] = float("inf")
    weight = random(groups * outputs, inputs, *case.kernel)
    bias = random(groups * outputs) * case.bias
    size = [
        (i + 2 * p - (k - 1) * d - 1) // s + 1
        for i, p, k, d, s in zip(
            case.size, case.padding, case.kernel, case.dilation, case.stride, strict=True
        )
    ]
    extra = random(case.batch, groups * outputs, *size)
    memory = x if case.image_first else x.permute(0, 2, 3, 1)
    memory = memory.contiguous()
    n, c, h, w = (memory if case.image_first else memory.permute(0, 3, 1, 2)).stride()
    channels = groups * outputs
    walk = (size[0] * size[1] * channels, size[1] * channels, channels)
    epilogue = ACTIVATIONS[case.epilogue](operand(0))
    small = kernel_file.is_small(case.channels, groups, machine) and not case.image_first
    does = Conv(
        batch=case.batch,
        size=(size[0], size[1]),
        in_size=case.size,
        channels=(inputs, channels) if small else case.channels,
        groups=1 if small else groups,
        small=small,
        kernel=case.kernel,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        x_strides=(n, h, w, c),
        y_strides=walk,
        extra_strides=((*walk, 1),) if case.residual else (),
        epilogue=("add", epilogue, operand(1)) if case.residual else epilogue,
    )
    tile = choose_conv_tile(does, machine, case.threads)
    packed = kernel_file.pack(does, tile, machine, weight, bias)
    extras = [extra.permute(0, 2, 3, 1).contiguous()] if case.residual else []
    y = run(Kernel(does, machine, tile), [memory, *packed, *extras], extra.numel())
    y = y.view(case.batch, *size, channels).permute(0, 3, 1, 2)
    tensors = [x, weight, bias]
    eager = kernel_file.reference(does, *tensors, [extra])
    exact = kernel_file.reference(does, *(t.double() for t in tensors), [extra.double()])
    # What is summed is of size one: a rounding or two of that, where little of the sum is left.
    assert_as_exact_as_eager(y, eager, exact, least=2.4e-7)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_conv(case: Case, machine: Machine) -> None:
    check(case, machine)


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 70])
def test_pointwise_channels(channels: int, machine: Machine) -> None:
    check(Case(channels=(channels, 71 - channels), size=(3, 5), residual=True), machine)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_epilogues(name: str, machine: Machine) -> None:
    check(Case(channels=(5, 13), size=(4, 4), epilogue=name), machine)


@pytest.mark.parametrize("name", ["relu", "hardswish", "silu", "gelu"])
def test_not_a_number_and_infinity_pass_through(name: str) -> None:
    check(Case(channels=(1, 13), size=(6, 6), epilogue=name), host(), special=True)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_drawn_shapes(data: st.DataObject) -> None:
    pair = st.tuples(st.integers(1, 4), st.integers(1, 4))
    kernel, stride, dilation = (data.draw(pair) for _ in range(3))
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [
        max(1, (k - 1) * d + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    size = tuple(low + data.draw(st.integers(0, 9)) for low in least)
    many = st.tuples(st.integers(1, 70), st.integers(1, 70))
    few = st.sampled_from([(1, 1), (2, 2), (4, 4), (8, 8)])
    check(
        Case(
            batch=data.draw(st.integers(1, 3)),
            channels=data.draw(st.one_of(many, few)),
            size=(size[0], size[1]),
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=data.draw(st.integers(1, 9)),
            residual=data.draw(st.booleans()),
            threads=data.draw(st.sampled_from([1, 3])),
        ),
        host(),
    )
