"""Where the values of a graph lie: in buffers of their own, parts of others, or at their caller."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..emit.tiling import pitch
from ..graph import Graph, Node, Recipe
from ..memory import CHANNELS_LAST, Buffer, Place, dense


def channels_last(rank: int) -> tuple[int, ...]:
    """The axes of a tensor from the outermost in memory on, as kernels like them best."""
    return CHANNELS_LAST if rank == len(CHANNELS_LAST) else tuple(range(rank))


class Memory:
    """Buffers for the values of a graph.

    Attributes:
        places: where each value lies.
        constants: buffers of packed weights and the recipes that fill them.
        outputs: by number, the results that are written where the caller looks.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.users = graph, graph.users()
        self.places: dict[Node, Place] = {}
        self.constants: list[tuple[Buffer, Recipe]] = []
        self.outputs: dict[int, Buffer] = {}

    def place(self, node: Node) -> Place:
        """Where the result of a node lies; constants are packed on first use."""
        if node not in self.places:
            assert node.kind == "constant"
            assert node.shape is not None
            buffer = self.constant(math.prod(node.shape), node.attributes["recipe"])
            self.places[node] = dense(buffer, node.shape)
        return self.places[node]

    def constant(self, size: int, recipe: Recipe) -> Buffer:
        """A buffer for what `recipe` computes."""
        buffer = Buffer("constant", size, len(self.constants))
        self.constants.append((buffer, recipe))
        return buffer

    def allocate(self, node: Node, order: Sequence[int]) -> Place:
        """Memory for the result of `node`, its axes in this order, outermost first."""
        assert node.shape is not None
        users = self.users.get(node, [])
        place = dense(Buffer("arena", math.prod(node.shape)), node.shape, order)
        number = self.graph.outputs.index(node) if None in users else -1
        form = self.graph.results[number] if number >= 0 else None
        returned = form is not None and place.same_strides(form.place(place.buffer))
        if place.same_strides(dense(place.buffer, node.shape, channels_last(len(node.shape)))):
            for user in users:
                if user is not None and user.kind == "cat" and user.inputs.count(node) == 1:
                    part = self.part(user, user.inputs.index(node))
                    if part.strides[order[-1]] == 1:
                        self.places[node] = part
                        return part
            if len(node.shape) == 4 and not returned:
                place = self.image(node.shape)
        if returned:
            place.buffer.kind, place.buffer.number = "output", number
            self.outputs[number] = place.buffer
        self.places[node] = place
        return place

    def image(self, shape: Sequence[int]) -> Place:
        """Memory for images, channels last, whose pixels do not compete for cache lines."""
        n, c, h, w = shape
        step = pitch(c) if h * w > 1 else c
        return dense(Buffer("arena", n * h * w * step), shape, CHANNELS_LAST, step)

    def part(self, cat: Node, number: int) -> Place:
        """The slice of a concatenation that one of its inputs fills."""
        assert cat.shape is not None
        if cat not in self.places:
            self.allocate(cat, channels_last(len(cat.shape)))
        sizes = [(source.shape or ())[cat.attributes["axis"]] for source in cat.inputs]
        start = sum(sizes[:number])
        axis = cat.attributes["axis"]
        return self.places[cat].through(lambda t: t.narrow(axis, start, sizes[number]))
