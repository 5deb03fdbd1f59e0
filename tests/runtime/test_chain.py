"""Chains of convolutions against torch in float64, band by band."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from separable.runtime.emit import chain as kernel_file
from separable.runtime.emit import conv, expression, window
from separable.runtime.emit.chain import ChainTile
from separable.runtime.emit.conv import Conv
from separable.runtime.emit.expression import ACTIVATIONS, operand
from separable.runtime.emit.kernel import Kernel
from separable.runtime.emit.relayout import Relayout
from separable.runtime.emit.window import Window
from separable.runtime.machine import Machine, host
from separable.runtime.scheduling.fusing import stage_tile

from .kernels import GUARD, assert_as_exact_as_eager, run


@dataclass(frozen=True)
class Layer:
    """One stage in torch's terms; depthwise if it has no output channels."""

    out: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    epilogue: str = "relu"

    def sizes(self, size: tuple[int, int]) -> tuple[int, int]:
        """Output (height, width) for an input of that size."""
        h, w = (
            (i + 2 * p - (k - 1) * d - 1) // s + 1
            for i, p, k, d, s in zip(
                size, self.padding, self.kernel, self.dilation, self.stride, strict=True
            )
        )
        return h, w


@dataclass(frozen=True)
class Case:
    """Stages, and how they are cut; `gathers` and `scatters` if they begin and end with NCHW."""

    layers: tuple[Layer, ...]
    batch: int = 1
    channels: int = 16
    size: tuple[int, int] = (9, 11)
    rows: int = 2
    bands: int = 100
    residual: bool = False
    gathers: bool = False
    scatters: bool = False
    gap: int = 0  # floats between rows of NCHW


def depthwise(kernel: int = 3, stride: int = 1, **named: object) -> Layer:
    pad = kernel // 2
    layer = Layer(kernel=(kernel, kernel), stride=(stride, stride), padding=(pad, pad))
    return replace(layer, **named)  # type: ignore[arg-type]


def pointwise(out: int, epilogue: str = "relu") -> Layer:
    return Layer(out, epilogue=epilogue)


PAIR = (depthwise(), pointwise(24))
BLOCK = (pointwise(48, "relu6"), depthwise(epilogue="relu6"), pointwise(16, "hardtanh"))
REGULAR = (Layer(24, (3, 3), (1, 1), (1, 1)),)
BOTH = {"gathers": True, "scatters": True}

CASES = {
    "pair": Case(PAIR),
    "pair-one-band": Case(PAIR, rows=9),
    "pair-row-by-row-in-tasks": Case(PAIR, rows=1, bands=1),
    "pair-odd-channels": Case((depthwise(), pointwise(23)), channels=19, residual=True),
    "pair-stride-2": Case((depthwise(stride=2), pointwise(24)), size=(13, 12), bands=2),
    "pair-5x5": Case((depthwise(5), pointwise(9)), batch=3, rows=4),
    "pair-multiplier": Case((depthwise(multiplier=2), pointwise(9)), channels=13, bands=2),
    "pair-max": Case((depthwise(epilogue="hardswish"), pointwise(70, "silu")), rows=3),
    "block": Case(BLOCK, residual=True),
    "block-tasks": Case(BLOCK, residual=True, bands=2, batch=2),
    "block-one-row-a-task": Case(BLOCK, bands=1, rows=1),
    "block-stride-2": Case((pointwise(30), depthwise(stride=2), pointwise(20)), size=(14, 14)),
    "block-5x5-stride-2": Case(
        (pointwise(33), depthwise(5, 2), pointwise(17)), size=(15, 9), rows=3, bands=2
    ),
    "block-7x7": Case((pointwise(24), depthwise(7), pointwise(8)), size=(7, 7), rows=2, bands=2),
    "block-dilated": Case(
        (pointwise(24), depthwise(dilation=(3, 2), padding=(3, 2)), pointwise(8)), bands=2
    ),
    "block-page": Case((pointwise(1024), depthwise(), pointwise(8)), size=(5, 4), rows=2),
    "window-over-image": Case((pointwise(9), depthwise(5), pointwise(9)), size=(2, 3), rows=1),
    "one-pixel": Case(BLOCK, size=(1, 1)),
    "one-channel": Case((pointwise(1), depthwise(), pointwise(1)), channels=1, bands=1),
    "expand-only": Case((pointwise(40, "silu"), depthwise(5, epilogue="silu")), bands=2),
    "wide-padding": Case(
        (pointwise(8), depthwise(padding=(4, 4)), pointwise(8)), size=(3, 4), rows=1, bands=2
    ),
    "no-padding": Case((pointwise(8), depthwise(padding=(0, 0)), pointwise(8)), bands=2),
    "stride-over-kernel": Case(
        (pointwise(8), Layer(kernel=(2, 2), stride=(3, 3)), pointwise(8)), bands=2
    ),
    "stem": Case(
        (Layer(16, (3, 3), (2, 2), (1, 1)), depthwise(), pointwise(24)), channels=3,
        size=(17, 18), bands=2,
    ),
    "gathered": Case(PAIR, gathers=True, bands=2, channels=19),
    "scattered": Case((depthwise(), pointwise(23)), scatters=True, bands=2),
    "gathered-and-scattered": Case(PAIR, **BOTH, size=(20, 37), channels=64, rows=3),
    "gathered-residual": Case(PAIR, gathers=True, residual=True, bands=1),
    "gathered-window": Case((depthwise(),), gathers=True, channels=33, rows=1),
    "scattered-window": Case((depthwise(multiplier=2),), scatters=True, channels=33, bands=1),
    "regular": Case(REGULAR, **BOTH, channels=32, size=(19, 18), bands=2),
    "regular-gathered": Case(REGULAR, gathers=True, channels=35, size=(6, 40), rows=1),
    "regular-scattered": Case(REGULAR, scatters=True, batch=2, bands=1),
    "regular-5x5-stride-2": Case(
        (Layer(40, (5, 5), (2, 2), (2, 2)),), **BOTH, batch=2, channels=17, size=(17, 15), bands=1
    ),
    "regular-many-panels": Case((Layer(300, (3, 3), (1, 1), (1, 1)),), **BOTH, size=(7, 7)),
    "product": Case((pointwise(47),), **BOTH, batch=2, channels=31, size=(9, 16), bands=1),
    "block-both": Case(BLOCK, **BOTH, batch=2, size=(13, 21), rows=4, bands=2),
    "block-rows-apart": Case(BLOCK, **BOTH, size=(9, 21), gap=3, channels=20),
    "narrow-rows-apart": Case(BLOCK, **BOTH, size=(9, 5), gap=2, channels=5, bands=1),
    "one-column": Case(PAIR, **BOTH, size=(23, 1), channels=3, rows=5, bands=2),
    "one-row": Case(PAIR, **BOTH, size=(1, 45)),
    "one-pixel-both": Case(PAIR, **BOTH, size=(1, 1), channels=70),
    "one-channel-both": Case((depthwise(), pointwise(1)), **BOTH, channels=1, bands=1, rows=1),
    "gathered-page": Case((depthwise(), pointwise(8)), **BOTH, channels=1024, size=(5, 4)),
    "padded-product": Case((depthwise(), Layer(20, padding=(2, 0)), depthwise()), bands=2),
    "padded-product-both": Case((Layer(20, padding=(1, 3)),), **BOTH, bands=2),
    "two-windows": Case((depthwise(), pointwise(12), depthwise(5), pointwise(9)), bands=2),
}  # fmt: skip


def relayout(batch: int, size: tuple[int, int], channels: int, gap: int, gathers: bool) -> Relayout:
    (h, w), row = size, size[1] + gap
    planes = (channels * h * row, row, 1, h * row)
    pixels = (h * w * channels, w * channels, channels, 1)
    return Relayout(batch, size, channels, *((planes, pixels) if gathers else (pixels, planes)))


def check(case: Case, machine: Machine, special: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = random(case.batch, case.channels, *case.size)
    if special:
        x.view(-1)[:: max(1, x.numel() // 5)] = float("nan")
        x.view(-1)[1 :: max(2, x.numel() // 3)] = float("inf")
    size, channels = case.size, case.channels
    stages: list[Conv | Window | Relayout] = []
    parameters = []
    if case.gathers:
        stages.append(relayout(case.batch, size, channels, case.gap, gathers=True))
        parameters.append(None)
    for number, layer in enumerate(case.layers):
        out_size, out = layer.sizes(size), layer.out or channels * layer.multiplier
        extras, epilogue = (), ACTIVATIONS[layer.epilogue](operand(0))
        walk = (out_size[0] * out_size[1] * out, out_size[1] * out, out)
        if case.residual and number == len(case.layers) - 1:
            extras, epilogue = ((*walk, 1),), ("add", epilogue, operand(1))
        common = {
            "batch": case.batch,
            "size": out_size,
            "in_size": size,
            "y_strides": walk,
            "kernel": layer.kernel,
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "extra_strides": extras,
            "epilogue": epilogue,
        }
        x_walk = (size[0] * size[1] * channels, size[1] * channels, channels)
        weight = random(out, channels if layer.out else 1, *layer.kernel)
        if layer.out:
            stages.append(Conv(channels=(channels, out), x_strides=(*x_walk, 1), **common))
        else:
            stages.append(
                Window("conv", channels=channels, multiplier=layer.multiplier, x_strides=x_walk,
                       **common)
            )  # fmt: skip
        # Results of a size that float32 sums exactly enough at every stage.
        parameters.append((weight / weight[0].numel() ** 0.5, random(out)))
        size, channels = out_size, out
    if case.scatters:
        stages.append(relayout(case.batch, size, channels, case.gap, gathers=False))
        parameters.append(None)
    extra = random(case.batch, channels, *size)
    chain = kernel_file.joined(stages)
    tiles = tuple(stage_tile(stage, machine) for stage in chain.stages)
    tile = ChainTile(tiles, min(case.rows, size[0]), case.bands)
    operands = [F.pad(x, (0, case.gap)) if case.gathers else x.permute(0, 2, 3, 1).contiguous()]
    for stage, stage_cut, pair in zip(chain.stages, tiles, parameters, strict=True):
        if isinstance(stage, Conv):
            assert stage_cut
            operands += conv.pack(stage, stage_cut, machine, *pair)
        elif isinstance(stage, Window):
            operands += window.pack(stage, machine, *pair)
    if case.residual:
        operands.append(extra.permute(0, 2, 3, 1).contiguous())
    floats = kernel_file.scratch_size(chain, tile.rows)
    scratch = torch.full((floats + 2 * GUARD,), float("nan"))
    scratch[:GUARD] = scratch[-GUARD:] = 123.0
    operands.append(scratch[GUARD:-GUARD])
    gap = case.gap if case.scatters else 0
    y = run(Kernel(chain, machine, tile), operands, extra.numel() // size[1] * (size[1] + gap))
    assert bool((scratch[:GUARD] == 123.0).all()), "wrote before its buffers"
    assert bool((scratch[-GUARD:] == 123.0).all()), "wrote behind its buffers"
    if case.scatters:
        y = y.view(case.batch, channels, size[0], size[1] + gap)
        assert bool(y[..., size[1] :].isnan().all()), "wrote between its rows"
        y = y[..., : size[1]]
    else:
        y = y.view(case.batch, *size, channels).permute(0, 3, 1, 2)

    def plain(dtype: torch.dtype) -> torch.Tensor:
        value = x.to(dtype)
        filters = [pair for pair in zip(stages, parameters, strict=True) if pair[1]]
        for layer, (stage, (weight, bias)) in zip(case.layers, filters, strict=True):
            value = F.conv2d(
                value, weight.to(dtype), bias.to(dtype), layer.stride, layer.padding,
                layer.dilation, 1 if layer.out else value.shape[1],
            )  # fmt: skip
            value = expression.evaluate(stage.epilogue, [value, extra.to(dtype)])
        return value

    # Up to seventy products of size one are summed: ten roundings of that.
    assert_as_exact_as_eager(y, plain(torch.float32), plain(torch.float64), least=1.2e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_chain(case: Case, machine: Machine) -> None:
    check(case, machine)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_epilogues(name: str) -> None:
    layers = (pointwise(13, name), depthwise(epilogue=name), pointwise(7, name))
    check(Case(layers, channels=5, size=(5, 4), residual=True), host())


def test_not_a_number_and_infinity_pass_through(machine: Machine) -> None:
    layers = (pointwise(9), depthwise(padding=(0, 0)), pointwise(9))
    check(Case(layers, channels=1), machine, special=True)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_drawn_shapes(data: st.DataObject) -> None:
    draw = data.draw
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernels = st.tuples(*[st.sampled_from([1, 2, 3, 5, 7])] * 2)
    kernel, stride, dilation = draw(kernels), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    channels = st.integers(1, 70)
    window = Layer(0, kernel, stride, padding, dilation, draw(st.integers(1, 2)))
    # Of the stages beside the window, one at least is there.
    before, after, gathers, scatters = draw(st.tuples(*[st.booleans()] * 4).filter(any))
    layers = (
        *([pointwise(draw(channels))] if before else []),
        window,
        *([pointwise(draw(channels))] if after else []),
    )
    size = tuple(
        max(1, (k - 1) * d + 1 - 2 * p) + draw(st.integers(0, 9))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    check(
        Case(
            layers,
            batch=draw(st.integers(1, 2)),
            channels=draw(channels),
            size=(size[0], size[1]),
            rows=draw(st.integers(1, 5)),
            bands=draw(st.integers(1, 4)),
            residual=draw(st.booleans()) and not scatters,
            gathers=gathers,
            scatters=scatters,
            gap=draw(st.sampled_from([0, 0, 1, 5])),
        ),
        host(),
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_drawn_regular_shapes(data: st.DataObject) -> None:
    draw = data.draw
    k, stride = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 2))
    if k == 1:
        stride = 1
    gathers, scatters = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    layer = Layer(draw(st.integers(1, 70)), (k, k), (stride, stride), (k // 2, k // 2))
    check(
        Case(
            (layer,),
            batch=draw(st.integers(1, 2)),
            channels=draw(st.integers(1, 70)),
            size=(draw(st.integers(1, 12)), draw(st.integers(1, 40))),
            rows=draw(st.integers(1, 5)),
            bands=draw(st.integers(1, 4)),
            gathers=gathers,
            scatters=scatters,
            gap=draw(st.sampled_from([0, 0, 1, 5])),
        ),
        host(),
    )
