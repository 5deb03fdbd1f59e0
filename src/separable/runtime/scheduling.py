"""Nodes into steps: where each value lies in memory, which kernel runs, and on what.

Images lie channels last, so that pointwise convolutions are matrix products and every kernel walks
channels by vectors. Views cost nothing where strides can express them, and concatenated parts are
written in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .emit import conv as conv_kernel
from .emit import resample as resample_kernel
from .emit import window as window_kernel
from .emit.conv import Conv
from .emit.elementwise import Map
from .emit.expression import operand
from .emit.kernel import Description, Kernel
from .emit.reduction import Columns, Rows
from .emit.resample import Resample
from .emit.tiling import merge_axes
from .emit.window import Window
from .fusing import fuse_chains
from .graph import Graph, Node
from .machine import Machine
from .memory import CHANNELS_LAST, Buffer, Place, dense
from .placing import Memory, channels_last
from .steps import Schedule, Step
from .tiles import choose_conv_tile, choose_tile


def schedule(graph: Graph, machine: Machine, threads: int, fuse: bool = True) -> Schedule:
    """Choose memory and kernels for every node.

    Args:
        graph: what to compute.
        machine: the CPU it runs on.
        threads: of one call.
        fuse: join convolutions into chains where that is estimated to be faster.
    """
    result = _Scheduler(graph, machine, threads).run()
    if fuse:
        result.steps = fuse_chains(result.steps, machine, threads)
    return result


class _Scheduler:
    def __init__(self, graph: Graph, machine: Machine, threads: int) -> None:
        self.graph, self.machine, self.threads = graph, machine, threads
        self.memory = Memory(graph)
        self.steps: list[Step] = []

    def run(self) -> Schedule:
        inputs: list[Buffer | None] = []
        arguments = zip(self.graph.inputs, self.graph.expected, strict=True)
        for number, (node, form) in enumerate(arguments):
            inputs.append(None)
            if form is not None:
                buffer = inputs[-1] = form.buffer("input", number)
                self.memory.places[node] = form.place(buffer)
        for node in self.graph.nodes:
            getattr(self, "_" + node.kind)(node)
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

    def step(
        self, node: Node | None, does: Description, places: Sequence[Place | tuple[Buffer, int]]
    ) -> None:
        """Append a kernel launch."""
        tile = choose_tile(does, self.machine, self.threads)
        arguments = [(p.buffer, p.offset) if isinstance(p, Place) else p for p in places]
        self.steps.append(Step(node, arguments, Kernel(does, self.machine, tile)))

    # -- one method per kind of node -------------------------------------------------------------

    def _conv(self, node: Node) -> None:
        assert node.shape is not None
        attributes = node.attributes
        x = self.memory.place(node.inputs[0])
        groups = attributes["groups"]
        weight, bias = node.inputs[1:3]
        out, inner, *_ = weight.shape or ()
        axis, small = node.channel_axis, False
        extras = self.extras(node, axis)
        if attributes.get("linear"):
            y = self.memory.allocate(node, range(len(node.shape)))
            leading = range(len(node.shape) - 1)
            sizes = [node.shape[i] for i in leading]
            walks = [[p.strides[i] for i in leading] for p in (x, y, *extras)]
        else:
            small = conv_kernel.is_small((inner, out // groups), groups, self.machine)
            if x.strides[1] != 1 and (inner > 16 or small):
                x = self.lanes(x, 1)
            y = self.memory.allocate(node, CHANNELS_LAST)
            sizes = [node.shape[i] for i in (0, 2, 3)]
            walks = [[p.strides[i] for i in (0, 2, 3)] for p in (x, y, *extras)]
        common: dict[str, Any] = {"channels": (inner, out // groups), "groups": groups}
        if small:
            common = {"channels": (inner, out), "small": True}
        if attributes.get("linear") or _is_inside(node, x.shape[2:]):
            # Positions do not touch one another: all that lie in one stride are one row.
            sy, sx = attributes.get("stride", (1, 1))
            if not attributes.get("linear"):
                walks[0] = [walks[0][0], walks[0][1] * sy, walks[0][2] * sx]
            sizes, walks = merge_axes(sizes, walks)
            sizes = [1] * (3 - len(sizes)) + sizes
            walks = [[0] * (3 - len(walk)) + walk for walk in walks]
            size = in_size = (sizes[1], sizes[2])
        else:
            size, in_size = (sizes[1], sizes[2]), (x.shape[2], x.shape[3])
            common |= {k: attributes[k] for k in ("kernel", "stride", "padding", "dilation")}
        x_walk, y_walk, *extra_walks = (tuple(walk) for walk in walks)
        does = Conv(
            batch=sizes[0],
            size=size,
            in_size=in_size,
            x_strides=(*x_walk, x.strides[axis]),
            y_strides=y_walk,
            extra_strides=tuple(
                (*walk, p.strides[axis]) for walk, p in zip(extra_walks, extras, strict=True)
            ),
            epilogue=node.epilogue,
            **common,
        )
        w, b = weight.attributes["recipe"], bias.attributes["recipe"]
        machine, tile = self.machine, choose_conv_tile(does, self.machine, self.threads)
        panels = conv_kernel.panels_of(does, tile, machine)
        padded = panels.groups * panels.padded

        def recipe() -> torch.Tensor:
            return torch.cat(conv_kernel.pack(does, tile, machine, w(), b()))

        packed = self.memory.constant(padded * (does.depth + 1), recipe)
        self.step(node, does, [x, (packed, 0), (packed, padded * does.depth), *extras, y])

    def _product(self, node: Node) -> None:
        assert node.shape is not None
        *lead, rows, outputs = node.shape
        rank = len(node.shape)
        x, w = (self.memory.place(source) for source in node.inputs[:2])
        w = self.lanes(w, len(w.shape) - 1)
        x, w = (p.through(lambda t: t.expand(*lead, *t.shape[-2:])) for p in (x, w))
        extras = self.extras(node, rank - 1)
        y = self.memory.allocate(node, range(rank))
        missing = 4 - rank

        def walk(place: Place, *axes: int) -> tuple[int, ...]:
            leading = [0] * missing + [place.strides[i] for i in range(rank - 2)]
            return (*leading, *(place.strides[axis] for axis in axes))

        size = ([1] * missing + lead)[1], rows
        does = Conv(
            batch=([1] * missing + lead)[0],
            size=size,
            in_size=size,
            channels=(x.shape[-1], outputs),
            x_strides=walk(x, -2, -1),
            y_strides=walk(y, -2),
            w_strides=walk(w, -2),
            extra_strides=tuple(walk(extra, -2, -1) for extra in extras),
            epilogue=node.epilogue,
        )
        self.step(node, does, [x, w, *extras, y])

    def _window(self, node: Node) -> None:
        assert node.shape is not None
        attributes = node.attributes
        x = self.lanes(self.memory.place(node.inputs[0]), 1)
        extras = self.extras(node, 1)
        y = self.memory.allocate(node, CHANNELS_LAST)
        does = Window(
            batch=node.shape[0],
            size=(node.shape[2], node.shape[3]),
            in_size=(x.shape[2], x.shape[3]),
            channels=x.shape[1],
            x_strides=_image(x),
            y_strides=_image(y),
            extra_strides=tuple((*_image(e), e.strides[1]) for e in extras),
            epilogue=node.epilogue,
            **attributes,
        )
        weights: list[tuple[Buffer, int]] = []
        if does.kind == "conv":
            w, b = (source.attributes["recipe"] for source in node.inputs[1:3])
            machine = self.machine
            padded = -(-does.channels // machine.width) * machine.width * does.multiplier
            taps = does.kernel[0] * does.kernel[1]

            def recipe() -> torch.Tensor:
                return torch.cat(window_kernel.pack(does, machine, w(), b()))

            packed = self.memory.constant(padded * (taps + 1), recipe)
            weights = [(packed, 0), (packed, padded * taps)]
        self.step(node, does, [x, *weights, *extras, y])

    def _map(self, node: Node) -> None:
        assert node.shape is not None
        sources = [self.memory.place(source) for source in node.inputs]
        full = [p for p in sources if p.shape == node.shape and p.buffer.kind != "constant"]
        rank = len(node.shape)
        order = full[0].order if full else channels_last(rank)
        y = self.memory.allocate(node, order)
        self.map(sources, y, y.order, node.epilogue, node)

    def map(
        self,
        sources: Sequence[Place],
        y: Place,
        order: Sequence[int],
        epilogue: Any,
        node: Node | None,
    ) -> None:
        shape = y.shape
        broadcast = [p.through(lambda t: t.expand(shape)) for p in sources]
        walks = [[p.strides[i] for i in order] for p in (*broadcast, y)]
        sizes, walks = merge_axes([shape[i] for i in order], walks)
        if not sizes:
            sizes, walks = [1], [[0] for _ in walks[:-1]] + [[1]]
        *x_walks, y_walk = (tuple(walk) for walk in walks)
        does = Map(tuple(sizes), tuple(x_walks), y_walk, epilogue)
        self.step(node, does, [*broadcast, y])

    def _reduce(self, node: Node) -> None:
        assert node.shape is not None
        x = self.memory.place(node.inputs[0])
        axes = node.attributes["axes"]
        lanes = [i for i, size in enumerate(x.shape) if x.strides[i] == 1 and size > 1]
        y = self.memory.allocate(node, range(len(node.shape)))
        extras = self.extras(node, lanes[0] if lanes and lanes[0] not in axes else 0)
        others = [i for i in range(len(x.shape)) if i not in axes]
        if lanes and lanes[0] not in axes:
            kept = [*(i for i in others if i != lanes[0]), lanes[0]]
            does: Description = Columns(
                kind=node.attributes["function"],
                kept=tuple(x.shape[i] for i in kept),
                reduced=tuple(x.shape[i] for i in axes),
                x_kept=tuple(x.strides[i] for i in kept),
                x_reduced=tuple(x.strides[i] for i in axes),
                y_strides=tuple(y.strides[i] for i in kept),
                extra_strides=tuple(tuple(e.strides[i] for i in kept) for e in extras),
                epilogue=node.epilogue,
            )
        else:
            x = self.relaid(x, [*others, *axes])
            does = Rows(
                kind=node.attributes["function"],
                sizes=(*(x.shape[i] for i in others), math.prod(x.shape[i] for i in axes)),
                x_strides=(*(x.strides[i] for i in others), 1),
                y_strides=(*(y.strides[i] for i in others), 1),
                extra_strides=tuple((*(e.strides[i] for i in others), 0) for e in extras),
                epilogue=node.epilogue,
            )
        self.step(node, does, [x, *extras, y])

    def _norm(self, node: Node) -> None:
        self.rows(node, "norm", len(node.shape or ()) - 1, eps=node.attributes["eps"])

    def _softmax(self, node: Node) -> None:
        self.rows(node, node.attributes["function"], node.attributes["axis"])

    def rows(self, node: Node, kind: str, axis: int, eps: float = 0.0) -> None:
        x = self.lanes(self.memory.place(node.inputs[0]), axis)
        others = [i for i in x.order if i != axis]
        y = self.memory.allocate(node, [*others, axis])
        extras = self.extras(node, axis)
        walks = [[p.strides[i] for i in others] for p in (x, y, *extras)]
        sizes, walks = merge_axes([x.shape[i] for i in others], walks)
        x_walk, y_walk, *extra_walks = (tuple(walk) for walk in walks)
        does = Rows(
            kind=kind,
            sizes=(*sizes, x.shape[axis]),
            x_strides=(*x_walk, 1),
            y_strides=(*y_walk, y.strides[axis]),
            extra_strides=tuple(
                (*walk, e.strides[axis]) for walk, e in zip(extra_walks, extras, strict=True)
            ),
            epilogue=node.epilogue,
            eps=eps,
        )
        self.step(node, does, [x, *extras, y])

    def _resample(self, node: Node) -> None:
        assert node.shape is not None
        x = self.lanes(self.memory.place(node.inputs[0]), 1)
        extras = self.extras(node, 1)
        y = self.memory.allocate(node, CHANNELS_LAST)
        does = Resample(
            batch=node.shape[0],
            size=(node.shape[2], node.shape[3]),
            in_size=(x.shape[2], x.shape[3]),
            channels=x.shape[1],
            x_strides=_image(x),
            y_strides=_image(y),
            extra_strides=tuple((*_image(e), e.strides[1]) for e in extras),
            epilogue=node.epilogue,
            **node.attributes,
        )
        entries = self.memory.constant(
            sum(does.size) * resample_kernel.ENTRY, lambda: resample_kernel.table(does)
        )
        self.step(node, does, [x, (entries, 0), *extras, y])

    def _cat(self, node: Node) -> None:
        for number, source in enumerate(node.inputs):
            part, place = self.memory.part(node, number), self.memory.place(source)
            if place != part:
                self.copy(place, part, node)

    def _pad(self, node: Node) -> None:
        x = self.memory.place(node.inputs[0])
        y = self.memory.allocate(node, x.order)
        self.map([], y, y.order, node.attributes["value"], node)

        def inside(t: torch.Tensor) -> torch.Tensor:
            for axis, start in enumerate(node.attributes["before"]):
                t = t.narrow(axis, start, x.shape[axis])
            return t

        self.copy(x, y.through(inside), node)

    def _view(self, node: Node) -> None:
        x, a = self.memory.place(node.inputs[0]), node.attributes
        shape = node.shape or ()
        look: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "permute": lambda t: t.permute(a["order"]),
            "expand": lambda t: t.expand(shape),
            "reshape": lambda t: t.view(shape),
            "slice": lambda t: t[
                (slice(None),) * a["axis"] + (slice(a["start"], None, a["step"]),)
            ].narrow(a["axis"], 0, shape[a["axis"]]),
        }
        try:
            self.memory.places[node] = x.through(look[a["view"]])
        except RuntimeError:  # no strides can express this reshape
            x = self.relaid(x, range(len(x.shape)))
            self.memory.places[node] = x.through(look[a["view"]])

    def _torch(self, node: Node) -> None:
        operands = {
            source: self.memory.place(source)
            for source in node.inputs
            if source.shape is not None and source.kind != "constant"
        }
        output = None
        if node.shape is not None:
            output = dense(Buffer("arena", math.prod(node.shape)), node.shape)
            self.memory.places[node] = output
        places = [*operands.values(), *([output] if output else [])]
        arguments = [(p.buffer, p.offset) for p in places]
        self.steps.append(Step(node, arguments, None, operands, output))


def _is_inside(node: Node, size: Sequence[int]) -> bool:
    """Whether a convolution reads one pixel of its image for each of its own, and no padding.

    Args:
        node: the convolution.
        size: (height, width) of its image, to which a folded padding may have to be added.
    """
    kernel, padding, strides = (node.attributes[key] for key in ("kernel", "padding", "stride"))
    assert node.shape is not None
    last = [(out - 1) * stride for out, stride in zip(node.shape[2:], strides, strict=True)]
    fits = all(place < inside for place, inside in zip(last, size, strict=True))
    return kernel == (1, 1) and padding == (0, 0) and fits


def _image(place: Place) -> tuple[int, int, int]:
    n, _, h, w = place.strides
    return (n, h, w)
