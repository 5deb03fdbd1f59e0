"""Pools, upsampling and padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..emit.expression import operand
from ..graph import MOST_TAPS, Node
from .registry import Lowered, elementwise, lowers, on_a_row, pair, shape_of, view


@lowers("max_pool2d.default")
def _max_pool(
    x: Node,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Lowered:
    return _pool("max", x, kernel, stride, padding, dilation, ceil_mode)


@lowers("avg_pool2d.default")
def _avg_pool(
    x: Node,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Lowered:
    if divisor_override:
        return None
    if any(pair(padding)) and count_include_pad:
        if ceil_mode:
            return None
        ph, pw = pair(padding)
        x, padding = padded(x, (0, 0, ph, pw), (0, 0, ph, pw), 0.0), 0
    return _pool("mean", x, kernel, stride, padding, 1, ceil_mode)


def _pool(
    kind: str, x: Node, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Lowered:
    if len(shape_of(x)) != 4:
        return None
    n, c, h, w = shape_of(x)
    kernel = pair(kernel)
    stride, padding, dilation = pair(stride, kernel), pair(padding), pair(dilation)
    if (kernel, padding, dilation) == ((h, w), (0, 0), (1, 1)):
        return Node("reduce", (n, c, 1, 1), [x], {"axes": (2, 3), "function": kind})
    if max(kernel) > MOST_TAPS:
        return None
    size = []
    for i, k, s, p, d in zip((h, w), kernel, stride, padding, dilation, strict=True):
        span = i + 2 * p - (k - 1) * d - 1
        out = (span + s - 1 if ceil_mode else span) // s + 1
        # A window must start inside the image or the padding before it.
        size.append(out - 1 if ceil_mode and (out - 1) * s >= i + p else out)
    attributes = {"kind": kind, "kernel": kernel, "stride": stride, "padding": padding}
    return Node("window", (n, c, *size), [x], attributes | {"dilation": dilation, "multiplier": 1})


@lowers("adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default")
def _adaptive_avg_pool(x: Node, size: Any) -> Lowered:
    if len(shape_of(x)) != 4:
        return None
    out = pair(size)
    n, c, *_ = shape_of(x)
    if out == (1, 1):
        return Node("reduce", (n, c, 1, 1), [x], {"axes": (2, 3), "function": "mean"})
    return _adaptive(x, out, "mean")


def _adaptive(x: Node, size: tuple[int, int], kind: str) -> Lowered:
    """A pool of windows that are as alike as they can be."""
    n, c, h, w = shape_of(x)
    if (h, w) == size:
        return x
    if 0 in (h, w, *size):
        return None
    if h % size[0] or w % size[1]:
        return Node("resample", (n, c, *size), [x], {"kind": kind})
    kernel = (h // size[0], w // size[1])
    return _pool(kind, x, kernel, kernel, 0, 1, False)


@lowers("adaptive_max_pool2d.default")
def _adaptive_max_pool(x: Node, size: Any) -> Lowered:
    if len(shape_of(x)) != 4:
        return None
    node = _adaptive(x, pair(size), "max")
    return (node,) if isinstance(node, Node) else None


def _of_a_row(pool: Callable[..., Lowered], x: Node, *arguments: Any) -> Lowered:
    """A pool of sequences `[N, C, L]` as one of images of height 1."""
    if len(shape_of(x)) != 3:
        return None
    n, c, length = shape_of(x)
    node = pool(view(x, "reshape", (n, c, 1, length)), *arguments)
    return view(node, "reshape", (n, c, shape_of(node)[3])) if isinstance(node, Node) else None


@lowers("max_pool1d.default")
def _max_pool_1d(
    x: Node,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Lowered:
    window = on_a_row(1, kernel), on_a_row(1, stride or kernel), on_a_row(0, padding)
    return _of_a_row(_max_pool, x, *window, on_a_row(1, dilation), ceil_mode)


@lowers("avg_pool1d.default")
def _avg_pool_1d(
    x: Node,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Lowered:
    window = on_a_row(1, kernel), on_a_row(1, stride or kernel), on_a_row(0, padding)
    return _of_a_row(_avg_pool, x, *window, ceil_mode, count_include_pad)


@lowers("adaptive_avg_pool1d.default")
def _adaptive_avg_pool_1d(x: Node, size: Any) -> Lowered:
    return _of_a_row(_adaptive_avg_pool, x, on_a_row(1, size))


@lowers("adaptive_max_pool1d.default")
def _adaptive_max_pool_1d(x: Node, size: Any) -> Lowered:
    if len(shape_of(x)) != 3:
        return None
    node = _of_a_row(_adaptive, x, on_a_row(1, size), "max")
    return (node,) if isinstance(node, Node) else None


def _reduced(function: str, x: Node, dims: Sequence[int] | None, keepdim: bool = False) -> Node:
    rank = len(shape_of(x))
    axes = tuple(sorted(d % rank for d in dims)) if dims else tuple(range(rank))
    kept = tuple(1 if i in axes else size for i, size in enumerate(shape_of(x)))
    node = Node("reduce", kept, [x], {"axes": axes, "function": function})
    shape = [size for i, size in enumerate(kept) if i not in axes]
    return node if keepdim else view(node, "reshape", shape)


@lowers("mean.dim", "mean.default")
def _mean(
    x: Node, dims: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None
) -> Lowered:
    return _reduced("mean", x, dims, keepdim)


@lowers("amax.default", "max.default")
def _largest(x: Node, dims: Sequence[int] | None = None, keepdim: bool = False) -> Lowered:
    return _reduced("max", x, dims, keepdim)


@lowers("amin.default", "min.default")
def _smallest(x: Node, dims: Sequence[int] | None = None, keepdim: bool = False) -> Lowered:
    negative = ("mul", operand(0), -1.0)
    return elementwise(negative, _reduced("max", elementwise(negative, x), dims, keepdim))


@lowers("max.dim")
def _largest_and_where(x: Node, dim: int, keepdim: bool = False) -> Lowered:
    return (_reduced("max", x, [dim], keepdim),)  # where it is has no kernel


@lowers("min.dim")
def _smallest_and_where(x: Node, dim: int, keepdim: bool = False) -> Lowered:
    node = _smallest(x, [dim], keepdim)
    return (node,) if isinstance(node, Node) else None


@lowers("var.correction")
def _variance(
    x: Node, dims: Sequence[int] | None = None, correction: float | None = 1, keepdim: bool = False
) -> Lowered:
    away = elementwise(("sub", operand(0), operand(1)), x, _reduced("mean", x, dims, True))
    squares = elementwise(("mul", operand(0), operand(0)), away)
    mean = _reduced("mean", squares, dims, keepdim)
    count = math.prod(shape_of(x)) // math.prod(shape_of(mean))
    degrees = count - (1 if correction is None else correction)
    return elementwise(("mul", operand(0), count / degrees), mean) if degrees > 0 else None


@lowers("var.dim")
def _variance_of(
    x: Node, dims: Sequence[int] | None, unbiased: bool = True, keepdim: bool = False
) -> Lowered:
    return _variance(x, dims, int(unbiased), keepdim)


def _deviation(variance: Callable[..., Lowered]) -> Callable[..., Lowered]:
    def lower(*arguments: Any, **named: Any) -> Lowered:
        node = variance(*arguments, **named)
        return elementwise(("sqrt", operand(0)), node) if isinstance(node, Node) else None

    return lower


lowers("std.correction")(_deviation(_variance))
lowers("std.dim")(_deviation(_variance_of))


@lowers("sum.dim_IntList")
def _sum(x: Node, dims: Sequence[int] | None, keepdim: bool = False, dtype: Any = None) -> Lowered:
    return _reduced("sum", x, dims, keepdim)


@lowers("sum.default")
def _sum_of_all(x: Node, dtype: Any = None) -> Lowered:
    return _sum(x, None)


@lowers("linalg_vector_norm.default")
def _norm(
    x: Node, order: float = 2, dims: Any = None, keepdim: bool = False, dtype: Any = None
) -> Lowered:
    if order != 2:
        return None
    axes = [dims] if isinstance(dims, int) else dims
    total = _sum(elementwise(("mul", operand(0), operand(0)), x), axes, keepdim)
    assert isinstance(total, Node)
    return elementwise(("sqrt", operand(0)), total)


@lowers("upsample_linear1d.vec", "upsample_nearest1d.vec")
def _upsample_1d(x: Node, size: Any, *rest: Any) -> Lowered:
    *align, factors = rest
    wide = [1, *size] if size else None
    scales = (1.0, *factors) if factors else None
    return _of_a_row(_upsample, x, wide, *align, scales)


@lowers("upsample_bilinear2d.vec", "upsample_nearest2d.vec")
def _upsample(x: Node, size: Any, *rest: Any) -> Lowered:
    *align, factors = rest
    n, c, h, w = shape_of(x)
    scales = tuple(factors) if factors else (None, None)
    out = size or [math.floor(i * f) for i, f in zip((h, w), factors, strict=True)]
    kind = "bilinear" if align else "nearest"
    attributes = {"kind": kind, "align_corners": bool(align and align[0]), "scales": scales}
    return Node("resample", (n, c, *out), [x], attributes)


@lowers("pad.default")
def _pad_mode(x: Node, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Lowered:
    if mode == "constant":
        return _constant_pad(x, pad, value or 0.0)
    if len(shape_of(x)) == 3:
        return _of_a_row(_pad_mode, x, [*pad, 0, 0], mode)
    if len(shape_of(x)) != 4 or len(pad) != 4 or any(p < 0 for p in pad):
        return None
    n, c, h, w = shape_of(x)
    left, right, top, bottom = pad
    shape = (n, c, top + h + bottom, left + w + right)
    return Node("resample", shape, [x], {"kind": mode, "before": (top, left)})


@lowers("constant_pad_nd.default")
def _constant_pad(x: Node, pad: Sequence[int], value: float = 0.0) -> Lowered:
    if any(p < 0 for p in pad):
        return None
    return padded(x, pad[-2::-2], pad[-1::-2], value)


def padded(x: Node, before: Sequence[int], after: Sequence[int], value: float) -> Node:
    """`value` before and after the last axes; `x` itself if there is none."""
    skipped = [0] * (len(shape_of(x)) - len(before))
    before, after = (*skipped, *before), (*skipped, *after)
    shape = tuple(b + s + a for b, s, a in zip(before, shape_of(x), after, strict=True))
    if shape == x.shape:
        return x
    return Node("pad", shape, [x], {"before": before, "after": after, "value": float(value)})
