"""Linear layers, and normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..emit.expression import operand
from ..graph import Node, constant
from .registry import (
    Lowered,
    along_channels,
    elementwise,
    fixed,
    lowers,
    product,
    shape_of,
    turned,
    view,
    zeros,
)


@lowers("linear.default")
def _linear(x: Node, weight: Node, bias: Node | None = None) -> Lowered:
    if not fixed(weight, bias):
        return None
    out, inner = shape_of(weight)
    if bias and shape_of(bias) != (out,):
        return None
    *lead, _ = shape_of(x)
    if len(lead) > 3:
        rows = _linear(view(x, "reshape", (math.prod(lead), inner)), weight, bias)
        return view(rows, "reshape", (*lead, out)) if isinstance(rows, Node) else None
    recipe = weight.attributes["recipe"]
    bias = bias or zeros(out)
    w = constant(lambda: recipe()[:, :, None, None], (out, inner, 1, 1))
    return Node("conv", (*lead, out), [x, w, bias], {"linear": True, "groups": 1})


@lowers("mm.default", "bmm.default", "matmul.default")
def _matmul(x: Node, weight: Node) -> Lowered:
    if x.kind == "constant" and len(shape_of(x)) == 2 <= len(shape_of(weight)):
        node = _linear(turned(weight), x)
        return turned(node) if isinstance(node, Node) else None
    if len(shape_of(x)) < 2 or len(shape_of(weight)) < 2:
        return None
    if weight.kind != "constant" or len(shape_of(weight)) != 2:
        return product(x, weight)
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
    if training or mean is None or var is None or not fixed(weight, bias, mean, var):
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
    if not fixed(weight, bias):
        return None
    rows = (*shape_of(x)[: -len(shape)], math.prod(shape))
    whole = x if len(shape) == 1 else view(x, "reshape", rows)
    node = Node("norm", rows, [whole], {"eps": eps})
    if len(shape) > 1:
        node = view(node, "reshape", shape_of(x))
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
    if not fixed(weight, bias):
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


@lowers("baddbmm.default")
def _baddbmm(bias: Node, x: Node, y: Node, *, beta: float = 1, alpha: float = 1) -> Lowered:
    node = product(x, y)
    scaled = ("mul", operand(0), float(alpha)), ("mul", operand(1), float(beta))
    if not beta:  # whatever `bias` holds, NaN too, is ignored
        return elementwise(scaled[0], node) if node else None
    return elementwise(("add", *scaled), node, bias) if node else None


@lowers("scaled_dot_product_attention.default")
def _attention(
    query: Node,
    key: Node,
    value: Node,
    mask: Node | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> Lowered:
    if dropout or len(shape_of(key)) < 2:
        return None
    factor = 1 / math.sqrt(shape_of(query)[-1]) if scale is None else scale
    scores = product(query, turned(key))
    if scores is None:
        return None
    scores = elementwise(("mul", operand(0), float(factor)), scores)
    if causal:
        square = shape_of(scores)[-2:]
        mask = constant(lambda: torch.full(square, -math.inf).triu(1), square)
    if mask:
        scores = elementwise(("add", operand(0), operand(1)), scores, mask)
    attributes = {"axis": len(shape_of(scores)) - 1, "function": "safe_softmax"}
    return product(Node("softmax", shape_of(scores), [scores], attributes), value)


@lowers("instance_norm.default")
def _instance_norm(
    x: Node,
    weight: Node | None,
    bias: Node | None,
    mean: Node | None,
    var: Node | None,
    use_input: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Lowered:
    if not use_input:
        return _batch_norm(x, weight, bias, mean, var, False, momentum, eps)
    # statistics that are kept would have to be written
    return _group_norm(x, shape_of(x)[1], weight, bias, eps) if mean is None else None


@lowers("rms_norm.default")
def _rms_norm(
    x: Node, shape: Sequence[int], weight: Node | None = None, eps: float | None = None
) -> Lowered:
    if not fixed(weight):
        return None
    rank = len(shape_of(x))
    axes = tuple(range(rank - len(shape), rank))
    kept = (*shape_of(x)[: axes[0]], *[1] * len(axes))
    squares = elementwise(("mul", operand(0), operand(0)), x)
    mean = Node("reduce", kept, [squares], {"axes": axes, "function": "mean"})
    root = ("sqrt", ("add", operand(1), torch.finfo(torch.float32).eps if eps is None else eps))
    node = elementwise(("div", operand(0), root), x, mean)
    return elementwise(("mul", operand(0), operand(1)), node, weight) if weight else node


def _softmax_like(function: str) -> Callable[..., Lowered]:
    def lower(x: Node, dim: int, *rest: Any) -> Lowered:
        axis = dim % len(shape_of(x))
        return Node("softmax", shape_of(x), [x], {"axis": axis, "function": function})

    return lower


for _name in ("softmax", "log_softmax"):
    lowers(f"{_name}.int", f"_{_name}.default")(_softmax_like(_name))
