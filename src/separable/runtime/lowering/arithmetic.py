"""Elementwise arithmetic and activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..emit.expression import ACTIVATIONS, Expression, operand
from ..graph import Node
from .registry import LOWERINGS, Lowered, along_channels, elementwise, lowers, shape_of


def _activation(name: str) -> Callable[..., Lowered]:
    return lambda x, *rest, **named: elementwise(ACTIVATIONS[name](operand(0), *rest, **named), x)


for _name in ACTIVATIONS:
    LOWERINGS[f"aten.{_name}.default"] = _activation(_name)


def _binary(kind: str) -> Callable[..., Lowered]:
    def lower(x: Any, y: Any, alpha: float = 1) -> Lowered:
        nodes = list(dict.fromkeys(node for node in (x, y) if isinstance(node, Node)))
        # The larger operand first: it decides the layout of the result.
        if len(nodes) == 2 and nodes[0].kind == "constant":
            nodes.reverse()
        first, second = (
            operand(nodes.index(part)) if isinstance(part, Node) else part for part in (x, y)
        )
        if alpha != 1:
            second = ("mul", second, float(alpha))
        return elementwise((kind, first, second), *nodes)

    return lower


for _name in ("add", "sub", "mul", "div"):
    LOWERINGS[f"aten.{_name}.Tensor"] = LOWERINGS[f"aten.{_name}.Scalar"] = _binary(_name)
LOWERINGS["aten.maximum.default"] = LOWERINGS["aten.max.other"] = _binary("max")
LOWERINGS["aten.minimum.default"] = LOWERINGS["aten.min.other"] = _binary("min")


@lowers("rsub.Scalar", "rsub.Tensor")
def _reversed_sub(x: Node, y: Any, alpha: float = 1) -> Lowered:
    scaled = elementwise(("mul", operand(0), float(alpha)), x) if alpha != 1 else x
    return LOWERINGS["aten.sub.Tensor"](y, scaled)


@lowers("clamp.default")
def _clamp(x: Node, low: float | None = None, high: float | None = None) -> Lowered:
    e: Expression = operand(0)
    if low is not None:
        e = ("max", e, float(low))
    return elementwise(e if high is None else ("min", e, float(high)), x)


@lowers("clamp_min.default")
def _clamp_min(x: Node, low: float) -> Lowered:
    return _clamp(x, low)


@lowers("clamp_max.default")
def _clamp_max(x: Node, high: float) -> Lowered:
    return _clamp(x, None, high)


@lowers("pow.Tensor_Scalar")
def _power(x: Node, exponent: float) -> Lowered:
    root = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}.get(exponent)
    if root:
        return elementwise(ACTIVATIONS[root](operand(0)), x)
    square = ("mul", operand(0), operand(0))
    powers: dict[float, Expression] = {1: operand(0), 2: square, 3: ("mul", square, operand(0))}
    return elementwise(powers[exponent], x) if exponent in powers else None


@lowers("square.default")
def _square(x: Node) -> Lowered:
    return _power(x, 2)


@lowers("glu.default")
def _gated(x: Node, dim: int = -1) -> Lowered:
    halves = LOWERINGS["aten.chunk.default"](x, 2, dim)
    assert isinstance(halves, tuple)
    return elementwise(("mul", operand(0), ("sigmoid", operand(1))), *halves)


@lowers("addcmul.default")
def _add_product(x: Node, y: Node, z: Node, value: float = 1) -> Lowered:
    product = LOWERINGS["aten.mul.Tensor"](y, z)
    return LOWERINGS["aten.add.Tensor"](x, product, alpha=value)


@lowers("prelu.default")
def _prelu(x: Node, slope: Node) -> Lowered:
    if slope.kind != "constant":
        return None
    slopes = along_channels(slope, len(shape_of(x)))
    below = ("mul", ("min", operand(0), 0.0), operand(1))
    return elementwise(("add", ("max", operand(0), 0.0), below), x, slopes)
