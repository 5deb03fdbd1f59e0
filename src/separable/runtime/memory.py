"""Where values lie: buffers, views of them, and one arena planned by live ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 16  # floats: one cache line


@dataclass(eq=False)
class Buffer:
    """A run of floats.

    Attributes:
        kind: `"arena"`, `"constant"`, `"input"`, `"output"`, or `"scratch"` for what a thread needs
            within one step.
        size: in floats.
        number: of the argument or result; which one among its kind.
        offset: in floats, from the start of the arena or the constants.
        first: the step that first touches it.
        last: the step that last touches it.
    """

    kind: str
    size: int
    number: int = 0
    offset: int = 0
    first: int = -1
    last: int = -1


@dataclass(frozen=True)
class Place:
    """A strided view of a buffer, in torch's terms."""

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def order(self) -> tuple[int, ...]:
        """The axes from the outermost in memory to the innermost; axes of size 1 go first."""
        return tuple(
            sorted(range(len(self.shape)), key=lambda i: (self.shape[i] > 1, -self.strides[i]))
        )

    def same_strides(self, other: Place) -> bool:
        """Whether both lay the same shape out alike; strides of axes of size 1 do not matter."""
        return self.shape == other.shape and all(
            size == 1 or a == b
            for size, a, b in zip(self.shape, self.strides, other.strides, strict=True)
        )

    def through(self, view: Callable[[torch.Tensor], torch.Tensor]) -> Place:
        """What `view` makes of it; raises `RuntimeError` where strides cannot express that."""
        # Torch's own rules, on a tensor without memory.
        t = torch.empty_strided(self.shape, self.strides, device="meta")
        t = view(t)
        return Place(
            self.buffer, tuple(t.shape), tuple(t.stride()), self.offset + int(t.storage_offset())
        )


def dense(
    buffer: Buffer, shape: Sequence[int], order: Sequence[int] | None = None, pitch: int = 0
) -> Place:
    """All of a buffer, its axes in this order, outermost first; row-major if `None`.

    With a `pitch`, neighbours along the last axis but one are so many floats apart.
    """
    strides = [0] * len(shape)
    step = 1
    for number, axis in enumerate(reversed(order if order is not None else range(len(shape)))):
        strides[axis] = step
        step = pitch if pitch and number == 0 else step * shape[axis]
    return Place(buffer, tuple(shape), tuple(strides))


def aligned(size: int) -> int:
    """`size` rounded up to whole cache lines."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_arena(steps: Iterable[Sequence[Buffer]]) -> int:
    """Give every arena buffer an offset such that those alive together do not overlap.

    Largest first, each at the lowest offset that is free for its whole life.

    Args:
        steps: the buffers that each step touches.

    Returns:
        The size of the arena in floats.
    """
    buffers: dict[Buffer, None] = {}
    for number, touched in enumerate(steps):
        for buffer in touched:
            if buffer.first < 0:
                buffer.first = number
            buffer.last = number
            if buffer.kind == "arena":
                buffers[buffer] = None
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: -b.size):
        rivals = [b for b in placed if b.first <= buffer.last and buffer.first <= b.last]
        buffer.offset = 0
        for rival in sorted(rivals, key=lambda b: b.offset):
            if rival.offset - buffer.offset >= aligned(buffer.size):
                break
            buffer.offset = max(buffer.offset, rival.offset + aligned(rival.size))
        placed.append(buffer)
    return max((b.offset + aligned(b.size) for b in placed), default=0)
