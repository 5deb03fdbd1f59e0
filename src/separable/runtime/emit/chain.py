"""Convolutions one after another, a band of rows at a time: what lies between them stays in cache.

    for each task (an image, a range of bands):
      for each band of output rows:
        for each stage but the last:
          move the rows that the next stage reads again to the front of the stage's buffer
          compute the rows that the band needs and that are not there yet behind them
        last stage: the band's rows

A stage is a convolution, a window or a change of layout as it is emitted alone, written as a
function of its own; it counts rows from the top of the image and is handed pointers that make them
land in the buffer. A task that does not start at the top of an image computes the rows above it
once more: as many as the windows overlap.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llvmlite import ir

from ..machine import Machine
from . import conv, relayout, window
from .builder import Builder, Index, Value
from .conv import Conv, ConvTile
from .relayout import Relayout
from .tiling import LINE, pitch
from .window import Window

Stage = Conv | Window | Relayout


@dataclass(frozen=True)
class Chain:
    """Convolutions of which each reads the one before; only the last result is stored.

    Attributes:
        stages: all with the batch and in the `(height, width)` of whole images; only the last one
            has extras. Between them lie buffers of rows, described by the strides along W and H.
    """

    stages: tuple[Stage, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates, padding included; rows computed twice count once."""
        return sum(stage.macs for stage in self.stages)


@dataclass(frozen=True)
class ChainTile:
    """How a chain is cut.

    Attributes:
        tiles: of the stages that are convolutions.
        rows: rows of the last stage per band.
        bands: bands per task.
    """

    tiles: tuple[ConvTile | None, ...]
    rows: int
    bands: int


def joined(stages: Sequence[Stage]) -> Chain:
    """Stages that lie in memory as one expects, with the strides of buffers between them."""
    result = list(stages)
    for i, (before, after) in enumerate(itertools.pairwise(stages)):
        pixel = pitch(outputs(before))
        walk = (0, before.size[1] * pixel, pixel)
        result[i] = replace(result[i], y_strides=walk + (1,) * isinstance(before, Relayout))
        result[i + 1] = replace(after, x_strides=walk + (1,) * (not isinstance(after, Window)))
    return Chain(tuple(result))


def inputs(stage: Stage) -> int:
    """Input channels."""
    return stage.inputs if isinstance(stage, Conv) else stage.channels


def outputs(stage: Stage) -> int:
    """Output channels."""
    if isinstance(stage, Conv):
        return stage.groups * stage.channels[1]
    return stage.channels * (stage.multiplier if isinstance(stage, Window) else 1)


def reach(stage: Stage) -> int:
    """Input rows between the first and the last tap of a window, both included."""
    return (stage.kernel[0] - 1) * stage.dilation[0] + 1


def is_flat(stage: Stage) -> bool:
    """Whether neighbouring rows are one longer row to this stage."""
    if isinstance(stage, Window) or (stage.kernel, stage.stride) != ((1, 1), (1, 1)):
        return False
    if stage.padding != (0, 0) or stage.size != stage.in_size:
        return False
    walks = (stage.x_strides[:3], stage.y_strides, *(e[:3] for e in stage.extra_strides))
    return all(walk[1] == stage.size[1] * walk[2] for walk in walks)


def buffer_rows(chain: Chain, rows: int) -> list[int]:
    """Rows that the buffer behind each stage but the last holds, for bands of `rows`."""
    result: list[int] = []
    for stage in reversed(chain.stages[1:]):
        rows = min(stage.in_size[0], (rows - 1) * stage.stride[0] + reach(stage))
        result.insert(0, rows)
    return result


def scratch_size(chain: Chain, rows: int) -> int:
    """Floats of all buffers of one thread, for bands of `rows`."""
    return sum(_buffer_sizes(chain, rows))


def _buffer_sizes(chain: Chain, rows: int) -> list[int]:
    # Moving rows copies whole cache lines: one more than there is.
    counts = buffer_rows(chain, rows)
    heights = [stage.y_strides[1] for stage in chain.stages]
    return [-(-n * row // LINE) * LINE + LINE for n, row in zip(counts, heights, strict=False)]


def tasks(chain: Chain, tile: ChainTile) -> int:
    """All ranges of bands of all images."""
    return chain.stages[0].batch * _parts(chain, tile)


def _parts(chain: Chain, tile: ChainTile) -> int:
    bands = -(-chain.stages[-1].size[0] // tile.rows)
    return -(-bands // tile.bands)


def emit(chain: Chain, tile: ChainTile, machine: Machine) -> str:
    """Generate the kernel.

    Its arguments are the input, per stage weights, bias and extras as for the stage alone, the
    buffers, and the output.
    """
    return _Emitter(chain, tile, machine).text


class _Emitter:
    def __init__(self, chain: Chain, tile: ChainTile, machine: Machine) -> None:
        self.chain, self.tile = chain, tile
        stages = chain.stages
        weights = [2 * (isinstance(s, Conv) or getattr(s, "kind", "") == "conv") for s in stages]
        counts = [n + len(s.extra_strides) for n, s in zip(weights, stages, strict=True)]
        self.b = b = Builder(machine, 3 + sum(counts))
        self.x, *operands, scratch, self.y = b.pointers
        self.operands: list[list[Value]] = []
        for count in counts:
            self.operands.append(operands[:count])
            operands = operands[count:]
        self.buffers = []
        for size in _buffer_sizes(chain, tile.rows):
            self.buffers.append(scratch)
            scratch = b.at(scratch, size)
        self.functions = [self.function(i) for i in range(len(stages))]
        b.loop(b.begin, b.end, self.task)
        self.text = b.finish()

    def function(self, number: int) -> ir.Function:
        """A stage of one image as a function of rows, or of pixels if it is flat."""
        stage, tile = self.chain.stages[number], self.tile.tiles[number]
        name = f"{type(stage).__name__.lower()}{number}"
        b = Builder(self.b.machine, len(self.operands[number]) + 2, self.b, name)
        if isinstance(stage, Window):
            window.define_rows(replace(stage, batch=1), b)
        elif isinstance(stage, Relayout):
            relayout.define(replace(stage, batch=1), b, by_pixel=is_flat(stage))
        elif is_flat(stage):
            assert tile
            row = (1, stage.size[0] * stage.size[1])
            conv.define(replace(stage, batch=1, size=row, in_size=row), tile, b, by_pixel=True)
        else:
            assert tile
            conv.define(replace(stage, batch=1), tile, b, by_row=True)
        b.end_body()
        return b.body

    def task(self, t: Index) -> None:
        b, tile = self.b, self.tile
        image, part = b.divmod(t, _parts(self.chain, tile))
        bands = -(-self.chain.stages[-1].size[0] // tile.rows)
        first = b.mul(part, tile.bands)
        last = b.minimum(b.add(first, tile.bands), bands)
        b.loop(first, last, lambda band: self.band(image, first, band))

    def band(self, image: Index, first_band: Index, band: Index) -> None:
        b, stages = self.b, self.chain.stages
        low = b.mul(band, self.tile.rows)
        high = b.minimum(b.add(low, self.tile.rows), stages[-1].size[0])
        # Per stage: rows the band reads, and those among them that the band before left there.
        lows, highs = self.rows_back(low, first=True), self.rows_back(high, first=False)
        ready = self.rows_back(low, first=False)
        is_first = b.ir.icmp_signed("==", b.index(band), b.index(first_band))
        # Where all of a stage's rows are padding, those before it need none: low may exceed high.
        starts = [
            b.minimum(b.ir.select(is_first, b.index(needed), b.index(b.maximum(needed, kept))), end)
            for needed, kept, end in zip(lows, ready, highs, strict=True)
        ]
        if any(reach(stage) > stage.stride[0] for stage in stages[1:]):
            previous = self.rows_back(b.add(low, -self.tile.rows), first=True)
            with b.ir.if_then(b.ir.not_(is_first)):
                for i in range(len(stages) - 1):
                    if reach(stages[i + 1]) > stages[i + 1].stride[0]:
                        self.move(i, previous[i], lows[i], ready[i])
        for i in range(len(stages)):
            self.run(i, image, lows, starts[i], highs[i])

    def rows_back(self, row: Index, first: bool) -> list[Index]:
        """Per stage, the first row (or one past the last) that this row of the output needs."""
        b = self.b
        rows = [row]
        for stage in reversed(self.chain.stages[1:]):
            past = b.mul(b.add(rows[0], 0 if first else -1), stage.stride[0])
            past = b.add(past, -stage.padding[0] + (0 if first else reach(stage)))
            rows.insert(0, b.minimum(b.maximum(past, 0), stage.in_size[0]))
        return rows

    def move(self, number: int, base: Index, low: Index, high: Index) -> None:
        """Move the rows `low <= r < high` of a buffer that starts with row `base` to its front."""
        b, buffer = self.b, self.buffers[number]
        row = self.chain.stages[number].y_strides[1]
        source = b.at(buffer, b.mul(b.add(low, b.mul(base, -1)), row))
        count = b.mul(b.add(high, b.mul(low, -1)), row)

        def line(i: Index) -> None:
            offsets = range(0, LINE, b.width)
            values = [b.load(b.at(source, i, offset)) for offset in offsets]
            for value, offset in zip(values, offsets, strict=True):
                b.store(value, b.at(buffer, i, offset))

        b.loop(0, count, line, step=LINE)

    def run(self, number: int, image: Index, lows: list[Index], start: Index, stop: Index) -> None:
        """Compute rows of one stage."""
        b, stages = self.b, self.chain.stages
        stage, last = stages[number], number == len(stages) - 1
        operands = list(self.operands[number])
        x, y = self.x, self.y
        if number == 0:
            x = b.at(x, b.mul(image, stage.x_strides[0]))
        else:
            x = self.row_zero(number - 1, lows)
        if last:
            y = b.at(y, b.mul(image, stage.y_strides[0]))
            fixed = len(operands) - len(stage.extra_strides)
            for i, strides in enumerate(stage.extra_strides, fixed):
                operands[i] = b.at(operands[i], b.mul(image, strides[0]))
        else:
            y = self.row_zero(number, lows)
        if is_flat(stage):
            width = stage.size[1]
            start, stop = b.mul(start, width), b.mul(stop, width)
        b.call(self.functions[number], [x, *operands, y], start, stop)

    def row_zero(self, number: int, lows: list[Index]) -> Value:
        """Where the image's first row would lie in a buffer."""
        b = self.b
        row = self.chain.stages[number].y_strides[1]
        return b.at(self.buffers[number], b.mul(b.mul(lows[number], -1), row))
