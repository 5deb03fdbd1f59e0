"""Reductions: means and maxima over pixels or along rows; layer norm and softmax of rows.

over pixels:                             along rows:
for each task (image × channels):        for each task (a row):
  for each row, for each pixel:            statistics of the row
    totals += pixels (of channels)         output = epilogue(row, statistics)
  output = epilogue(totals / count)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir

from ..machine import Machine
from . import expression
from .builder import F32, I32, Builder, Index, Value
from .elementwise import load_strided, store_strided
from .expression import Expression

_VECTORS = 4  # channel vectors summed side by side
REDUCTIONS = ("mean", "sum", "max")  # of which one value is left
SOFTMAXES = ("softmax", "safe_softmax")
_CHAIN = 16  # values added up in one go; rounding errors grow with the root of the length


@dataclass(frozen=True)
class Columns:
    """Means or maxima over some axes of dense channels; all strides count floats.

    Attributes:
        kind: `"mean"`, `"sum"` or `"max"`.
        kept: sizes of the axes that stay, the last being channels.
        reduced: sizes of the axes that go.
        x_kept: input strides along the kept axes, 1 along the last.
        x_reduced: input strides along the reduced axes.
        y_strides: output strides along the kept axes.
        extra_strides: per further operand, strides along the kept axes.
        epilogue: of the result (operand 0) and the extras (1, 2, ...).
    """

    kind: str
    kept: tuple[int, ...]
    reduced: tuple[int, ...]
    x_kept: tuple[int, ...]
    x_reduced: tuple[int, ...]
    y_strides: tuple[int, ...]
    extra_strides: tuple[tuple[int, ...], ...] = ()
    epilogue: Expression = ("x", 0)

    @property
    def macs(self) -> int:
        """None: a reduction multiplies no matrix."""
        return 0


@dataclass(frozen=True)
class Rows:
    """Layer norm (without its affine part), softmax, its logarithm, mean or maximum of rows.

    Attributes:
        kind: `"norm"`, `"softmax"`, `"log_softmax"`, `"mean"`, `"sum"`, `"max"`, or
            `"safe_softmax"`, of which rows of nothing but -inf are 0, as attention has it.
        sizes: of the axes, the last being the row.
        x_strides: of the input, 1 along the row.
        y_strides: of the output; means and maxima have one value per row.
        extra_strides: per further operand, its strides.
        epilogue: of the result (operand 0) and the extras (1, 2, ...); softmaxes have none.
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


def column_tasks(columns: Columns, machine: Machine) -> int:
    """One per image and group of channels."""
    return math.prod(columns.kept[:-1]) * -(-columns.kept[-1] // (_VECTORS * machine.width))


def row_tasks(rows: Rows) -> int:
    """One per row."""
    return math.prod(rows.sizes[:-1])


def emit_columns(columns: Columns, machine: Machine) -> str:
    """Generate the kernel; its arguments are input, extras and output."""
    b = Builder(machine, 2 + len(columns.extra_strides))
    x, *extras, y = b.pointers
    channels = columns.kept[-1]
    group = _VECTORS * b.width
    whole = channels // group
    rest = channels - whole * group
    count = math.prod(columns.reduced)
    how = "max" if columns.kind == "max" else "add"

    def vectors(place: list[Index], c: Index, lanes: list[int]) -> None:
        start = b.at(x, b.add(b.dot(place, columns.x_kept[:-1]), c))

        def total(axis: int, pointer: Value) -> list[Value]:
            if axis == len(columns.reduced):
                return [b.load(b.at(pointer, v * b.width), n) for v, n in enumerate(lanes)]

            def turn(i: Index) -> list[Value]:
                return total(axis + 1, b.at(pointer, b.mul(i, columns.x_reduced[axis])))

            return _fold(b, how, columns.reduced[axis], turn, len(lanes))

        for v, (value, n) in enumerate(zip(total(0, start), lanes, strict=True)):
            at = b.add(c, v * b.width)
            result = b.ir.fdiv(value, b.constant(float(count))) if columns.kind == "mean" else value

            def operand(k: int, at: Index = at, n: int = n, result: Value = result) -> Value:
                if k == 0:
                    return result
                strides = columns.extra_strides[k - 1]
                return load_strided(
                    b, b.at(extras[k - 1], b.dot((*place, at), strides)), strides[-1], n
                )

            final = expression.emit(b, columns.epilogue, operand)
            target = b.at(y, b.dot((*place, at), columns.y_strides))
            store_strided(b, final, target, columns.y_strides[-1], n)

    def task(t: Index) -> None:
        *place, part = b.split(t, (*columns.kept[:-1], whole + (rest > 0)))
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


_START = {"add": 0.0, "max": -math.inf}


def _join(b: Builder, how: str, x: Value, y: Value) -> Value:
    return expression.PRIMITIVES[how][0](b, x, y)


def _fold(
    b: Builder, how: str, count: int, turn: Callable[[Index], list[Value]], vectors: int
) -> list[Value]:
    """Join the `vectors` of `turn(i)` for `0 <= i < count`, as a tree of short sums or maxima."""

    def join(totals: Sequence[Value], values: Sequence[Value]) -> list[Value]:
        return [_join(b, how, t, v) for t, v in zip(totals, values, strict=True)]

    def total(start: Index, count: int) -> list[Value]:
        before = [b.constant(_START[how])] * vectors
        if count <= _CHAIN:
            return b.loop(0, count, lambda i, *t: join(t, turn(b.add(start, i))), before)
        block = _CHAIN
        while block * _CHAIN < count:
            block *= _CHAIN
        whole, rest = divmod(count, block)
        totals = b.loop(
            0, whole, lambda k, *t: join(t, total(b.add(start, b.mul(k, block)), block)), before
        )
        return join(totals, total(b.add(start, whole * block), rest)) if rest else totals

    return total(0, count)


def emit_rows(rows: Rows, machine: Machine) -> str:
    """Generate the kernel; its arguments are input, extras and output."""
    b = Builder(machine, 2 + len(rows.extra_strides))
    x, *extras, y = b.pointers
    length = rows.sizes[-1]
    whole = length - length % b.width

    def fold(
        pointer: Value,
        how: str,
        value: Callable[[Value, Index, int], Value] = lambda v, i, n: v,
    ) -> Value:
        """Join `value(vector, position, lanes)` over the row, into every lane."""

        def vector(i: Index) -> Value:
            return value(b.load(b.at(pointer, i)), i, b.width)

        (total,) = _fold(b, how, whole // b.width, lambda i: [vector(b.mul(i, b.width))], 1)
        if whole < length:
            n = length - whole
            last = value(b.load(b.at(pointer, whole), n), whole, n)
            used = ir.Constant(
                ir.VectorType(ir.IntType(1), b.width), [lane < n for lane in range(b.width)]
            )
            total = _join(b, how, total, b.ir.select(used, last, b.constant(_START[how])))
        distance = b.width // 2
        while distance:
            other = b.pick(total, [lane ^ distance for lane in range(b.width)])
            total = _join(b, how, total, other)
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
        if rows.kind in (*SOFTMAXES, "log_softmax"):
            largest = fold(source, "max")
            if rows.kind == "safe_softmax":  # finite, so that powers of -inf are 0
                largest = _join(b, "max", largest, b.constant(torch.finfo(torch.float32).min))

            def power(value: Value, i: Index, n: int) -> Value:
                result = expression.PRIMITIVES["exp"][0](b, b.ir.fsub(value, largest))
                if rows.kind in SOFTMAXES:
                    b.store(result, b.at(target, i), n)
                return result

            total = fold(source, "add", power)
            if rows.kind == "log_softmax":
                logarithm = expression.PRIMITIVES["log"][0](b, total)

                def logarithmic(i: Index, n: int) -> None:
                    value = b.ir.fsub(b.load(b.at(source, i), n), largest)
                    finish(b.ir.fsub(value, logarithm), i, n)

                each(logarithmic)
                return
            if rows.kind == "safe_softmax":  # others add up to 1 or more
                total = _join(b, "max", total, b.constant(torch.finfo(torch.float32).tiny))
            each(
                lambda i, n: b.store(
                    b.ir.fdiv(b.load(b.at(target, i), n), total), b.at(target, i), n
                )
            )
            return
        if rows.kind == "max":
            finish(fold(source, "max"), 0, 1)
            return
        total = fold(source, "add")
        if rows.kind == "sum":
            finish(total, 0, 1)
            return
        mean = b.ir.fdiv(total, size)
        if rows.kind == "mean":
            finish(mean, 0, 1)
            return

        def square(value: Value, i: Index, n: int) -> Value:
            away = b.ir.fsub(value, mean)
            return b.ir.fmul(away, away)

        variance = b.ir.fdiv(fold(source, "add", square), size)
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


def reference_columns(
    columns: Columns, x: torch.Tensor, extras: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The same in plain torch, on flat operands."""
    whole = x.as_strided((*columns.kept, *columns.reduced), (*columns.x_kept, *columns.x_reduced))
    axes = tuple(range(len(columns.kept), len(columns.kept) + len(columns.reduced)))
    views = [
        e.as_strided(columns.kept, strides)
        for e, strides in zip(extras, columns.extra_strides, strict=True)
    ]
    return expression.evaluate(columns.epilogue, [_reduced(columns.kind, whole, axes), *views])


def _reduced(
    kind: str, x: torch.Tensor, axes: Sequence[int], keepdim: bool = False
) -> torch.Tensor:
    functions: dict[str, Any] = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}
    result: torch.Tensor = functions[kind](x, tuple(axes), keepdim)
    return result


def reference_rows(rows: Rows, x: torch.Tensor, extras: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same in plain torch, on flat operands."""
    whole = x.as_strided(rows.sizes, rows.x_strides)
    if rows.kind in SOFTMAXES:
        result = whole.softmax(-1)
        hidden = (whole == -math.inf).all(-1, keepdim=True)
        return result.masked_fill(hidden, 0) if rows.kind == "safe_softmax" else result
    sizes = (*rows.sizes[:-1], 1) if rows.kind in REDUCTIONS else rows.sizes
    views = [
        e.as_strided(sizes, strides) for e, strides in zip(extras, rows.extra_strides, strict=True)
    ]
    if rows.kind in REDUCTIONS:
        return expression.evaluate(rows.epilogue, [_reduced(rows.kind, whole, (-1,), True), *views])
    if rows.kind == "log_softmax":
        return expression.evaluate(rows.epilogue, [whole.log_softmax(-1), *views])
    normal = torch.nn.functional.layer_norm(whole, rows.sizes[-1:], eps=rows.eps)
    return expression.evaluate(rows.epilogue, [normal, *views])
