"""Convolutions, of which transposed ones become regular ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..graph import MOST_TAPS, Node, constant
from .registry import (
    LOWERINGS,
    Lowered,
    fixed,
    lowers,
    on_a_row,
    pair,
    rearranged,
    shape_of,
    view,
    zeros,
)
from .sampling import padded


@lowers("conv2d.default", "conv1d.default")
def _conv(
    x: Node,
    weight: Node,
    bias: Node | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Lowered:
    if not fixed(weight, bias):
        return None
    if len(shape_of(x)) != len(shape_of(weight)):  # no batch axis
        return None
    one_d = len(shape_of(x)) == 3
    if one_d:  # a row of an image of height 1
        n, c, length = shape_of(x)
        x = view(x, "reshape", (n, c, 1, length))
        recipe = weight.attributes["recipe"]
        out, inner, k = shape_of(weight)
        weight = constant(lambda: recipe().unsqueeze(2), (out, inner, 1, k))
        stride, padding = on_a_row(1, stride), on_a_row(0, padding)
        dilation = on_a_row(1, dilation)
    n, c, h, w = shape_of(x)
    out, inner, kh, kw = shape_of(weight)
    if max(kh, kw) > MOST_TAPS:
        return None
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    size = tuple(
        (i + 2 * p - (k - 1) * d - 1) // s + 1
        for i, p, k, d, s in zip((h, w), padding, (kh, kw), dilation, stride, strict=True)
    )
    bias = bias or zeros(out)
    common = {"kernel": (kh, kw), "stride": stride, "padding": padding, "dilation": dilation}
    if groups == c and inner == 1 and groups > 1:
        common |= {"kind": "conv", "multiplier": out // c}
        node = Node("window", (n, out, *size), [x, weight, bias], common)
    else:
        node = Node("conv", (n, out, *size), [x, weight, bias], common | {"groups": groups})
    return view(node, "reshape", (n, out, size[1])) if one_d else node


@lowers("conv2d.padding", "conv1d.padding")
def _conv_same(
    x: Node,
    weight: Node,
    bias: Node | None = None,
    stride: Any = 1,
    padding: str = "valid",
    dilation: Any = 1,
    groups: int = 1,
) -> Lowered:
    axes = len(shape_of(weight)) - 2
    if len(shape_of(x)) != axes + 2:
        return None
    zeros = (0,) * axes
    if padding == "valid":
        return _conv(x, weight, bias, stride, zeros, dilation, groups)
    d = [dilation] * axes if isinstance(dilation, int) else list(dilation) * (axes // len(dilation))
    total = [di * (k - 1) for di, k in zip(d, shape_of(weight)[2:], strict=True)]
    before = [t // 2 for t in total]
    after = [t - b for t, b in zip(total, before, strict=True)]
    return _conv(padded(x, before, after, 0.0), weight, bias, stride, zeros, dilation, groups)


@lowers("convolution.default")
def _convolution(
    x: Node,
    weight: Node,
    bias: Node | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Lowered:
    if len(shape_of(x)) > 4:
        return None
    if transposed:
        return _transposed(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv(x, weight, bias, stride, padding, dilation, groups)


@dataclass(frozen=True)
class _Axis:
    """One axis of a transposed convolution, as a regular one of stride 1 with a channel per phase.

    What tap `t = s m + r` adds to output `s q + r` is of input `q - m`: each phase `r` sees every
    `s`-th tap.

    Attributes:
        phases: the stride `s`.
        taps: of each phase.
        missing: taps of the last phases that there are not.
        before, after: inputs of zero at both ends.
        skipped: outputs before the first that is wanted.
        size: of the output.
    """

    phases: int
    taps: int
    missing: int
    before: int
    after: int
    skipped: int
    size: int

    @classmethod
    def of(cls, length: int, kernel: int, stride: int, padding: int, more: int) -> _Axis:
        """For an input of `length` values; `more` is torch's `output_padding`."""
        size = (length - 1) * stride - 2 * padding + kernel + more
        taps = -(-kernel // stride)
        before = max(taps - 1 - padding // stride, 0)
        skipped = padding - (taps - 1 - before) * stride
        windows = -(-(skipped + size) // stride)
        after = max(windows + taps - 1 - before - length, 0)
        return cls(stride, taps, taps * stride - kernel, before, after, skipped, size)


@lowers("conv_transpose2d.input", "conv_transpose1d.default")
def _transposed(
    x: Node,
    weight: Node,
    bias: Node | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Lowered:
    """A regular convolution whose outputs are put in their places; dilated ones have no kernel."""
    if not fixed(weight, bias):
        return None
    if len(shape_of(x)) != len(shape_of(weight)) or set(pair(dilation)) != {1}:
        return None
    n, c, *lengths = shape_of(x)
    _, each, *kernel = shape_of(weight)
    settings = [pair(value) for value in (stride, padding, output_padding)]
    axes = [_Axis.of(*values) for values in zip(lengths, kernel, *settings, strict=False)]
    if min(axis.size for axis in axes) < 1:
        return None
    phases, out = math.prod(axis.phases for axis in axes), each * groups
    read = weight.attributes["recipe"]

    def regular() -> torch.Tensor:
        """From `[in, out, k, ...]` to `[out, phase, ..., in, tap, ...]`."""
        ends = [end for axis in reversed(axes) for end in (0, axis.missing)]
        whole = torch.nn.functional.pad(read(), ends)
        parts = [part for axis in axes for part in (axis.taps, axis.phases)]
        apart = whole.reshape(groups, c // groups, each, *parts)
        tap, phase = (range(first, apart.dim(), 2) for first in (3, 4))
        turned = apart.flip(*tap).permute(0, 2, *phase, 1, *tap)
        return turned.reshape(out * phases, c // groups, *(axis.taps for axis in axes))

    taps = [axis.taps for axis in axes]
    if bias:
        read_bias = bias.attributes["recipe"]
        bias = constant(lambda: read_bias().repeat_interleave(phases), (out * phases,))
    around = [axis.before for axis in axes], [axis.after for axis in axes]
    result: Lowered = _conv(
        padded(x, *around, 0.0),
        constant(regular, (out * phases, c // groups, *taps)),
        bias,
        padding=[0] * len(axes),
        groups=groups,
    )
    assert isinstance(result, Node)
    if phases > 1:
        sizes = shape_of(result)[2:]
        apart = (n, out, *(axis.phases for axis in axes), *sizes)
        half = len(axes)
        order = (0, 1, *(at for i in range(half) for at in (2 + half + i, 2 + i)))
        joined = (size * axis.phases for size, axis in zip(sizes, axes, strict=True))
        result = rearranged(result, apart, order, (n, out, *joined))
    for i, axis in enumerate(axes, 2):
        result = LOWERINGS["aten.narrow.default"](result, i, axis.skipped, axis.size)
    return result
