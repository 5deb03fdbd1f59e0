"""Elementwise arithmetic over strided memory: maps, copies, and changes of layout.

for each task (rows, or a piece of the only row):
  for each row:
    for each vector of the last axis:
      output = expression(operands)

A change of layout goes by squares of vectors, transposed in registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from llvmlite import ir

from ..machine import Machine
from . import expression
from .builder import I32, Builder, Index, Value
from .expression import Expression

_CHUNK = 4096  # elements per task, about


@dataclass(frozen=True)
class Map:
    """An expression at every position of an array; all strides count floats.

    Attributes:
        sizes: of the axes, outermost first.
        x_strides: per operand, its strides; 0 where it is broadcast.
        y_strides: strides of the output.
        epilogue: the expression of the operands.
    """

    sizes: tuple[int, ...]
    x_strides: tuple[tuple[int, ...], ...]
    y_strides: tuple[int, ...]
    epilogue: Expression = ("x", 0)

    @property
    def macs(self) -> int:
        """None: a map multiplies no matrix."""
        return 0


def rows_per_task(map_: Map) -> int:
    """Rows of the last axis per task."""
    return max(1, _CHUNK // map_.sizes[-1])


def transposed_axis(map_: Map) -> int | None:
    """The axis along which the only operand is dense, if that is not the last."""
    if len(map_.x_strides) != 1 or map_.y_strides[-1] != 1 or map_.x_strides[0][-1] in (0, 1):
        return None
    axes = [i for i, s in enumerate(map_.x_strides[0][:-1]) if s == 1 and map_.sizes[i] > 1]
    return axes[0] if axes else None


def tasks(map_: Map, machine: Machine) -> int:
    """Tasks of about equal size."""
    axis = transposed_axis(map_)
    if axis is not None:
        squares = -(-map_.sizes[axis] // machine.width)
        return math.prod(map_.sizes[:-1]) // map_.sizes[axis] * squares
    if len(map_.sizes) == 1:
        return -(-map_.sizes[0] // _CHUNK)
    return -(-math.prod(map_.sizes[:-1]) // rows_per_task(map_))


def emit(map_: Map, machine: Machine) -> str:
    """Generate the kernel; its arguments are the operands and the output."""
    axis = transposed_axis(map_)
    if axis is not None:
        return _emit_transposed(map_, axis, machine)
    b = Builder(machine, len(map_.x_strides) + 1)
    *xs, y = b.pointers
    length = map_.sizes[-1]

    def vector(offsets: Sequence[Index], i: Index, count: int) -> None:
        def operand(k: int) -> Value:
            step = map_.x_strides[k][-1]
            return load_strided(b, b.at(xs[k], b.add(offsets[k], b.mul(i, step))), step, count)

        value = expression.emit(b, map_.epilogue, operand)
        step = map_.y_strides[-1]
        store_strided(b, value, b.at(y, b.add(offsets[-1], b.mul(i, step))), step, count)

    def row(offsets: Sequence[Index], start: Index, stop: Index) -> None:
        b.loop(start, stop, lambda i: vector(offsets, i, b.width), step=b.width)

    whole = length - length % b.width

    def piece(t: Index) -> None:
        offsets = [0] * (len(xs) + 1)
        start = b.mul(t, _CHUNK)
        row(offsets, start, b.minimum(b.add(start, _CHUNK), whole))
        if whole < length:
            last = b.ir.icmp_signed("==", b.index(t), b.index(tasks(map_, machine) - 1))
            b.when(last, lambda: vector(offsets, whole, length - whole))

    def rows(t: Index) -> None:
        first = b.mul(t, rows_per_task(map_))
        count = math.prod(map_.sizes[:-1])

        def one(r: Index) -> None:
            place = b.split(r, map_.sizes[:-1])
            offsets = [b.dot(place, s[:-1]) for s in (*map_.x_strides, map_.y_strides)]
            row(offsets, 0, whole)
            if whole < length:
                vector(offsets, whole, length - whole)

        b.loop(first, b.minimum(b.add(first, rows_per_task(map_)), count), one)

    b.loop(b.begin, b.end, piece if len(map_.sizes) == 1 else rows)
    return b.finish()


def _emit_transposed(map_: Map, axis: int, machine: Machine) -> str:
    b = Builder(machine, 2)
    x, y = b.pointers
    x_strides, y_strides = map_.x_strides[0], map_.y_strides
    length, width = map_.sizes[-1], machine.width
    others = [i for i in range(len(map_.sizes) - 1) if i != axis]
    whole, rest = divmod(map_.sizes[axis], width)

    def change(value: Value) -> Value:
        return expression.emit(b, map_.epilogue, lambda _: value)

    def strip(t: Index) -> None:
        *place, number = b.split(t, [*(map_.sizes[i] for i in others), whole + (rest > 0)])
        start = b.mul(number, width)
        source = b.at(x, b.add(b.dot(place, [x_strides[i] for i in others]), start))
        offset = b.mul(start, y_strides[axis])
        target = b.at(y, b.add(b.dot(place, [y_strides[i] for i in others]), offset))

        def squares(columns: int) -> None:
            def one(i: Index, rows: int = width) -> None:
                start = b.at(source, b.mul(i, x_strides[-1]))
                lines = (x_strides[-1], y_strides[axis])
                square(b, start, b.at(target, i), lines, (rows, columns), change)

            last = length - length % width
            b.loop(0, last, one, step=width)
            if last < length:
                one(last, length - last)

        if not rest or not whole:
            squares(rest or width)
            return
        at_end = b.ir.icmp_signed("==", b.index(number), b.index(whole))
        with b.ir.if_else(at_end) as (then, otherwise):
            with then:
                squares(rest)
            with otherwise:
                squares(width)

    b.loop(b.begin, b.end, strip)
    return b.finish()


def square(
    b: Builder,
    source: Value,
    target: Value,
    lines: tuple[int, int],
    size: tuple[int, int],
    change: Callable[[Value], Value] = lambda value: value,
) -> None:
    """Copy lines to columns.

    Args:
        b: the kernel that does.
        source: the first line.
        target: where the first column begins.
        lines: floats from one line to the next, in the source and in the target.
        size: lines, and floats per line; no more than a vector of each.
        change: made to every vector on its way.
    """
    count, length = size
    vectors = [b.load(b.at(source, 0, k * lines[0]), length) for k in range(count)]
    vectors = _transpose(b, vectors + [b.zero()] * (b.width - count))
    for k in range(length):
        b.store(change(vectors[k]), b.at(target, 0, k * lines[1]), count)


def _transpose(b: Builder, rows: list[Value]) -> list[Value]:
    """Lane `j` of vector `i` becomes lane `i` of vector `j`: swaps in squares of 1, 2, 4, ..."""
    lanes = range(b.width)
    distance = 1
    while distance < b.width:
        low = [i if not i & distance else b.width + i - distance for i in lanes]
        high = [i + distance if not i & distance else b.width + i for i in lanes]
        swapped = list(rows)
        for i in lanes:
            if i & distance:
                continue
            for at, mask in ((i, low), (i + distance, high)):
                constant = ir.Constant(ir.VectorType(I32, b.width), mask)
                swapped[at] = b.ir.shuffle_vector(rows[i], rows[i + distance], constant)
        rows = swapped
        distance *= 2
    return rows


def load_strided(b: Builder, pointer: Value, step: int, count: int) -> Value:
    """Load `count` floats that lie `step` apart; one float in every lane if `step` is 0."""
    if step == 0:
        return b.broadcast(b.load_scalar(pointer))
    if step == 1:
        return b.load(pointer, count)
    value = b.zero()
    for lane in range(count):
        value = b.ir.insert_element(value, b.load_scalar(b.at(pointer, lane * step)), I32(lane))
    return value


def store_strided(b: Builder, value: Value, pointer: Value, step: int, count: int) -> None:
    """Store the first `count` lanes `step` floats apart."""
    if step == 1:
        b.store(value, pointer, count)
        return
    for lane in range(count):
        single: ir.Value = b.ir.extract_element(value, I32(lane))
        b.ir.store(single, b.at(pointer, lane * step), align=4)


def reference(map_: Map, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same in plain torch, on flat operands."""
    views = [
        x.as_strided(map_.sizes, strides)
        for x, strides in zip(operands, map_.x_strides, strict=True)
    ]
    return expression.evaluate(map_.epilogue, views).expand(map_.sizes)
