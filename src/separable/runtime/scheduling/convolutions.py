"""Convolutions, linear layers, products, depthwise convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..emit import conv as conv_kernel
from ..emit import window as window_kernel
from ..emit.conv import Conv
from ..emit.tiling import merge_axes
from ..emit.window import Window
from ..graph import Node
from ..memory import CHANNELS_LAST, Buffer, Place
from .scheduler import Scheduler, schedules
from .tiles import choose_conv_tile


@schedules("conv")
def _conv(s: Scheduler, node: Node) -> None:
    assert node.shape is not None
    attributes = node.attributes
    x = s.memory.place(node.inputs[0])
    groups = attributes["groups"]
    weight, bias = node.inputs[1:3]
    out, inner, *_ = weight.shape or ()
    axis, small = node.channel_axis, False
    extras = s.extras(node, axis)
    if attributes.get("linear"):
        y = s.memory.allocate(node, range(len(node.shape)))
        leading = range(len(node.shape) - 1)
        sizes = [node.shape[i] for i in leading]
        walks = [[p.strides[i] for i in leading] for p in (x, y, *extras)]
    else:
        small = conv_kernel.is_small((inner, out // groups), groups, s.machine)
        if x.strides[1] != 1 and (inner > 16 or small):
            x = s.lanes(x, 1)
        y = s.memory.allocate(node, CHANNELS_LAST)
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
    machine, tile = s.machine, choose_conv_tile(does, s.machine, s.threads)
    panels = conv_kernel.panels_of(does, tile, machine)
    padded = panels.groups * panels.padded

    def recipe() -> torch.Tensor:
        return torch.cat(conv_kernel.pack(does, tile, machine, w(), b()))

    packed = s.memory.constant(padded * (does.depth + 1), recipe)
    s.step(node, does, [x, (packed, 0), (packed, padded * does.depth), *extras, y])


@schedules("product")
def _product(s: Scheduler, node: Node) -> None:
    assert node.shape is not None
    *lead, rows, outputs = node.shape
    rank = len(node.shape)
    x, w = (s.memory.place(source) for source in node.inputs[:2])
    w = s.lanes(w, len(w.shape) - 1)
    x, w = (p.through(lambda t: t.expand(*lead, *t.shape[-2:])) for p in (x, w))
    extras = s.extras(node, rank - 1)
    y = s.memory.allocate(node, range(rank))
    missing = 4 - rank
    batch, heads = [1] * missing + lead

    def walk(place: Place, *axes: int) -> tuple[int, ...]:
        leading = [0] * missing + [place.strides[i] for i in range(rank - 2)]
        return (*leading, *(place.strides[axis] for axis in axes))

    does = Conv(
        batch=batch,
        size=(heads, rows),
        in_size=(heads, rows),
        channels=(x.shape[-1], outputs),
        x_strides=walk(x, -2, -1),
        y_strides=walk(y, -2),
        w_strides=walk(w, -2),
        extra_strides=tuple(walk(extra, -2, -1) for extra in extras),
        epilogue=node.epilogue,
    )
    s.step(node, does, [x, w, *extras, y])


@schedules("window")
def _window(s: Scheduler, node: Node) -> None:
    assert node.shape is not None
    x, extras, y, sizes = s.images(node)
    does = Window(**sizes, **node.attributes)
    weights: list[tuple[Buffer, int]] = []
    if does.kind == "conv":
        w, b = (source.attributes["recipe"] for source in node.inputs[1:3])
        machine = s.machine
        padded = -(-does.channels // machine.width) * machine.width * does.multiplier
        taps = does.kernel[0] * does.kernel[1]

        def recipe() -> torch.Tensor:
            return torch.cat(window_kernel.pack(does, machine, w(), b()))

        packed = s.memory.constant(padded * (taps + 1), recipe)
        weights = [(packed, 0), (packed, padded * taps)]
    s.step(node, does, [x, *weights, *extras, y])


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
