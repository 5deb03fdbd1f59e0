"""The walk over a graph, its memory, and what every kind of node needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..emit.elementwise import Map
from ..emit.expression import Expression, operand
from ..emit.kernel import Description, Kernel
from ..emit.tiling import merge_axes
from ..graph import Graph, Node
from ..machine import Machine
from ..memory import CHANNELS_LAST, Buffer, Place, dense
from ..steps import Schedule, Step
from .fusing import fuse_chains
from .placing import Memory
from .tiles import choose_tile


def schedule(graph: Graph, machine: Machine, threads: int, fuse: bool = True) -> Schedule:
    """Choose memory and kernels for every node.

    Args:
        graph: what to compute.
        machine: the CPU it runs on.
        threads: of one call.
        fuse: join convolutions into chains where that is estimated to be faster.
    """
    result = Scheduler(graph, machine, threads).run()
    if fuse:
        result.steps = fuse_chains(result.steps, machine, threads)
    return result


class Scheduler:
    """What is scheduled so far, and the copies and operands that every kind of node needs."""

    def __init__(self, graph: Graph, machine: Machine, threads: int) -> None:
        self.graph, self.machine, self.threads = graph, machine, threads
        self.memory = Memory(graph)
        self.steps: list[Step] = []

    def run(self) -> Schedule:
        """Schedule the graph."""
        inputs: list[Buffer | None] = []
        arguments = zip(self.graph.inputs, self.graph.expected, strict=True)
        for number, (node, form) in enumerate(arguments):
            inputs.append(None)
            if form is not None:
                buffer = inputs[-1] = form.buffer("input", number)
                self.memory.places[node] = form.place(buffer)
        for node in self.graph.nodes:
            SCHEDULES[node.kind](self, node)
        outputs: list[Buffer | Node] = []
        results = zip(self.graph.outputs, self.graph.results, strict=True)
        for number, (node, form) in enumerate(results):
            if form is None:
                outputs.append(node)
                continue
            if number not in self.memory.outputs:
                result = form.buffer("output", number)
                self.copy(self.memory.place(node), form.place(result), node)
                self.memory.outputs[number] = result
            outputs.append(self.memory.outputs[number])
        return Schedule(
            self.steps,
            self.memory.constants,
            self.graph.inputs,
            inputs,
            outputs,
            self.graph.expected,
            self.graph.results,
        )

    # -- copies and operands ---------------------------------------------------------------------

    def copy(self, source: Place, target: Place, node: Node | None = None) -> Place:
        """Emit a copy between layouts."""
        axes = sorted(range(len(target.shape)), key=lambda i: -target.strides[i])
        self.map([source], target, axes, operand(0), node)
        return target

    def relaid(self, place: Place, order: Sequence[int]) -> Place:
        """A copy with its axes in this order."""
        fresh = dense(Buffer("arena", math.prod(place.shape)), place.shape, order)
        return self.copy(place, fresh)

    def lanes(self, place: Place, axis: int) -> Place:
        """The same with neighbours along `axis`, copied if need be."""
        if place.strides[axis] == 1 or place.shape[axis] == 1:
            return place
        order = [i for i in range(len(place.shape)) if i != axis]
        return self.relaid(place, [*order, axis % len(place.shape)])

    def extras(self, node: Node, axis: int) -> list[Place]:
        """The operands of the epilogue, broadcast, in strides of 0 or 1 along `axis`."""
        assert node.shape is not None
        shape = node.shape
        places = []
        for source in node.inputs[len(node.inputs) - node.extras :]:
            place = self.memory.place(source).through(lambda t: t.expand(shape))
            if shape[axis] == 1:  # whatever its stride
                place = place.through(lambda t: t.squeeze(axis).unsqueeze(-1).movedim(-1, axis))
            elif place.strides[axis] not in (0, 1):
                small = self.memory.place(source)
                missing = len(shape) - len(small.shape)
                place = self.lanes(small, axis - missing).through(lambda t: t.expand(shape))
            places.append(place)
        return places

    def images(self, node: Node) -> tuple[Place, list[Place], Place, dict[str, Any]]:
        """For kernels from images to images: input, extras, output, and what describes them."""
        assert node.shape is not None
        x = self.lanes(self.memory.place(node.inputs[0]), 1)
        extras = self.extras(node, 1)
        y = self.memory.allocate(node, CHANNELS_LAST)
        sizes = {
            "batch": node.shape[0],
            "size": node.shape[2:],
            "in_size": x.shape[2:],
            "channels": x.shape[1],
            "x_strides": _image_strides(x),
            "y_strides": _image_strides(y),
            "extra_strides": tuple((*_image_strides(e), e.strides[1]) for e in extras),
            "epilogue": node.epilogue,
        }
        return x, extras, y, sizes

    def step(
        self, node: Node | None, does: Description, places: Sequence[Place | tuple[Buffer, int]]
    ) -> None:
        """Append a kernel launch."""
        tile = choose_tile(does, self.machine, self.threads)
        arguments = [(p.buffer, p.offset) if isinstance(p, Place) else p for p in places]
        self.steps.append(Step(node, arguments, Kernel(does, self.machine, tile)))

    def map(
        self,
        sources: Sequence[Place],
        y: Place,
        order: Sequence[int],
        epilogue: Expression,
        node: Node | None,
    ) -> None:
        """Append arithmetic on operands that broadcast to `y`, which is walked in this order."""
        shape = y.shape
        broadcast = [p.through(lambda t: t.expand(shape)) for p in sources]
        walks = [[p.strides[i] for i in order] for p in (*broadcast, y)]
        sizes, walks = merge_axes([shape[i] for i in order], walks)
        if not sizes:
            sizes, walks = [1], [[0] for _ in walks[:-1]] + [[1]]
        *x_walks, y_walk = (tuple(walk) for walk in walks)
        does = Map(tuple(sizes), tuple(x_walks), y_walk, epilogue)
        self.step(node, does, [*broadcast, y])


SCHEDULES: dict[str, Callable[[Scheduler, Node], None]] = {}


def schedules(kind: str) -> Callable[..., Callable[[Scheduler, Node], None]]:
    """Register the function that schedules nodes of this kind."""

    def register(function: Callable[[Scheduler, Node], None]) -> Callable[[Scheduler, Node], None]:
        SCHEDULES[kind] = function
        return function

    return register


def _image_strides(place: Place) -> tuple[int, int, int]:
    """Along (N, H, W)."""
    n, _, h, w = place.strides
    return (n, h, w)
