"""Views, concatenation and padding, and what torch runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..graph import Node
from ..memory import Buffer, dense
from ..steps import Step
from .scheduler import Scheduler, schedules


@schedules("cat")
def _cat(s: Scheduler, node: Node) -> None:
    for number, source in enumerate(node.inputs):
        part, place = s.memory.part(node, number), s.memory.place(source)
        if place != part:
            s.copy(place, part, node)


@schedules("pad")
def _pad(s: Scheduler, node: Node) -> None:
    x = s.memory.place(node.inputs[0])
    y = s.memory.allocate(node, x.order)
    s.map([], y, y.order, node.attributes["value"], node)

    def inside(t: torch.Tensor) -> torch.Tensor:
        for axis, start in enumerate(node.attributes["before"]):
            t = t.narrow(axis, start, x.shape[axis])
        return t

    s.copy(x, y.through(inside), node)


@schedules("view")
def _view(s: Scheduler, node: Node) -> None:
    x, a = s.memory.place(node.inputs[0]), node.attributes
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
        s.memory.places[node] = x.through(look[a["view"]])
    except RuntimeError:  # no strides can express this reshape
        x = s.relaid(x, range(len(x.shape)))
        s.memory.places[node] = x.through(look[a["view"]])


@schedules("torch")
def _torch(s: Scheduler, node: Node) -> None:
    operands = {
        source: s.memory.place(source)
        for source in node.inputs
        if source.shape is not None and source.kind != "constant"
    }
    output = None
    if node.shape is not None:
        output = dense(Buffer("arena", math.prod(node.shape)), node.shape)
        s.memory.places[node] = output
    places = [*operands.values(), *([output] if output else [])]
    arguments = [(p.buffer, p.offset) for p in places]
    s.steps.append(Step(node, arguments, None, operands, output))
