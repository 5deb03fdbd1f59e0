"""The table of lowerings, and what every lowering needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..emit.expression import Expression
from ..graph import Node, constant

Lowered = Node | tuple[Node, ...] | None
LOWERINGS: dict[str, Callable[..., Lowered]] = {}


def lowers(*names: str) -> Callable[[Callable[..., Lowered]], Callable[..., Lowered]]:
    """Register a function for operators of ATen, named as in `aten.conv2d.default`."""

    def register(function: Callable[..., Lowered]) -> Callable[..., Lowered]:
        for name in names:
            LOWERINGS[f"aten.{name}"] = function
        return function

    return register


def elementwise(e: Expression, *inputs: Node) -> Node:
    """A map over operands that broadcast."""
    shape = torch.broadcast_shapes(*(node.shape or () for node in inputs))
    return Node("map", tuple(shape), list(inputs), epilogue=e)


def product(x: Node, y: Node) -> Node | None:
    """Matrices `[..., m, k]` times `[..., k, n]`; at most two leading axes may broadcast."""
    *lead, rows, inner = shape_of(x)
    *others, _, columns = shape_of(y)
    shape = (*torch.broadcast_shapes(lead, others), rows, columns)
    if len(shape) <= 4:
        return Node("product", shape, [x, y])
    if lead != others:
        return None
    many = math.prod(lead)
    x, y = view(x, "reshape", (many, rows, inner)), view(y, "reshape", (many, inner, columns))
    return view(Node("product", (many, rows, columns), [x, y]), "reshape", shape)


def view(x: Node, kind: str, shape: Sequence[int], **attributes: Any) -> Node:
    """Another look at the same numbers."""
    return Node("view", tuple(shape), [x], {"view": kind, **attributes})


def turned(x: Node) -> Node:
    """Matrices, transposed."""
    *lead, rows, columns = shape_of(x)
    order = (*range(len(lead)), len(lead) + 1, len(lead))
    return view(x, "permute", (*lead, columns, rows), order=order)


def rearranged(x: Node, parts: Sequence[int], order: Sequence[int], shape: Sequence[int]) -> Node:
    """`x` taken apart into axes, which are put into another order and together again."""
    apart = view(x, "reshape", parts)
    moved = view(apart, "permute", [parts[axis] for axis in order], order=tuple(order))
    return view(moved, "reshape", shape)


def shape_of(x: Node) -> tuple[int, ...]:
    """The shape of a float32 tensor."""
    assert x.shape is not None
    return x.shape


def on_a_row(fill: int, value: int | Sequence[int]) -> tuple[int, int]:
    """An argument for the one axis of a sequence, as one for an image of height 1."""
    return (fill, value if isinstance(value, int) else value[0])


def fixed(*parameters: Node | None) -> bool:
    """Whether those that are given are constants."""
    return all(p is None or p.kind == "constant" for p in parameters)


def zeros(count: int) -> Node:
    """A constant: the bias of a layer that has none."""
    return constant(lambda: torch.zeros(count, dtype=torch.float32), (count,))


def along_channels(parameter: Node, rank: int) -> Node:
    """A constant of one number per channel, to broadcast over tensors `[N, C, ...]`."""
    shape = (shape_of(parameter)[0], *[1] * (rank - 2))
    recipe = parameter.attributes["recipe"]
    return constant(lambda: recipe().reshape(shape), shape)


def pair(value: int | Sequence[int], default: Sequence[int] = ()) -> tuple[int, int]:
    """One number for both axes, or one for each."""
    values = [value] if isinstance(value, int) else list(value or default)
    return (values[0], values[-1])
