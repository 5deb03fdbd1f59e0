"""Cutting an axis into blocks that fit the registers, borders apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .builder import Builder, Index

LINE = 16  # floats
PAGE = 1024  # floats: pixels this far apart compete for the same cache lines


def pitch(channels: int) -> int:
    """Floats from one pixel of an image to the next, no multiple of half a page."""
    return channels + LINE * (channels % (PAGE // 2) == 0)


@dataclass(frozen=True)
class Run:
    """Equal blocks in a row.

    Attributes:
        first: number of the first block.
        count: how many blocks.
        start: the output position where the first block starts.
        size: positions per block.
        taps: per tap of the kernel, the positions `low <= i < high` of a block whose input is
            inside the image.
    """

    first: int
    count: int
    start: int
    size: int
    taps: tuple[tuple[int, int], ...]

    @property
    def inside(self) -> bool:
        """Whether every tap of every position is inside the image."""
        return all(tap == (0, self.size) for tap in self.taps)


def even_sizes(length: int, size: int) -> list[int]:
    """Cut `length` into the fewest pieces of at most `size`, as equal as can be."""
    pieces = -(-length // size)
    low, larger = divmod(length, pieces)
    return [low + 1] * larger + [low] * (pieces - larger)


class _Sliding(Protocol):
    """What a convolution or pool says of its filter, along (height, width)."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def in_size(self) -> tuple[int, int]: ...
    @property
    def kernel(self) -> tuple[int, int]: ...
    @property
    def stride(self) -> tuple[int, int]: ...
    @property
    def padding(self) -> tuple[int, int]: ...
    @property
    def dilation(self) -> tuple[int, int]: ...


def window_runs(does: _Sliding, most: int) -> list[Run]:
    """Cut a row of outputs into blocks of `most` positions or less, and group equal neighbours."""
    stride, dilation, padding = does.stride[1], does.dilation[1], does.padding[1]
    runs: list[Run] = []
    start = 0
    for number, block in enumerate(even_sizes(does.size[1], most)):
        taps = tuple(
            _valid(start, block, stride, tap * dilation - padding, does.in_size[1])
            for tap in range(does.kernel[1])
        )
        last = runs[-1] if runs else None
        if last and (last.size, last.taps) == (block, taps):
            runs[-1] = Run(last.first, last.count + 1, last.start, block, taps)
        else:
            runs.append(Run(number, 1, start, block, taps))
        start += block
    return runs


def taps_inside(b: Builder, top: Index, does: _Sliding) -> tuple[Index, Index]:
    """The taps `low <= ky < high` of a column whose input rows, from `top` on, are in the image."""
    kernel, d, inside = does.kernel[0], does.dilation[0], does.in_size[0]
    reach = (does.size[0] - 1) * does.stride[0] + (kernel - 1) * d
    if does.padding[0] == 0 and reach < inside:
        return 0, kernel
    low = b.divmod(b.maximum(b.add(b.mul(top, -1), d - 1), 0), d)[0]
    room = b.add(b.mul(top, -1), inside + d - 1)
    return low, b.minimum(b.divmod(b.maximum(room, 0), d)[0], kernel)


def surroundings(does: _Sliding) -> tuple[int, int, int, int]:
    """Padding for `torch.nn.functional.pad`, behind the image as much as the last window needs."""
    h, w = (
        (does.size[i] - 1) * does.stride[i]
        + (does.kernel[i] - 1) * does.dilation[i]
        + 1
        - does.in_size[i]
        - does.padding[i]
        for i in range(2)
    )
    return (does.padding[1], w, does.padding[0], h)


def _valid(start: int, size: int, stride: int, shift: int, inside: int) -> tuple[int, int]:
    good = [i for i in range(size) if 0 <= (start + i) * stride + shift < inside]
    return (good[0], good[-1] + 1) if good else (0, 0)


def vector_panels(channels: int, width: int, vectors: int) -> list[tuple[int, int, int, int]]:
    """Cut channels into panels of vectors and group equal neighbours.

    Returns:
        Runs of panels `(first vector, panels, vectors per panel, channels in the last vector)`.
    """
    total = -(-channels // width)
    rest = channels - (total - 1) * width
    runs: list[tuple[int, int, int, int]] = []
    start = 0
    sizes = even_sizes(total, vectors)
    for number, size in enumerate(sizes):
        tail = rest if number == len(sizes) - 1 else width
        if runs and runs[-1][2:] == (size, tail):
            first, count, *_ = runs[-1]
            runs[-1] = (first, count + 1, size, tail)
        else:
            runs.append((start, 1, size, tail))
        start += size
    return runs


def merge_axes(
    sizes: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """Join neighbouring axes that every operand walks in one stride.

    Args:
        sizes: of the axes, outermost first.
        strides: per operand, its stride along each axis.

    Returns:
        The sizes and, per operand, the strides of the joined axes; axes of size 1 are dropped.
    """
    axes = [i for i, size in enumerate(sizes) if size != 1]
    joined: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis in axes:
        current = [operand[axis] for operand in strides]
        if joined and all(
            step[-1] == now * sizes[axis] for step, now in zip(steps, current, strict=True)
        ):
            joined[-1] *= sizes[axis]
            for step, now in zip(steps, current, strict=True):
                step[-1] = now
        else:
            joined.append(sizes[axis])
            for step, now in zip(steps, current, strict=True):
                step.append(now)
    return joined, steps
