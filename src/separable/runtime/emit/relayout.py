"""Images from rows of pixels per channel to channels last, or back: how chains begin and end.

for each task (a row, or a pixel where neighbouring rows are one longer row):
  for each vector of channels, for each vector of pixels:
    a square, transposed in registers

Where channels or pixels fill no whole vectors, the last square overlaps the one before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..machine import Machine
from .builder import Builder, Index, Value
from .elementwise import Map, square, transposed_axis

_MOST_ROWS, _LEAST_PIXELS = 64, 16  # of rows that pixels are cut into


@dataclass(frozen=True)
class Relayout:
    """A copy of images; on one side channels are neighbours, on the other the pixels of a row.

    Attributes:
        batch: images.
        size: (height, width).
        channels: of input and output.
        x_strides: input strides along (N, H, W, C).
        y_strides: output strides along (N, H, W, C).
    """

    batch: int
    size: tuple[int, int]
    channels: int
    x_strides: tuple[int, ...]
    y_strides: tuple[int, ...]

    # To a chain, it is a filter of one tap.
    kernel: ClassVar[tuple[int, int]] = (1, 1)
    stride: ClassVar[tuple[int, int]] = (1, 1)
    padding: ClassVar[tuple[int, int]] = (0, 0)
    dilation: ClassVar[tuple[int, int]] = (1, 1)
    extra_strides: ClassVar[tuple[tuple[int, ...], ...]] = ()

    @property
    def in_size(self) -> tuple[int, int]:
        """Input (height, width)."""
        return self.size

    @property
    def macs(self) -> int:
        """None: a copy multiplies nothing."""
        return 0

    @property
    def gathers(self) -> bool:
        """Whether channels become neighbours; otherwise pixels do."""
        return self.x_strides[2] == self.y_strides[3] == 1


def rows(map_: Map, gathers: bool) -> tuple[int, tuple[int, int]]:
    """Batch, height and width of what a copy copies; its pixels are cut into rows if need be."""
    *outer, pixels = (map_.sizes[i] for i in _pixel_axes(map_, gathers))
    if len(outer) > 1:
        return outer[0], (outer[1], pixels)
    most = max(1, min(_MOST_ROWS, pixels // _LEAST_PIXELS))
    height = next(rows for rows in range(most, 0, -1) if pixels % rows == 0)
    return math.prod(outer), (height, pixels // height)


def of_map(map_: Map, batch: int, size: tuple[int, int], gathers: bool) -> Relayout | None:
    """What a copy does to images of this batch, height and width; `None` if it does something else.

    Args:
        map_: which walks pixels outermost first and has a `transposed_axis`.
        batch: images.
        size: (height, width).
        gathers: whether channels become neighbours.
    """
    axes = _pixel_axes(map_, gathers)
    (channel,) = {*range(len(map_.sizes))} - {*axes}
    walks = []
    for strides in (map_.x_strides[0], map_.y_strides):
        merged = [(map_.sizes[i], strides[i]) for i in axes]
        walk = _spread(merged, (batch, *size))
        if walk is None:
            return None
        walks.append((*walk, strides[channel]))
    result = Relayout(batch, size, map_.sizes[channel], *walks)
    return result if result.gathers == gathers and is_square(result) else None


def _pixel_axes(map_: Map, gathers: bool) -> list[int]:
    channel = len(map_.sizes) - 1 if gathers else transposed_axis(map_)
    return [i for i in range(len(map_.sizes)) if i != channel]


def _spread(merged: list[tuple[int, int]], sizes: Sequence[int]) -> list[int] | None:
    """Strides along axes of these sizes, which neighbours among have been merged."""
    strides: list[int] = []
    left = list(merged)
    for size in reversed(sizes):
        while len(left) > 1 and left[-1][0] == 1 < size:
            left.pop()
        length, stride = left.pop()
        if length % size:
            return None
        strides.insert(0, stride)
        left.append((length // size, size * stride))
    return strides if all(length == 1 for length, _ in left) else None


def is_square(relayout: Relayout) -> bool:
    """Whether pixels are neighbours on one side and channels on the other."""
    return relayout.gathers or relayout.x_strides[3] == relayout.y_strides[2] == 1


def tasks(relayout: Relayout) -> int:
    """One per row."""
    return relayout.batch * relayout.size[0]


def emit(relayout: Relayout, machine: Machine) -> str:
    """Generate the kernel; its arguments are input and output."""
    b = Builder(machine, 2)
    define(relayout, b)
    return b.finish()


def define(relayout: Relayout, b: Builder, by_pixel: bool = False) -> None:
    """Write the kernel into `b`.

    Args:
        relayout: the copy.
        b: a function with the kernel's arguments.
        by_pixel: let each pixel be a task, of one image whose rows are one longer row. Whole rows
            must be run at once.
    """
    x, y = b.pointers
    if by_pixel:
        _copy(relayout, b, x, y, b.begin, b.end)
        return

    def row(task: Index) -> None:
        place = b.split(task, (relayout.batch, relayout.size[0]))
        source = b.at(x, b.dot(place, relayout.x_strides[:2]))
        target = b.at(y, b.dot(place, relayout.y_strides[:2]))
        _copy(relayout, b, source, target, 0, relayout.size[1])

    b.loop(b.begin, b.end, row)


def _copy(relayout: Relayout, b: Builder, x: Value, y: Value, begin: Index, end: Index) -> None:
    """Copy the pixels `begin <= p < end`, whole rows of them."""
    (*_, x_pixel, x_channel), (*_, y_pixel, y_channel) = relayout.x_strides, relayout.y_strides
    width, channels = relayout.size[1], relayout.channels

    def block(channel: Index, lanes: int, pixel: Index, count: int) -> None:
        source = b.at(x, b.dot((pixel, channel), (x_pixel, x_channel)))
        target = b.at(y, b.dot((pixel, channel), (y_pixel, y_channel)))
        if relayout.gathers:
            square(b, source, target, (x_channel, y_pixel), (lanes, count))
        else:
            square(b, source, target, (x_pixel, y_channel), (count, lanes))

    def strip(channel: Index, lanes: int) -> None:
        def whole() -> None:
            _each_vector(b, begin, end, lambda pixel: block(channel, lanes, pixel, b.width))

        def narrow() -> None:
            b.loop(begin, end, lambda pixel: block(channel, lanes, pixel, width), step=width)

        if width >= b.width:
            whole()
        elif isinstance(begin, int) and isinstance(end, int):
            narrow()
        else:
            enough = b.ir.icmp_signed(">=", b.index(b.add(end, b.mul(begin, -1))), b.index(b.width))
            with b.ir.if_else(enough) as (then, otherwise):
                with then:
                    whole()
                with otherwise:
                    narrow()

    if channels < b.width:
        strip(0, channels)
    else:
        _each_vector(b, 0, channels, lambda channel: strip(channel, b.width))


def _each_vector(b: Builder, begin: Index, end: Index, body: Callable[[Index], None]) -> None:
    """Emit `body` for the start of each vector; the last one ends with `end`."""
    count = b.divmod(b.add(b.add(end, b.mul(begin, -1)), b.width - 1), b.width)[0]

    def vector(number: Index) -> None:
        body(b.minimum(b.add(begin, b.mul(number, b.width)), b.add(end, -b.width)))

    b.loop(0, count, vector)
