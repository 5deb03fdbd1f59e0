"""Where values lie: buffers, views of them, and one arena planned by live ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 16  # floats: one cache line
CHANNELS_LAST = (0, 2, 3, 1)  # the axes of images, from the outermost in memory on


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


@dataclass(frozen=True)
class Form:
    """What an argument or a result looks like: a dense float32 tensor.

    Attributes:
        shape: of the tensor.
        channels_last: whether images lie as in torch's memory format of this name.
    """

    shape: tuple[int, ...]
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.channels_last and len(self.shape) != len(CHANNELS_LAST):
            raise ValueError(f"a tensor of shape {self.shape} cannot lie channels last")

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        """That of a tensor, or of the dense one that torch would copy it to."""
        last = tensor.dim() == len(CHANNELS_LAST) and not tensor.is_contiguous()
        last = last and tensor.is_contiguous(memory_format=torch.channels_last)
        return cls(tuple(tensor.shape), last)

    @property
    def memory_format(self) -> torch.memory_format:
        """Torch's name for where its values lie."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def empty(self, batch: int | None = None) -> torch.Tensor:
        """A tensor of this form, its values undefined, of another batch if it is given."""
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        return torch.empty(
            shape, dtype=torch.float32, device="cpu", memory_format=self.memory_format
        )

    def buffer(self, kind: str, number: int) -> Buffer:
        """One for a tensor of this form."""
        return Buffer(kind, math.prod(self.shape), number)

    def place(self, buffer: Buffer) -> Place:
        """Where its values lie in a buffer of its own."""
        return dense(buffer, self.shape, CHANNELS_LAST if self.channels_last else None)


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
