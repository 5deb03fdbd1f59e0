"""Elementwise arithmetic over strided memory: maps, copies, and changes of layout.

for each task (rows, or a piece of the only row):
  for each row:
    for each vector of the last axis:
      output = expression(operands)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def tasks(map_: Map) -> int:
    """Tasks of about equal size."""
    if len(map_.sizes) == 1:
        return -(-map_.sizes[0] // _CHUNK)
    return -(-math.prod(map_.sizes[:-1]) // rows_per_task(map_))


def emit(map_: Map, machine: Machine) -> str:
    """Generate the kernel; its arguments are the operands and the output."""
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
            last = b.ir.icmp_signed("==", b.index(t), b.index(tasks(map_) - 1))
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
