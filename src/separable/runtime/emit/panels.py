"""Panels: output channels of a convolution that are computed together, and how their weights lie.

    weights: [groups][panels][depth][vectors × width]
    bias:    [groups][vectors × width]

Output channels are filled up with zeros to whole vectors. Tasks can share the panels of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .builder import Builder, Index, Value
from .tiling import vector_panels


@dataclass(frozen=True)
class Panel:
    """Output channels that are computed together.

    Attributes:
        weights: where theirs start.
        bias: where theirs starts.
        channel: the first of them.
        vectors: how many vectors they fill.
        tail: channels in the last vector.
    """

    weights: Value
    bias: Value
    channel: Index
    vectors: int
    tail: int


@dataclass(frozen=True)
class Panels:
    """The output channels of a convolution, cut.

    Attributes:
        groups: of the channels.
        channels: outputs per group.
        depth: products summed per output.
        vectors: most per panel.
        shares: tasks that share the panels of a group.
        width: lanes of a vector.
    """

    groups: int
    channels: int
    depth: int
    vectors: int
    shares: int
    width: int

    @property
    def padded(self) -> int:
        """Outputs per group in whole vectors."""
        return -(-self.channels // self.width) * self.width

    def pack(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lay weights `[groups, depth, channels]` and bias `[groups × channels]` out, both flat."""
        w = F.pad(weight, (0, self.padded - self.channels))
        panels = []
        for first, count, vectors, _ in vector_panels(self.channels, self.width, self.vectors):
            start, lanes = first * self.width, vectors * self.width
            part = w[:, :, start : start + count * lanes]
            part = part.reshape(self.groups, self.depth, count, lanes)
            panels.append(part.transpose(1, 2).reshape(self.groups, -1))
        b = weight.new_zeros(self.groups * self.channels) if bias is None else bias.detach()
        b = F.pad(b.reshape(self.groups, self.channels), (0, self.padded - self.channels))
        return torch.cat(panels, 1).flatten(), b.flatten()

    def each(
        self,
        b: Builder,
        weights: Value,
        bias: Value,
        group: Index,
        share: Index,
        body: Callable[[Panel], None],
    ) -> None:
        """Emit `body` for all panels of a group that belong to one share."""
        weights = b.at(weights, b.mul(group, self.padded * self.depth))
        bias = b.at(bias, b.mul(group, self.padded))

        def run(first: int, count: int, vectors: int, tail: int) -> None:
            def one(p: Index) -> None:
                lane = b.mul(b.add(first, b.mul(p, vectors)), b.width)
                body(
                    Panel(
                        weights=b.at(weights, b.mul(lane, self.depth)),
                        bias=b.at(bias, lane),
                        channel=b.add(b.mul(group, self.channels), lane),
                        vectors=vectors,
                        tail=tail,
                    )
                )

            b.loop(*self._share(b, share, first, count, vectors), one)

        for panels in vector_panels(self.channels, self.width, self.vectors):
            run(*panels)

    def _share(
        self, b: Builder, share: Index, first: int, count: int, vectors: int
    ) -> tuple[Index, Index]:
        """The panels of a run that belong to one share: those whose first vector does."""
        if self.shares == 1:
            return 0, count
        total = self.padded // self.width

        def bound(s: Index) -> Index:
            # ceil((s × total / shares - first) / vectors), clipped to the run
            vector = b.divmod(b.add(b.mul(s, total), self.shares - 1), self.shares)[0]
            ahead = b.maximum(b.add(vector, vectors - 1 - first), 0)
            return b.minimum(b.divmod(ahead, vectors)[0], count)

        return bound(share), bound(b.add(share, 1))
