"""Views of tensors, and concatenation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..graph import Node
from .registry import Lowered, lowers, rearranged, shape_of, turned, view


@lowers(
    "dropout.default",
    "feature_dropout.default",
    "contiguous.default",
    "clone.default",
    "alias.default",
    "detach.default",
    "detach_.default",
    "identity.default",
    "lift_fresh_copy.default",
)
def _same(x: Node, *rest: Any, memory_format: Any = None) -> Lowered:
    return None if rest and rest[-1] is True else x


@lowers("to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as.default")
def _to(x: Node, *rest: Any, memory_format: Any = None, **options: Any) -> Lowered:
    """The tensor itself, where it is asked for what it is: nodes are float32 on the CPU."""
    stays = (None, False, True, torch.float32, torch.strided, torch.device("cpu"))
    asked = [each for each in (*rest, *options.values()) if not isinstance(each, Node)]
    return x if memory_format is None and all(each in stays for each in asked) else None


@lowers("permute.default")
def _permute(x: Node, dims: Sequence[int]) -> Lowered:
    order = tuple(d % len(shape_of(x)) for d in dims)
    return view(x, "permute", [shape_of(x)[d] for d in order], order=order)


@lowers("transpose.int", "swapaxes.default", "swapdims.default")
def _transpose(x: Node, first: int, second: int) -> Lowered:
    order = list(range(len(shape_of(x))))
    order[first], order[second] = order[second], order[first]
    return _permute(x, order)


@lowers("t.default", "numpy_T.default")
def _t(x: Node) -> Lowered:
    return _permute(x, range(len(shape_of(x)))[::-1])


@lowers("view.default", "reshape.default", "_unsafe_view.default")
def _reshape(x: Node, shape: Sequence[int]) -> Lowered:
    count = math.prod(shape_of(x))
    known = math.prod(size for size in shape if size != -1)
    return view(x, "reshape", [count // known if size == -1 else size for size in shape])


@lowers("view_as.default", "reshape_as.default")
def _reshape_as(x: Node, other: Node) -> Lowered:
    return _reshape(x, shape_of(other))


@lowers("flatten.using_ints")
def _flatten(x: Node, start: int = 0, end: int = -1) -> Lowered:
    shape = shape_of(x)
    start, end = start % len(shape), end % len(shape)
    joined = math.prod(shape[start : end + 1])
    return view(x, "reshape", (*shape[:start], joined, *shape[end + 1 :]))


@lowers("ravel.default")
def _ravel(x: Node) -> Lowered:
    return _reshape(x, [-1])


@lowers("unflatten.int")
def _unflatten(x: Node, dim: int, sizes: Sequence[int]) -> Lowered:
    shape = shape_of(x)
    dim %= len(shape)
    known = math.prod(size for size in sizes if size != -1)
    parts = [shape[dim] // known if size == -1 else size for size in sizes]
    return view(x, "reshape", (*shape[:dim], *parts, *shape[dim + 1 :]))


@lowers("mT.default", "mH.default", "adjoint.default")
def _matrix_transpose(x: Node) -> Lowered:
    return turned(x)


@lowers("movedim.intlist", "moveaxis.intlist")
def _movedims(x: Node, sources: Sequence[int], destinations: Sequence[int]) -> Lowered:
    rank = len(shape_of(x))
    moved = {d % rank: s % rank for s, d in zip(sources, destinations, strict=True)}
    others = iter(axis for axis in range(rank) if axis not in moved.values())
    return _permute(x, [moved[i] if i in moved else next(others) for i in range(rank)])


@lowers("movedim.int", "moveaxis.int")
def _movedim(x: Node, source: int, destination: int) -> Lowered:
    order = list(range(len(shape_of(x))))
    order.insert(destination % len(order), order.pop(source))
    return _permute(x, order)


@lowers("pixel_shuffle.default")
def _pixel_shuffle(x: Node, factor: int) -> Lowered:
    *lead, c, h, w = shape_of(x)
    n, out = len(lead), c // factor**2
    parts = (*lead, out, factor, factor, h, w)
    order = (*range(n + 1), n + 3, n + 1, n + 4, n + 2)
    return rearranged(x, parts, order, (*lead, out, h * factor, w * factor))


@lowers("pixel_unshuffle.default")
def _pixel_unshuffle(x: Node, factor: int) -> Lowered:
    *lead, c, h, w = shape_of(x)
    n, high, wide = len(lead), h // factor, w // factor
    parts = (*lead, c, high, factor, wide, factor)
    order = (*range(n + 1), n + 2, n + 4, n + 1, n + 3)
    return rearranged(x, parts, order, (*lead, c * factor**2, high, wide))


@lowers("channel_shuffle.default")
def _channel_shuffle(x: Node, groups: int) -> Lowered:
    n, c, *size = shape_of(x)
    order = (0, 2, 1, *range(3, 3 + len(size)))
    return rearranged(x, (n, groups, c // groups, *size), order, (n, c, *size))


@lowers("squeeze.dim", "squeeze.dims", "squeeze.default")
def _squeeze(x: Node, dims: Any = None) -> Lowered:
    rank = len(shape_of(x))
    axes = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    drop = {d % rank for d in axes if shape_of(x)[d] == 1}
    return view(x, "reshape", [size for i, size in enumerate(shape_of(x)) if i not in drop])


@lowers("unsqueeze.default")
def _unsqueeze(x: Node, dim: int) -> Lowered:
    shape = list(shape_of(x))
    shape.insert(dim % (len(shape) + 1), 1)
    return view(x, "reshape", shape)


@lowers("slice.Tensor")
def _slice(
    x: Node, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Lowered:
    shape = list(shape_of(x))
    dim %= len(shape)
    chosen = range(shape[dim])[slice(start, stop, step)]
    if len(chosen) == shape[dim]:
        return x
    shape[dim] = len(chosen)
    return view(x, "slice", shape, axis=dim, start=chosen.start, step=step)


@lowers("narrow.default")
def _narrow(x: Node, dim: int, start: int, length: int) -> Lowered:
    start %= shape_of(x)[dim]
    return _slice(x, dim, start, start + length)


@lowers("select.int")
def _select(x: Node, dim: int, index: int) -> Lowered:
    size = shape_of(x)[dim]
    part = _slice(x, dim, index % size, index % size + 1)
    shape = list(shape_of(x))
    del shape[dim]
    return view(part, "reshape", shape) if isinstance(part, Node) else None


@lowers("split_with_sizes.default", "split.sizes")
def _split_sizes(x: Node, sizes: Sequence[int], dim: int = 0) -> Lowered:
    parts, start = [], 0
    for size in sizes:
        part = _slice(x, dim, start, start + size)
        assert isinstance(part, Node)
        parts.append(part)
        start += size
    return tuple(parts)


@lowers("split.Tensor")
def _split(x: Node, size: int, dim: int = 0) -> Lowered:
    total = shape_of(x)[dim]
    return _split_sizes(x, [min(size, total - at) for at in range(0, total, size)], dim)


@lowers("chunk.default")
def _chunk(x: Node, chunks: int, dim: int = 0) -> Lowered:
    return _split(x, -(-shape_of(x)[dim] // chunks), dim)


@lowers("expand.default")
def _expand(x: Node, shape: Sequence[int]) -> Lowered:
    old = (1,) * (len(shape) - len(shape_of(x))) + shape_of(x)
    new = [o if s == -1 else s for o, s in zip(old, shape, strict=True)]
    return view(x, "expand", new)


@lowers("expand_as.default")
def _expand_as(x: Node, other: Node) -> Lowered:
    return _expand(x, shape_of(other))


@lowers("repeat.default")
def _repeat(x: Node, times: Sequence[int]) -> Lowered:
    shape = (1,) * (len(times) - len(shape_of(x))) + shape_of(x)
    single = [size for part in shape for size in (1, part)]
    wide = [size for pair in zip(times, shape, strict=True) for size in pair]
    repeated = view(view(x, "reshape", single), "expand", wide)
    return view(repeated, "reshape", [t * s for t, s in zip(times, shape, strict=True)])


@lowers("tile.default")
def _tile(x: Node, times: Sequence[int]) -> Lowered:
    return _repeat(x, [1] * (len(shape_of(x)) - len(times)) + list(times))


@lowers("repeat_interleave.self_int")
def _repeat_each(x: Node, times: int, dim: int | None = None, **named: Any) -> Lowered:
    if dim is None:
        return None
    shape, after = shape_of(x), dim % len(shape_of(x)) + 1
    apart = view(x, "reshape", (*shape[:after], 1, *shape[after:]))
    wide = view(apart, "expand", (*shape[:after], times, *shape[after:]))
    return view(wide, "reshape", (*shape[: after - 1], shape[after - 1] * times, *shape[after:]))


@lowers("roll.default")
def _roll(x: Node, shifts: int | Sequence[int], dims: int | Sequence[int] = ()) -> Lowered:
    shifts, dims = ([a] if isinstance(a, int) else a for a in (shifts, dims))
    if len(shifts) != len(dims):  # over all values in a row
        return None
    for shift, dim in zip(shifts, dims, strict=True):
        size = shape_of(x)[dim]
        ahead = size - shift % size
        parts = _split_sizes(x, [ahead, size - ahead], dim) if ahead < size else (x,)
        assert isinstance(parts, tuple)
        rolled = _cat(parts[::-1], dim)
        assert isinstance(rolled, Node)
        x = rolled
    return x


@lowers("unbind.int")
def _unbind(x: Node, dim: int = 0) -> Lowered:
    parts = [_select(x, dim, index) for index in range(shape_of(x)[dim])]
    return tuple(part for part in parts if isinstance(part, Node))


@lowers("stack.default")
def _stack(parts: Sequence[Node], dim: int = 0) -> Lowered:
    dim %= len(shape_of(parts[0])) + 1
    wide = [_unsqueeze(part, dim) for part in parts]
    return _cat([part for part in wide if isinstance(part, Node)], dim)


@lowers("cat.default", "concat.default", "concatenate.default")
def _cat(parts: Sequence[Node], dim: int = 0) -> Lowered:
    parts = [part for part in parts if shape_of(part) != (0,)]
    shape = list(shape_of(parts[0]))
    dim %= len(shape)
    shape[dim] = sum(shape_of(part)[dim] for part in parts)
    return Node("cat", tuple(shape), list(parts), {"axis": dim})
