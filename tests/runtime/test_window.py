"""Depthwise convolutions and pools against torch in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from separable.runtime.emit import window as kernel_file
from separable.runtime.emit.expression import hardsigmoid, operand
from separable.runtime.emit.kernel import Kernel
from separable.runtime.emit.window import Window
from separable.runtime.machine import Machine, host
from separable.runtime.scheduling.tiles import choose_window_tile

from .kernels import assert_as_exact_as_eager, run


@dataclass(frozen=True)
class Case:
    """A window in torch's terms."""

    kind: str = "conv"
    batch: int = 1
    channels: int = 16
    size: tuple[int, int] = (9, 11)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    residual: bool = False
    threads: int = 1


CASES = {
    "3x3": Case(),
    "3x3-stride-2": Case(stride=(2, 2), size=(12, 13)),
    "5x5": Case(channels=19, kernel=(5, 5), padding=(2, 2)),
    "7x7-residual": Case(channels=24, kernel=(7, 7), padding=(3, 3), residual=True),
    "larger-than-image": Case(size=(2, 3), kernel=(5, 5), padding=(2, 2)),
    "one-pixel": Case(size=(1, 1)),
    "one-channel": Case(channels=1),
    "dilated": Case(dilation=(3, 2), padding=(3, 2)),
    "no-padding": Case(padding=(0, 0), channels=33),
    "stride-over-kernel": Case(kernel=(2, 2), stride=(3, 3), padding=(0, 0)),
    "multiplier-2": Case(multiplier=2, channels=13, residual=True),
    "multiplier-3": Case(multiplier=3, channels=7),
    "row": Case(size=(1, 40), kernel=(1, 9), padding=(0, 4)),
    "batch": Case(batch=3, channels=70),
    "rows-per-task": Case(size=(60, 5), channels=20, threads=3),
    "rows-per-task-batch": Case(batch=3, size=(11, 5), channels=20, threads=2),
    "channels-shared": Case(size=(7, 7), channels=275, threads=2),
    "channels-shared-multiplier": Case(size=(4, 3), channels=70, multiplier=2, threads=2),
    "fewer-vectors-than-tasks": Case("max", size=(3, 5), channels=20, threads=4),
    "max": Case("max", channels=21, stride=(2, 2)),
    "max-2x2": Case("max", kernel=(2, 2), stride=(2, 2), padding=(0, 0), residual=True),
    "mean": Case("mean", channels=20, residual=True),
    "mean-2x3": Case("mean", kernel=(2, 3), stride=(2, 3), padding=(0, 0)),
}


def check(case: Case, machine: Machine, special: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = random(case.batch, case.channels, *case.size)
    if special:
        x.view(-1)[::50] = float("nan")
        x.view(-1)[1::70] = float("inf")
    outputs = case.channels * case.multiplier
    weight, bias = random(outputs, 1, *case.kernel), random(outputs)
    size = [
        (i + 2 * p - (k - 1) * d - 1) // s + 1
        for i, p, k, d, s in zip(
            case.size, case.padding, case.kernel, case.dilation, case.stride, strict=True
        )
    ]
    extra = random(case.batch, outputs, *size)
    h, w = case.size
    walk = (size[0] * size[1] * outputs, size[1] * outputs, outputs)
    epilogue = hardsigmoid(operand(0))
    does = Window(
        kind=case.kind,
        batch=case.batch,
        size=(size[0], size[1]),
        in_size=case.size,
        channels=case.channels,
        kernel=case.kernel,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        multiplier=case.multiplier,
        x_strides=(h * w * case.channels, w * case.channels, case.channels),
        y_strides=walk,
        extra_strides=((*walk, 1),) if case.residual else (),
        epilogue=("add", epilogue, operand(1)) if case.residual else epilogue,
    )
    packed = kernel_file.pack(does, machine, weight, bias) if case.kind == "conv" else ()
    extras = [extra.permute(0, 2, 3, 1).contiguous()] if case.residual else []
    memory = x.permute(0, 2, 3, 1).contiguous()
    tile = choose_window_tile(does, machine, case.threads)
    y = run(Kernel(does, machine, tile), [memory, *packed, *extras], extra.numel())
    y = y.view(case.batch, *size, outputs).permute(0, 3, 1, 2)
    eager = kernel_file.reference(does, x, weight, bias, [extra])
    exact = kernel_file.reference(
        does, x.double(), weight.double(), bias.double(), [extra.double()]
    )
    # What is summed is of size one: a rounding or two of that, where little of the sum is left.
    assert_as_exact_as_eager(y, eager, exact, least=2.4e-7)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_window(case: Case, machine: Machine) -> None:
    check(case, machine)


@pytest.mark.parametrize("kind", ["conv", "max", "mean"])
def test_not_a_number_and_infinity_pass_through(kind: str, machine: Machine) -> None:
    check(Case(kind, padding=(0, 0)), machine, special=True)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_drawn_shapes(data: st.DataObject) -> None:
    pair = st.tuples(st.integers(1, 4), st.integers(1, 4))
    kind = data.draw(st.sampled_from(["conv", "max", "mean"]))
    kernel, stride = data.draw(pair), data.draw(pair)
    dilation = (1, 1) if kind == "mean" else data.draw(pair)
    # A pool's window must reach into the image.
    most = [(k - 1) // 2 if kind != "conv" else 4 for k in kernel]
    padding = tuple(data.draw(st.integers(0, p)) for p in most)
    size = tuple(
        max(1, (k - 1) * d + 1 - 2 * p) + data.draw(st.integers(0, 9))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    check(
        Case(
            kind=kind,
            batch=data.draw(st.integers(1, 2)),
            channels=data.draw(st.integers(1, 70)),
            size=(size[0], size[1]),
            kernel=kernel,
            stride=stride,
            padding=(padding[0], padding[1]),
            dilation=dilation,
            multiplier=data.draw(st.integers(1, 3)) if kind == "conv" else 1,
            residual=data.draw(st.booleans()),
            threads=data.draw(st.integers(1, 3)),
        ),
        host(),
    )
