"""Layers with weights, and normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..emit.expression import operand
from ..graph import Node, constant
from .registry import (
    Lowered,
    along_channels,
    elementwise,
    lowers,
    on_a_row,
    pair,
    shape_of,
    view,
)
from .sampling import padded


def _zeros(count: int) -> Node:
    return constant(lambda: torch.zeros(count, dtype=torch.float32), (count,))


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
    if weight.kind != "constant" or (bias and bias.kind != "constant"):
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
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    size = tuple(
        (i + 2 * p - (k - 1) * d - 1) // s + 1
        for i, p, k, d, s in zip((h, w), padding, (kh, kw), dilation, stride, strict=True)
    )
    bias = bias or _zeros(out)
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
    if transposed or len(shape_of(x)) > 4:
        return None
    return _conv(x, weight, bias, stride, padding, dilation, groups)


@lowers("linear.default")
def _linear(x: Node, weight: Node, bias: Node | None = None) -> Lowered:
    if weight.kind != "constant" or (bias and bias.kind != "constant") or len(shape_of(x)) > 4:
        return None
    out, inner = shape_of(weight)
    recipe = weight.attributes["recipe"]
    bias = bias or _zeros(out)
    w = constant(lambda: recipe()[:, :, None, None], (out, inner, 1, 1))
    return Node("conv", (*shape_of(x)[:-1], out), [x, w, bias], {"linear": True, "groups": 1})


@lowers("mm.default", "matmul.default")
def _matmul(x: Node, weight: Node) -> Lowered:
    if weight.kind != "constant" or len(shape_of(weight)) != 2 or len(shape_of(x)) < 2:
        return None
    recipe = weight.attributes["recipe"]
    return _linear(x, constant(lambda: recipe().t(), shape_of(weight)[::-1]))


@lowers("addmm.default")
def _addmm(bias: Node, x: Node, weight: Node) -> Lowered:
    if weight.kind != "constant" or bias.kind != "constant" or len(shape_of(bias)) != 1:
        return None
    recipe = weight.attributes["recipe"]
    return _linear(x, constant(lambda: recipe().t(), shape_of(weight)[::-1]), bias)


@lowers("batch_norm.default")
def _batch_norm(
    x: Node,
    weight: Node | None,
    bias: Node | None,
    mean: Node | None,
    var: Node | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Lowered:
    parts = (weight, bias, mean, var)
    if training or mean is None or var is None or any(p and p.kind != "constant" for p in parts):
        return None
    scale, offset = (p.attributes["recipe"] if p else None for p in (weight, bias))
    read_mean, read_var = mean.attributes["recipe"], var.attributes["recipe"]
    shape = (-1, *[1] * (len(shape_of(x)) - 2))
    full = (shape_of(mean)[0], *shape[1:])

    def factor() -> torch.Tensor:
        # In float64: what is folded into the weights is rounded once.
        deviation: torch.Tensor = torch.sqrt(read_var().double() + eps)
        return ((scale() if scale else 1) / deviation).reshape(shape)

    def shift() -> torch.Tensor:
        moved: torch.Tensor = -read_mean().reshape(shape) * factor()
        return moved + offset().reshape(shape) if offset else moved

    scaled = elementwise(("mul", operand(0), operand(1)), x, constant(factor, full))
    return elementwise(("add", operand(0), operand(1)), scaled, constant(shift, full))


@lowers("_native_batch_norm_legit_no_training.default")
def _batch_norm_no_training(
    x: Node, weight: Node, bias: Node, mean: Node, var: Node, momentum: float, eps: float
) -> Lowered:
    node = _batch_norm(x, weight, bias, mean, var, False, momentum, eps)
    return (node,) if isinstance(node, Node) else None


@lowers("layer_norm.default")
def _layer_norm(
    x: Node,
    shape: Sequence[int],
    weight: Node | None = None,
    bias: Node | None = None,
    eps: float = 1e-5,
    cudnn: bool = False,
) -> Lowered:
    if len(shape) != 1 or any(p and p.kind != "constant" for p in (weight, bias)):
        return None
    node = Node("norm", shape_of(x), [x], {"eps": eps})
    if weight:
        node = elementwise(("mul", operand(0), operand(1)), node, weight)
    return elementwise(("add", operand(0), operand(1)), node, bias) if bias else node


@lowers("native_layer_norm.default")
def _native_layer_norm(
    x: Node, shape: Sequence[int], weight: Node | None, bias: Node | None, eps: float
) -> Lowered:
    node = _layer_norm(x, shape, weight, bias, eps)
    return (node,) if isinstance(node, Node) else None


@lowers("group_norm.default")
def _group_norm(
    x: Node,
    groups: int,
    weight: Node | None = None,
    bias: Node | None = None,
    eps: float = 1e-5,
    cudnn: bool = False,
) -> Lowered:
    if any(p and p.kind != "constant" for p in (weight, bias)):
        return None
    n, c, *size = shape_of(x)
    pixels, each = math.prod(size), c // groups
    # Channels last, the channels of a group together: of one group, that is how images lie.
    node = view(view(x, "reshape", (n, c, pixels)), "permute", (n, pixels, c), order=(0, 2, 1))
    node = view(node, "reshape", (n, pixels, groups, each))
    node = view(node, "permute", (n, groups, pixels, each), order=(0, 2, 1, 3))
    node = view(node, "reshape", (n, groups, pixels * each))
    node = Node("norm", shape_of(node), [node], {"eps": eps})
    node = view(node, "reshape", (n, groups, pixels, each))
    node = view(node, "permute", (n, pixels, groups, each), order=(0, 2, 1, 3))
    node = view(node, "reshape", (n, pixels, c))
    node = view(view(node, "permute", (n, c, pixels), order=(0, 2, 1)), "reshape", (n, c, *size))
    for kind, parameter in (("mul", weight), ("add", bias)):
        if parameter:
            whole = along_channels(parameter, len(shape_of(x)))
            node = elementwise((kind, operand(0), operand(1)), node, whole)
    return node


@lowers("softmax.int", "_softmax.default")
def _softmax(x: Node, dim: int, *rest: Any) -> Lowered:
    return Node("softmax", shape_of(x), [x], {"axis": dim % len(shape_of(x))})
