"""Elementwise arithmetic, reductions and resampling against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from separable.runtime.emit import elementwise, reduction, resample
from separable.runtime.emit.elementwise import Map
from separable.runtime.emit.expression import ACTIVATIONS, PRIMITIVES, evaluate, operand
from separable.runtime.emit.kernel import Kernel
from separable.runtime.emit.reduction import REDUCTIONS, SOFTMAXES, Columns, Rows
from separable.runtime.emit.resample import Resample
from separable.runtime.machine import Machine, host

from .kernels import assert_as_exact_as_eager, run

INF, NAN = float("inf"), float("nan")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS, "gelu-tanh"}))
def test_activations_over_their_range(name: str, machine: Machine) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.linspace(-1, 1, 999), random(77) * 1e-4])
    if name == "gelu-tanh":
        e = ACTIVATIONS["gelu"](operand(0), approximate="tanh")
    else:
        e = ACTIVATIONS[name](operand(0))
    does = Map((len(x),), ((1,),), (1,), e)
    y = run(Kernel(does, machine), [x], len(x))
    eager, exact = evaluate(e, [x]), evaluate(e, [x.double()])
    assert_as_exact_as_eager(y, eager, exact)
    # Relative, too, where the result is not tiny.
    large = exact.abs() > 1e-30
    relative = ((y.double() - exact).abs() / exact.abs())[large]
    own = ((eager.double() - exact).abs() / exact.abs())[large]
    assert relative.max() <= max(4 * own.max().item(), 1e-6)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_special_values(name: str, machine: Machine) -> None:
    x = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, 88.0, -88.0, 100.0])
    e = ACTIVATIONS[name](operand(0))
    y = run(Kernel(Map((len(x),), ((1,),), (1,), e), machine), [x], len(x))
    torch.testing.assert_close(y, evaluate(e, [x]), equal_nan=True, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("primitive", ["max", "min"])
def test_not_a_number_in_either_operand(primitive: str, machine: Machine) -> None:
    x, y = torch.tensor([NAN, 1.0, 2.0, INF]), torch.tensor([1.0, NAN, 1.0, -INF])
    e = (primitive, operand(0), operand(1))
    z = run(Kernel(Map((4,), ((1,), (1,)), (1,), e), machine), [x, y], 4)
    torch.testing.assert_close(z, PRIMITIVES[primitive][1](x, y), equal_nan=True)


MAPS = {
    "flat": ((5000,), ((1,), (1,)), (1,)),
    "rows-and-tail": ((3, 21), ((21, 1), (0, 1)), (21, 1)),
    "broadcast-inner": ((4, 9), ((9, 1), (1, 0)), (9, 1)),
    "transposed": ((6, 5, 13), ((1, 78, 6), (65, 13, 1)), (65, 13, 1)),
    "scattered": ((7, 11), ((11, 1), (11, 1)), (1, 7)),
    "turned": ((3, 19, 21), ((399, 1, 19),), (399, 21, 1)),
    "turned-small": ((5, 3), ((1, 5),), (3, 1)),
    "many-rows": ((700, 19), ((19, 1), (19, 1)), (19, 1)),
}


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(3)), st.tuples(*[st.integers(1, 35)] * 3))
def test_changes_of_layout(order: list[int], sizes: tuple[int, int, int]) -> None:
    x = random(*sizes)
    turned = x.permute(order)
    target = turned.contiguous()
    does = Map(tuple(turned.shape), (turned.stride(),), target.stride(), ("add", operand(0), 1.0))
    y = run(Kernel(does, host()), [x], x.numel()).view(turned.shape)
    assert torch.equal(y, turned + 1)


@pytest.mark.parametrize(("sizes", "x_strides", "y_strides"), MAPS.values(), ids=MAPS.keys())
def test_maps(
    sizes: tuple[int, ...],
    x_strides: tuple[tuple[int, ...], ...],
    y_strides: tuple[int, ...],
    machine: Machine,
) -> None:
    count = torch.Size(sizes).numel()
    operands = [random(count, seed=seed) for seed in range(2)]
    second = operand(len(x_strides) - 1)
    does = Map(sizes, x_strides, y_strides, ("fma", operand(0), second, 0.5))
    operands = operands[: len(x_strides)]
    y = run(Kernel(does, machine), operands, count).as_strided(sizes, y_strides)
    exact = elementwise.reference(does, [x.double() for x in operands])
    assert_as_exact_as_eager(y, elementwise.reference(does, operands), exact)


@pytest.mark.parametrize("channels", [1, 7, 32, 45, 70])
@pytest.mark.parametrize("pixels", [(1, 1), (5, 3), (90, 70), (1, 4000)])
@pytest.mark.parametrize("kind", ["mean", "sum", "max"])
def test_reductions_over_pixels(
    kind: str, channels: int, pixels: tuple[int, int], machine: Machine
) -> None:
    h, w = pixels
    x, extra = random(2 * h * w * channels) + 3, random(2 * channels)
    does = Columns(
        kind=kind,
        kept=(2, channels),
        reduced=pixels,
        x_kept=(h * w * channels, 1),
        x_reduced=(w * channels, channels),
        y_strides=(channels, 1),
        extra_strides=((channels, 1),),
        epilogue=("mul", operand(0), operand(1)),
    )
    y = run(Kernel(does, machine), [x, extra], 2 * channels).view(2, channels)
    exact = reduction.reference_columns(does, x.double(), [extra.double()])
    assert_as_exact_as_eager(y, reduction.reference_columns(does, x, [extra]), exact)


@pytest.mark.parametrize("kind", ["norm", "log_softmax", *SOFTMAXES, *REDUCTIONS])
@pytest.mark.parametrize("length", [1, 3, 8, 29, 64, 777, 20_000])
def test_rows(kind: str, length: int, machine: Machine) -> None:
    if kind == "norm" and length == 1:
        pytest.skip("the variance of one value is 0")
    x, extra = random(6 * length) * 3 + 1, random(length)
    if kind == "safe_softmax":
        x[:length] = -math.inf
    width = 1 if kind in REDUCTIONS else length
    does = Rows(
        kind=kind,
        sizes=(2, 3, length),
        x_strides=(3 * length, length, 1),
        y_strides=(3 * width, width, 1),
        extra_strides=() if kind in SOFTMAXES else ((0, 0, int(width == length)),),
        epilogue=operand(0) if kind in SOFTMAXES else ("mul", operand(0), operand(1)),
        eps=1e-5,
    )
    extras = [] if kind in SOFTMAXES else [extra]
    y = run(Kernel(does, machine), [x, *extras], 6 * width).view(2, 3, width)
    exact = reduction.reference_rows(does, x.double(), [e.double() for e in extras])
    assert_as_exact_as_eager(y, reduction.reference_rows(does, x, extras), exact)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["nearest", "bilinear", "mean", "max"]),
    corners=st.booleans(),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    inside=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.integers(1, 20),
)
def test_resampling(
    kind: str, corners: bool, size: tuple[int, int], inside: tuple[int, int], channels: int
) -> None:
    machine = host()
    (h, w), (i, j) = size, inside
    does = Resample(
        kind=kind,
        batch=2,
        size=size,
        in_size=inside,
        channels=channels,
        x_strides=(i * j * channels, j * channels, channels),
        y_strides=(h * w * channels, w * channels, channels),
        align_corners=corners and kind == "bilinear",
    )
    x = random(2, channels, i, j)
    memory = x.permute(0, 2, 3, 1).contiguous()
    y = run(Kernel(does, machine), [memory, resample.table(does)], 2 * h * w * channels)
    y = y.view(2, h, w, channels).permute(0, 3, 1, 2)
    # Torch computes neighbours in float32: in float64 others would be chosen.
    torch.testing.assert_close(y, resample.reference(does, x), rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(resample.PADDING),
    inside=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.integers(1, 20),
    data=st.data(),
)
def test_padding_by_what_is_there(
    kind: str, inside: tuple[int, int], channels: int, data: st.DataObject
) -> None:
    machine = host()
    most = {"reflect": -1, "replicate": 4, "circular": 0}[kind]
    pads = [
        (data.draw(st.integers(0, i + most)), data.draw(st.integers(0, i + most))) for i in inside
    ]
    (i, j), (h, w) = inside, [b + s + a for (b, a), s in zip(pads, inside, strict=True)]
    does = Resample(
        kind=kind,
        batch=2,
        size=(h, w),
        in_size=inside,
        channels=channels,
        x_strides=(i * j * channels, j * channels, channels),
        y_strides=(h * w * channels, w * channels, channels),
        before=(pads[0][0], pads[1][0]),
    )
    x = random(2, channels, i, j)
    memory = x.permute(0, 2, 3, 1).contiguous()
    y = run(Kernel(does, machine), [memory, resample.table(does)], 2 * h * w * channels)
    y = y.view(2, h, w, channels).permute(0, 3, 1, 2)
    assert torch.equal(y, resample.reference(does, x))
