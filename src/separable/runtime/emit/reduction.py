"""Reductions: means over pixels, and layer norm, softmax, its logarithm and means along rows.

mean over pixels:                        along rows:
for each task (image × channels):        for each task (a row):
  for each row, for each pixel:            statistics of the row
    sums += pixels (vectors of channels)   output = epilogue(row, statistics)
  output = epilogue(sums / count)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from llvmlite import ir

from ..machine import Machine
from . import expression
from .builder import F32, I32, Builder, Index, Value
from .elementwise import load_strided, store_strided
from .expression import Expression

_VECTORS = 4  # channel vectors summed side by side
_CHAIN = 16  # values added up in one go; rounding errors grow with the root of the length


@dataclass(frozen=True)
class Mean:
    """Means over some axes of dense channels; all strides count floats.

    Attributes:
        kept: sizes of the axes that stay, the last being channels.
        reduced: sizes of the axes that are averaged over.
        x_kept: input strides along the kept axes, 1 along the last.
        x_reduced: input strides along the reduced axes.
        y_strides: output strides along the kept axes.
        extra_strides: per further operand, strides along the kept axes.
        epilogue: of the mean (operand 0) and the extras (1, 2, ...).
    """

    kept: tuple[int, ...]
    reduced: tuple[int, ...]
    x_kept: tuple[int, ...]
    x_reduced: tuple[int, ...]
    y_strides: tuple[int, ...]
    extra_strides: tuple[tuple[int, ...], ...] = ()
    epilogue: Expression = ("x", 0)

    @property
    def macs(self) -> int:
        """None: a mean multiplies no matrix."""
        return 0


@dataclass(frozen=True)
class Rows:
    """Layer norm (without its affine part), softmax, its logarithm, or mean along rows.

    Attributes:
        kind: `"norm"`, `"softmax"`, `"log_softmax"` or `"mean"`.
        sizes: of the axes, the last being the row.
        x_strides: of the input, 1 along the row.
        y_strides: of the output; a mean has one value per row.
        extra_strides: per further operand, its strides.
        epilogue: of the result (operand 0) and the extras (1, 2, ...); `"softmax"` has none.
        eps: added to the variance.
    """

    kind: str
    sizes: tuple[int, ...]
    x_strides: tuple[int, ...]
    y_strides: tuple[int, ...]
    extra_strides: tuple[tuple[int, ...], ...] = ()
    epilogue: Expression = ("x", 0)
    eps: float = 0.0

    @property
    def macs(self) -> int:
        """None: a normalisation multiplies no matrix."""
        return 0


def mean_tasks(mean: Mean, machine: Machine) -> int:
    """One per image and group of channels."""
    return math.prod(mean.kept[:-1]) * -(-mean.kept[-1] // (_VECTORS * machine.width))


def row_tasks(rows: Rows) -> int:
    """One per row."""
    return math.prod(rows.sizes[:-1])


def emit_mean(mean: Mean, machine: Machine) -> str:
    """Generate the kernel; its arguments are input, extras and output."""
    b = Builder(machine, 2 + len(mean.extra_strides))
    x, *extras, y = b.pointers
    channels = mean.kept[-1]
    group = _VECTORS * b.width
    whole = channels // group
    rest = channels - whole * group
    count = math.prod(mean.reduced)

    def vectors(place: list[Index], c: Index, lanes: list[int]) -> None:
        start = b.at(x, b.add(b.dot(place, mean.x_kept[:-1]), c))

        def total(axis: int, pointer: Value) -> list[Value]:
            if axis == len(mean.reduced):
                return [b.load(b.at(pointer, v * b.width), n) for v, n in enumerate(lanes)]

            def turn(i: Index) -> list[Value]:
                return total(axis + 1, b.at(pointer, b.mul(i, mean.x_reduced[axis])))

            return _sum(b, mean.reduced[axis], turn, len(lanes))

        for v, (value, n) in enumerate(zip(total(0, start), lanes, strict=True)):
            at = b.add(c, v * b.width)
            average = b.ir.fdiv(value, b.constant(float(count)))

            def operand(k: int, at: Index = at, n: int = n, average: Value = average) -> Value:
                if k == 0:
                    return average
                strides = mean.extra_strides[k - 1]
                return load_strided(
                    b, b.at(extras[k - 1], b.dot((*place, at), strides)), strides[-1], n
                )

            result = expression.emit(b, mean.epilogue, operand)
            target = b.at(y, b.dot((*place, at), mean.y_strides))
            store_strided(b, result, target, mean.y_strides[-1], n)

    def task(t: Index) -> None:
        *place, part = b.split(t, (*mean.kept[:-1], whole + (rest > 0)))
        full = [b.width] * _VECTORS
        if not rest:
            vectors(place, b.mul(part, group), full)
            return
        tail = [min(b.width, rest - at) for at in range(0, rest, b.width)]
        if not whole:
            vectors(place, 0, tail)
            return
        last = b.ir.icmp_signed("==", b.index(part), b.index(whole))
        with b.ir.if_else(last) as (then, otherwise):
            with then:
                vectors(place, whole * group, tail)
            with otherwise:
                vectors(place, b.mul(part, group), full)

    b.loop(b.begin, b.end, task)
    return b.finish()


def _sum(b: Builder, count: int, turn: Callable[[Index], list[Value]], sums: int) -> list[Value]:
    """Add up the `sums` vectors of `turn(i)` for `0 <= i < count`, as a tree of short sums."""

    def add(totals: Sequence[Value], values: Sequence[Value]) -> list[Value]:
        return [b.ir.fadd(t, v) for t, v in zip(totals, values, strict=True)]

    def total(start: Index, count: int) -> list[Value]:
        zeros = [b.zero()] * sums
        if count <= _CHAIN:
            return b.loop(0, count, lambda i, *t: add(t, turn(b.add(start, i))), zeros)
        block = _CHAIN
        while block * _CHAIN < count:
            block *= _CHAIN
        whole, rest = divmod(count, block)
        totals = b.loop(
            0, whole, lambda k, *t: add(t, total(b.add(start, b.mul(k, block)), block)), zeros
        )
        return add(totals, total(b.add(start, whole * block), rest)) if rest else totals

    return total(0, count)


def emit_rows(rows: Rows, machine: Machine) -> str:
    """Generate the kernel; its arguments are input, extras and output."""
    b = Builder(machine, 2 + len(rows.extra_strides))
    x, *extras, y = b.pointers
    length = rows.sizes[-1]
    whole = length - length % b.width

    def fold(
        pointer: Value,
        kind: str,
        start: float,
        value: Callable[[Value, Index, int], Value] = lambda v, i, n: v,
    ) -> Value:
        """Combine `value(vector, position, lanes)` over the row, into every lane."""

        def combine(a: Value, c: Value) -> Value:
            return b.ir.fadd(a, c) if kind == "add" else b.intrinsic("maximum", a, c)

        def vector(i: Index) -> Value:
            return value(b.load(b.at(pointer, i)), i, b.width)

        if kind == "add":
            (total,) = _sum(b, whole // b.width, lambda i: [vector(b.mul(i, b.width))], 1)
        else:
            (total,) = b.loop(
                0, whole, lambda i, t: [combine(t, vector(i))], [b.constant(start)], step=b.width
            )
        if whole < length:
            n = length - whole
            last = value(b.load(b.at(pointer, whole), n), whole, n)
            used = ir.Constant(
                ir.VectorType(ir.IntType(1), b.width), [lane < n for lane in range(b.width)]
            )
            total = combine(total, b.ir.select(used, last, b.constant(start)))
        distance = b.width // 2
        while distance:
            total = combine(total, b.pick(total, [lane ^ distance for lane in range(b.width)]))
            distance //= 2
        return total

    def each(body: Callable[[Index, int], None]) -> None:
        b.loop(0, whole, lambda i: body(i, b.width), step=b.width)
        if whole < length:
            body(whole, length - whole)

    def row(t: Index) -> None:
        place = b.split(t, rows.sizes[:-1]) if len(rows.sizes) > 1 else []
        source = b.at(x, b.dot(place, rows.x_strides[:-1]))
        target = b.at(y, b.dot(place, rows.y_strides[: len(place)]))

        def finish(value: Value, i: Index, n: int) -> None:
            def operand(k: int) -> Value:
                if k == 0:
                    return value
                strides = rows.extra_strides[k - 1]
                at = b.at(extras[k - 1], b.dot((*place, i), strides))
                return load_strided(b, at, strides[-1], n)

            result = expression.emit(b, rows.epilogue, operand)
            step = rows.y_strides[-1]
            store_strided(b, result, b.at(target, b.mul(i, step)), step, n)

        size = b.constant(float(length))
        if "softmax" in rows.kind:
            largest = fold(source, "max", float("-inf"))

            def power(value: Value, i: Index, n: int) -> Value:
                result = expression.PRIMITIVES["exp"][0](b, b.ir.fsub(value, largest))
                if rows.kind == "softmax":
                    b.store(result, b.at(target, i), n)
                return result

            total = fold(source, "add", 0.0, power)
            if rows.kind == "log_softmax":
                logarithm = expression.PRIMITIVES["log"][0](b, total)

                def logarithmic(i: Index, n: int) -> None:
                    value = b.ir.fsub(b.load(b.at(source, i), n), largest)
                    finish(b.ir.fsub(value, logarithm), i, n)

                each(logarithmic)
                return
            each(
                lambda i, n: b.store(
                    b.ir.fdiv(b.load(b.at(target, i), n), total), b.at(target, i), n
                )
            )
            return
        mean = b.ir.fdiv(fold(source, "add", 0.0), size)
        if rows.kind == "mean":
            finish(mean, 0, 1)
            return

        def square(value: Value, i: Index, n: int) -> Value:
            away = b.ir.fsub(value, mean)
            return b.ir.fmul(away, away)

        variance = b.ir.fdiv(fold(source, "add", 0.0, square), size)
        deviation = b.intrinsic("sqrt", b.ir.fadd(variance, b.constant(rows.eps)))
        scale = b.broadcast(
            b.ir.fdiv(b.constant(1.0, F32), b.ir.extract_element(deviation, I32(0)))
        )

        def normalise(i: Index, n: int) -> None:
            value = b.ir.fmul(b.ir.fsub(b.load(b.at(source, i), n), mean), scale)
            finish(value, i, n)

        each(normalise)

    b.loop(b.begin, b.end, row)
    return b.finish()


def reference_mean(mean: Mean, x: torch.Tensor, extras: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same in plain torch, on flat operands."""
    whole = x.as_strided((*mean.kept, *mean.reduced), (*mean.x_kept, *mean.x_reduced))
    axes = tuple(range(len(mean.kept), len(mean.kept) + len(mean.reduced)))
    views = [
        e.as_strided(mean.kept, strides)
        for e, strides in zip(extras, mean.extra_strides, strict=True)
    ]
    return expression.evaluate(mean.epilogue, [whole.mean(axes), *views])


def reference_rows(rows: Rows, x: torch.Tensor, extras: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same in plain torch, on flat operands."""
    whole = x.as_strided(rows.sizes, rows.x_strides)
    if rows.kind == "softmax":
        return whole.softmax(-1)
    sizes = (*rows.sizes[:-1], 1) if rows.kind == "mean" else rows.sizes
    views = [
        e.as_strided(sizes, strides) for e, strides in zip(extras, rows.extra_strides, strict=True)
    ]
    if rows.kind == "mean":
        return expression.evaluate(rows.epilogue, [whole.mean(-1, keepdim=True), *views])
    if rows.kind == "log_softmax":
        return expression.evaluate(rows.epilogue, [whole.log_softmax(-1), *views])
    normal = torch.nn.functional.layer_norm(whole, rows.sizes[-1:], eps=rows.eps)
    return expression.evaluate(rows.epilogue, [normal, *views])
