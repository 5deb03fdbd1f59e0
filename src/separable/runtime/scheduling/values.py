"""Arithmetic, reductions, normalisation and resampling."""

from __future__ import annotations

import math

from ..emit import resample as resample_kernel
from ..emit.kernel import Description
from ..emit.reduction import Columns, Rows
from ..emit.resample import Resample
from ..emit.tiling import merge_axes
from ..graph import Node
from .placing import channels_last
from .scheduler import Scheduler, schedules


@schedules("map")
def _map(s: Scheduler, node: Node) -> None:
    assert node.shape is not None
    sources = [s.memory.place(source) for source in node.inputs]
    full = [p for p in sources if p.shape == node.shape and p.buffer.kind != "constant"]
    rank = len(node.shape)
    order = full[0].order if full else channels_last(rank)
    y = s.memory.allocate(node, order)
    s.map(sources, y, y.order, node.epilogue, node)


@schedules("reduce")
def _reduce(s: Scheduler, node: Node) -> None:
    assert node.shape is not None
    x = s.memory.place(node.inputs[0])
    axes = node.attributes["axes"]
    lanes = [i for i, size in enumerate(x.shape) if x.strides[i] == 1 and size > 1]
    y = s.memory.allocate(node, range(len(node.shape)))
    extras = s.extras(node, lanes[0] if lanes and lanes[0] not in axes else 0)
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
        x = s.relaid(x, [*others, *axes])
        does = Rows(
            kind=node.attributes["function"],
            sizes=(*(x.shape[i] for i in others), math.prod(x.shape[i] for i in axes)),
            x_strides=(*(x.strides[i] for i in others), 1),
            y_strides=(*(y.strides[i] for i in others), 1),
            extra_strides=tuple((*(e.strides[i] for i in others), 0) for e in extras),
            epilogue=node.epilogue,
        )
    s.step(node, does, [x, *extras, y])


@schedules("norm")
def _norm(s: Scheduler, node: Node) -> None:
    _rows(s, node, "norm", len(node.shape or ()) - 1, eps=node.attributes["eps"])


@schedules("softmax")
def _softmax(s: Scheduler, node: Node) -> None:
    _rows(s, node, node.attributes["function"], node.attributes["axis"])


def _rows(s: Scheduler, node: Node, kind: str, axis: int, eps: float = 0.0) -> None:
    x = s.lanes(s.memory.place(node.inputs[0]), axis)
    others = [i for i in x.order if i != axis]
    y = s.memory.allocate(node, [*others, axis])
    extras = s.extras(node, axis)
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
    s.step(node, does, [x, *extras, y])


@schedules("resample")
def _resample(s: Scheduler, node: Node) -> None:
    assert node.shape is not None
    x, extras, y, sizes = s.images(node)
    does = Resample(**sizes, **node.attributes)
    entries = s.memory.constant(
        sum(does.size) * resample_kernel.ENTRY, lambda: resample_kernel.table(does)
    )
    s.step(node, does, [x, (entries, 0), *extras, y])
