"""Convolutions as outer products in registers: pointwise, dense, grouped, linear, and products.

    for each task (rows × blocks of columns × groups × panels):
      for each panel of output channels, for each row, for each block of pixels:
        for each tap inside the image, for each input channel:
          accumulators += input pixels (broadcast) × weights (vectors)
        output = epilogue(accumulators + bias, extras)

Pixels × vectors of the block are the tile; all its accumulators live in registers. A pointwise
convolution over dense memory is one row of N·H·W pixels. A product of two activations is a
pointwise convolution whose weights lie where they were computed, others for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..machine import Machine
from . import expression
from .builder import Builder, Index, Value
from .elementwise import load_strided
from .expression import Expression
from .panels import Panel, Panels
from .products import Products, add
from .tiling import Run, even_sizes, surroundings, taps_inside, window_runs


@dataclass(frozen=True)
class Conv:
    """A convolution; every size and stride is fixed, all strides count floats.

    Attributes:
        batch: images.
        size: output (height, width).
        in_size: input (height, width).
        channels: (input, output) channels per group.
        groups: of the channels. Small ones whose outputs share vectors are one group of all
            outputs; `channels[0]` stays that of a small one.
        small: whether it is such a convolution; it has as many outputs as inputs.
        kernel: (height, width) of the filter.
        stride: of the filter.
        padding: zeros before the first row and column.
        dilation: of the filter.
        x_strides: input strides along (N, H, W, C).
        y_strides: output strides along (N, H, W); channels are neighbours.
        w_strides: none if weights are packed; of a second activation in their place, strides along
            (N, H, in), its outputs being neighbours. There is no bias then.
        extra_strides: strides along (N, H, W, C) of each further operand; C's is 0 or 1.
        epilogue: of the sum with bias (operand 0) and the extras (1, 2, ...).
    """

    batch: int
    size: tuple[int, int]
    in_size: tuple[int, int]
    channels: tuple[int, int]
    x_strides: tuple[int, ...]
    y_strides: tuple[int, ...]
    groups: int = 1
    small: bool = False
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    w_strides: tuple[int, ...] = ()
    extra_strides: tuple[tuple[int, ...], ...] = ()
    epilogue: Expression = ("x", 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates, padding included."""
        pixels = self.batch * self.size[0] * self.size[1]
        return pixels * self.groups * self.depth * self.channels[1]

    @property
    def inputs(self) -> int:
        """Input channels of all groups."""
        return self.channels[1] if self.small else self.groups * self.channels[0]

    @property
    def depth(self) -> int:
        """Products summed per output."""
        return self.channels[0] * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class ConvTile:
    """How a convolution is cut.

    Attributes:
        pixels: most pixels per block.
        vectors: most vectors of output channels per block.
        rows: rows per task.
        blocks: blocks of columns per task.
        panels: tasks that share the panels of one group.
    """

    pixels: int
    vectors: int
    rows: int
    blocks: int
    panels: int


def is_small(channels: tuple[int, int], groups: int, machine: Machine) -> bool:
    """Whether several groups of `(input, output)` channels fill a vector, and are best taken so."""
    inputs, outputs = channels
    return groups > 1 and inputs == outputs < machine.width and machine.width % inputs == 0


def task_grid(conv: Conv, tile: ConvTile) -> tuple[int, int, int, int]:
    """Tasks along (rows, blocks of columns, groups, panels)."""
    blocks = len(even_sizes(conv.size[1], tile.pixels))
    return (
        -(-conv.batch * conv.size[0] // tile.rows),
        -(-blocks // tile.blocks),
        conv.groups,
        tile.panels,
    )


def panels_of(conv: Conv, tile: ConvTile, machine: Machine) -> Panels:
    """How the output channels of a convolution are cut."""
    outputs = conv.channels[1]
    depth = 1 if conv.w_strides else conv.depth  # what lies between neighbouring outputs
    return Panels(conv.groups, outputs, depth, tile.vectors, tile.panels, machine.width)


def pack(
    conv: Conv, tile: ConvTile, machine: Machine, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay weights out in the order the kernel reads them.

    Args:
        conv: the convolution.
        tile: how it is cut.
        machine: its vector width decides the layout.
        weight: `[groups × out, in, kh, kw]`.
        bias: `[groups × out]` or `None`.

    Returns:
        Weights `[groups][panel][kh][kw][in][vectors × width]` and bias `[groups][vectors × width]`,
        both flat.
    """
    inputs, outputs = conv.channels
    w = weight.detach().reshape(conv.groups, outputs, inputs, *conv.kernel).permute(0, 3, 4, 2, 1)
    return panels_of(conv, tile, machine).pack(w.reshape(conv.groups, conv.depth, outputs), bias)


def emit(conv: Conv, tile: ConvTile, machine: Machine) -> str:
    """Generate the kernel; its arguments are input, weights, bias if any, extras and output."""
    b = Builder(machine, 4 - bool(conv.w_strides) + len(conv.extra_strides))
    define(conv, tile, b)
    return b.finish()


def define(
    conv: Conv, tile: ConvTile, b: Builder, by_pixel: bool = False, by_row: bool = False
) -> None:
    """Write the kernel into `b`.

    Args:
        conv: the convolution.
        tile: how it is cut.
        b: a function with the kernel's arguments.
        by_pixel: let each pixel be a task, of a pointwise convolution that is one row. At least
            `tile.pixels` must be run at once; the last block may overlap the one before.
        by_row: let each row be a task, of a convolution of one group; each panel serves all rows
            of a call in turn.
    """
    emitter = _Emitter(conv, tile, b)
    if by_pixel:
        emitter.pixels()
    elif by_row:
        emitter.rows()
    else:
        b.loop(b.begin, b.end, emitter.task)


class _Emitter:
    def __init__(self, conv: Conv, tile: ConvTile, b: Builder) -> None:
        self.conv, self.tile, self.b = conv, tile, b
        self.x, self.w, *others, self.y = b.pointers
        self.bias, self.extras = (self.w, others) if conv.w_strides else (others[0], others[1:])
        self.runs = window_runs(conv, tile.pixels)
        # Taps of a row that lie behind one another in memory are one longer row of channels.
        self.joined = (
            conv.x_strides[3] == 1
            and conv.x_strides[2] == conv.channels[0]
            and conv.dilation[1] == 1
            and not conv.small
        )
        self.panels = panels_of(conv, tile, b.machine)
        self.blocks = sum(run.count for run in self.runs)
        self.turns = 0 if conv.w_strides else tile.rows * min(tile.blocks, self.blocks)

    def task(self, t: Index) -> None:
        b, conv, tile = self.b, self.conv, self.tile
        rows, columns, group, share = b.split(t, task_grid(conv, tile))
        first_row = b.mul(rows, tile.rows)
        last_row = b.minimum(b.add(first_row, tile.rows), conv.batch * conv.size[0])
        first_block = b.mul(columns, tile.blocks)
        last_block = b.add(first_block, tile.blocks)
        x = b.at(self.x, b.mul(group, conv.channels[0] * conv.x_strides[3]))

        def panel(panel: Panel) -> None:
            def row(r: Index) -> None:
                turn = b.mul(b.add(r, b.mul(first_row, -1)), self.blocks)
                turn = b.add(turn, b.mul(first_block, -1))
                for run in self.runs:
                    self.row_of_blocks(run, r, first_block, last_block, x, panel, turn)

            b.loop(first_row, last_row, row)

        self.each_panel(group, share, panel)

    def rows(self) -> None:
        self.turns = 0  # these weights are read again and again, and are in the cache

        def panel(panel: Panel) -> None:
            def row(r: Index) -> None:
                for run in self.runs:
                    self.row_of_blocks(run, r, 0, self.blocks, self.x, panel, 0)

            self.b.loop(self.b.begin, self.b.end, row)

        self.each_panel(0, 0, panel)

    def pixels(self) -> None:
        b, size = self.b, self.tile.pixels
        run = Run(0, 1, 0, size, ((0, size),))
        blocks = b.divmod(b.add(b.add(b.end, size - 1), b.mul(b.begin, -1)), size)[0]
        self.turns = 0  # these weights are read again and again, and are in the cache

        def panel(panel: Panel) -> None:
            def block(number: Index) -> None:
                column = b.add(b.begin, b.mul(number, size))
                position = (0, 0, b.minimum(column, b.add(b.end, -size)))
                sums = self.taps(run, position, self.x, panel, 0)
                self.epilogue(run, position, sums, panel)

            b.loop(0, blocks, block)

        self.each_panel(0, 0, panel)

    def each_panel(self, group: Index, share: Index, body: Callable[[Panel], None]) -> None:
        self.panels.each(self.b, self.w, self.bias, group, share, body)

    def row_of_blocks(
        self,
        run: Run,
        r: Index,
        first_block: Index,
        last_block: Index,
        x: Value,
        panel: Panel,
        turn: Index,
    ) -> None:
        b, conv = self.b, self.conv
        image, row = b.divmod(r, conv.size[0])
        if conv.batch == 1:
            image, row = 0, r

        def block(number: Index) -> None:
            column = b.add(run.start, b.mul(b.add(number, -run.first), run.size))
            sums = self.taps(run, (image, row, column), x, panel, b.add(turn, number))
            self.epilogue(run, (image, row, column), sums, panel)

        if len(self.runs) == 1 and self.tile.blocks >= run.count:
            b.loop(0, run.count, block)
        elif self.tile.blocks >= sum(each.count for each in self.runs):
            b.loop(run.first, run.first + run.count, block)
        else:
            b.loop(
                b.maximum(first_block, run.first),
                b.minimum(last_block, run.first + run.count),
                block,
            )

    def taps(
        self,
        run: Run,
        position: Sequence[Index],
        x: Value,
        panel: Panel,
        turn: Index,
    ) -> list[Value]:
        b, conv = self.b, self.conv
        image, row, column = position
        kw, inputs = conv.kernel[1], conv.channels[0]
        top = b.add(b.mul(row, conv.stride[0]), -conv.padding[0])
        corner = b.add(b.mul(column, conv.stride[1]), -conv.padding[1])
        lanes = panel.vectors * b.width
        first = panel.weights
        if conv.small:
            x = b.at(x, panel.channel)
        if conv.w_strides:
            first = b.at(first, b.dot((image, row), conv.w_strides[:2]))

        def products(x: Value, weights: Value, depth: int, pixels: tuple[int, int]) -> Products:
            return Products(
                x=x,
                weights=weights,
                depth=depth,
                pixels=pixels,
                vectors=panel.vectors,
                x_strides=(conv.stride[1] * conv.x_strides[2], conv.x_strides[3]),
                lanes=panel.tail if conv.small else 0,
                step=conv.w_strides[2] if conv.w_strides else lanes,
                tail=panel.tail if conv.w_strides else b.width,
            )

        # Each of the blocks that read a panel in turn fetches a share of the panel behind it.
        ahead = (conv.depth * lanes, turn, self.turns)

        def line(ky: Index, *sums: Value) -> list[Value]:
            y = b.add(top, b.mul(ky, conv.dilation[0]))
            source = b.at(x, b.dot((image, y, corner), conv.x_strides[:3]))
            weights = b.at(first, b.mul(ky, kw * inputs * lanes))
            if run.inside and self.joined:
                one = products(source, weights, kw * inputs, run.taps[0])
                return add(b, one, list(sums), conv.depth, ahead)
            result = list(sums)
            for kx in range(kw):
                one = products(
                    b.at(source, kx * conv.dilation[1] * conv.x_strides[2]),
                    b.at(weights, kx * inputs * lanes),
                    inputs,
                    run.taps[kx],
                )
                result = add(b, one, result, conv.depth, ahead)
            return result

        zeros = [b.zero()] * (run.size * panel.vectors)
        sums = b.loop(*taps_inside(b, top, conv), line, zeros)
        if conv.w_strides:
            return sums
        # Last, as torch does: on top of a large bias, each product would be rounded to its size.
        bias = [b.load(b.at(panel.bias, 0, v * b.width)) for v in range(panel.vectors)]
        return [b.ir.fadd(s, c) for s, c in zip(sums, bias * run.size, strict=True)]

    def epilogue(
        self, run: Run, position: Sequence[Index], sums: list[Value], panel: Panel
    ) -> None:
        b, conv = self.b, self.conv
        channel, vectors, tail = panel.channel, panel.vectors, panel.tail
        out = b.at(self.y, b.add(b.dot(position, conv.y_strides), channel))
        extras = [
            b.at(pointer, b.dot((*position, channel), strides))
            for pointer, strides in zip(self.extras, conv.extra_strides, strict=True)
        ]
        for i in range(run.size):
            for v in range(vectors):
                count = tail if v == vectors - 1 else b.width

                def load(number: int, i: int = i, v: int = v, count: int = count) -> Value:
                    if number == 0:
                        return sums[i * vectors + v]
                    *_, along, lane = conv.extra_strides[number - 1]
                    source = b.at(extras[number - 1], i * along + v * b.width * lane)
                    return load_strided(b, source, lane, count)

                value = expression.emit(b, conv.epilogue, load)
                b.store(value, b.at(out, i * conv.y_strides[2] + v * b.width), count)


def reference(
    conv: Conv,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    extras: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """The same in plain torch.

    Args:
        conv: the convolution.
        x: `[N, groups × in, H, W]`.
        weight: `[groups × out, in, kh, kw]`.
        bias: `[groups × out]` or `None`.
        extras: tensors that broadcast to the output.

    Returns:
        `[N, groups × out, *size]`.
    """
    x = F.pad(x, surroundings(conv))
    groups = conv.inputs // conv.channels[0]
    out = F.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, groups)
    return expression.evaluate(conv.epilogue, [out, *extras])
