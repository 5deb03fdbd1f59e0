"""Which steps are joined into chains, and how a chain is cut: a cost model of few constants.

Apart and in a chain, the arithmetic is nearly the same. A chain saves what lies between its stages
the way to memory beyond the L2 cache and back, and a step that all threads wait for. It pays with
rows that its tasks compute twice, rows that move within a buffer, and weights that are read again
for every band.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from ..emit import chain as chains
from ..emit import relayout
from ..emit.chain import Chain, ChainTile, Stage
from ..emit.conv import Conv, ConvTile
from ..emit.driver import MOST_ARGUMENTS
from ..emit.elementwise import Map, transposed_axis
from ..emit.expression import operand
from ..emit.kernel import Description, Kernel
from ..emit.relayout import Relayout
from ..emit.tiling import even_sizes
from ..emit.window import Window
from ..graph import Node
from ..machine import Machine
from ..memory import Buffer
from ..steps import Step
from .tiles import block_cycles, choose_conv_tile

_LONGEST = 4  # convolutions in a chain
_TASKS_PER_THREAD = 4
# Cycles per byte of what does not stay in the L2 cache, and of rows that move within it.
_WRITE, _READ, _MOVE = 0.06, 0.04, 0.06
_ROOM = 0.6  # of L2, for the rows and weights of a chain
_STEP = 300.0  # cycles to begin a step, and once more per further thread
# A chain must be better by so much; its tasks are fewer, so that threads wait longer for the last.
_MARGIN, _MARGIN_OF_THREADS = 1.01, 1.03


def fuse_chains(steps: Sequence[Step], machine: Machine, threads: int) -> list[Step]:
    """Join steps into chains where the model finds that faster.

    Args:
        steps: in execution order; the result of each is written once.
        machine: the CPU they run on.
        threads: of one call.
    """
    result = [step for path in paths(steps) for step in _best_cut(path, machine, threads)]
    position = {step: i for i, step in enumerate(steps)}
    # A chain runs where its last stage did: all that it reads is there by then.
    return sorted(result, key=lambda step: position[step.replaces[-1] if step.replaces else step])


def _best_cut(path: list[Step], machine: Machine, threads: int) -> list[Step]:
    """The cheapest way to cut a path of steps into chains and steps on their own."""
    best: list[tuple[float, list[Step]]] = [(0.0, [])]
    for end in range(1, len(path) + 1):
        options = []
        for start in range(max(0, end - _LONGEST - 2), end):
            cycles, steps = best[start]
            option = _option(path[start:end], machine, threads)
            if option:
                options.append((cycles + option[0], [*steps, option[1]]))
        best.append(min(options, key=lambda each: each[0]))
    return best[-1][1]


def _option(steps: list[Step], machine: Machine, threads: int) -> tuple[float, Step] | None:
    """What steps cost as one, and that one; `None` if they cannot be joined."""
    if len(steps) == 1:
        kernel = steps[0].kernel
        return (cycles_alone(kernel, threads) if kernel else 0.0), steps[0]
    chain = chain_of(steps)
    if chain is None:
        return None
    cycles, tile = min(
        ((chained_cycles(chain, tile, machine, threads), tile)
         for tile in chain_tiles(chain, steps, machine, threads)),
        key=lambda each: each[0],
    )  # fmt: skip
    return cycles, join(steps, chain, tile, machine)


# -- chains out of steps ---------------------------------------------------------------------------


def paths(steps: Sequence[Step]) -> list[list[Step]]:
    """All steps, in runs in which each one's result is read by the next one alone."""
    readers = _readers(steps)
    led = set(readers.values())
    result = []
    for step in steps:
        if step not in led:
            path = [step]
            while path[-1] in readers:
                path.append(readers[path[-1]])
            result.append(path)
    return result


def _readers(steps: Sequence[Step]) -> dict[Step, Step]:
    """For each step whose result only one other step reads, as its input: that step."""
    touched: dict[Buffer, list[tuple[Step, int]]] = {}
    for step in steps:
        for number, (buffer, _) in enumerate(step.arguments):
            touched.setdefault(buffer, []).append((step, number))
    readers: dict[Step, Step] = {}
    for buffer, uses in touched.items():
        if buffer.kind != "arena" or len(uses) != 2:
            continue
        (writer, last), (reader, first) = uses
        if last == len(writer.arguments) - 1 and first == 0 and _is_stage(writer, reader):
            readers[writer] = reader
    return readers


def _is_stage(*steps: Step) -> bool:
    def can_be(does: Description) -> bool:
        if isinstance(does, Map):
            return does.epilogue == operand(0) and transposed_axis(does) is not None
        return isinstance(does, Window) or (
            isinstance(does, Conv) and does.groups == 1 and not does.w_strides
        )

    return all(step.kernel and can_be(step.kernel.does) for step in steps)


def chain_of(steps: Sequence[Step]) -> Chain | None:
    """The chain that computes what some steps do, or `None` if there is none."""
    stages = _as_images([step.kernel.does for step in steps if step.kernel])
    if stages is None:
        return None
    arguments = 3 + sum(len(step.arguments) - 2 for step in steps)
    if arguments > MOST_ARGUMENTS or any(stage.extra_strides for stage in stages[:-1]):
        return None
    for before, after in itertools.pairwise(stages):
        sizes = (before.batch, *before.size)
        walks = zip(sizes, before.y_strides[:3], after.x_strides[:3], strict=True)
        if before.size != after.in_size or chains.outputs(before) != chains.inputs(after):
            return None
        if any(size > 1 and a != b for size, a, b in walks):
            return None
    return chains.joined(stages)


def _as_images(does: Sequence[Description]) -> list[Stage] | None:
    """Stages with the batch, height and width of their images; `None` if they make no chain."""
    copies = [isinstance(one, Map) for one in does]
    if any(copies[1:-1]) or not 1 <= copies.count(False) <= _LONGEST:
        return None
    # Pointwise convolutions are scheduled as one row of pixels; windows know the images. Where
    # there is none, pixels can be cut into any rows.
    for one in does:
        if isinstance(one, Window) or (isinstance(one, Conv) and not _is_row(one)):
            batch, size = one.batch, one.in_size
            break
    else:
        copy = does[0] if copies[0] else does[-1]
        if not isinstance(copy, Map):
            return None
        batch, size = relayout.rows(copy, gathers=copies[0])
    stages: list[Stage] = []
    for i, one in enumerate(does):
        if isinstance(one, Map):
            stage: Stage | None = relayout.of_map(one, batch, size, gathers=i == 0)
        else:
            assert isinstance(one, Conv | Window)
            stage = _as_image(one, batch, size)
        if stage is None or stage.batch != batch:
            return None
        stages.append(stage)
        size = stage.size
    return stages


def _is_row(conv: Conv) -> bool:
    """Whether positions do not touch one another, so that its pixels may be cut into any rows."""
    return conv.kernel == (1, 1) and conv.padding == (0, 0) and conv.size == conv.in_size


def _as_image(stage: Conv | Window, batch: int, size: tuple[int, int]) -> Stage | None:
    """A stage that reads images of this batch, height and width."""
    if (stage.batch, stage.in_size) == (batch, size) or isinstance(stage, Window):
        return stage
    h, w = size
    if not _is_row(stage) or (stage.batch, *stage.size) != (1, 1, batch * h * w):
        return None

    def walk(pixel: int) -> tuple[int, int, int]:
        return (h * w * pixel, w * pixel, pixel)

    return replace(
        stage,
        batch=batch,
        size=size,
        in_size=size,
        x_strides=(*walk(stage.x_strides[2]), stage.x_strides[3]),
        y_strides=walk(stage.y_strides[2]),
        extra_strides=tuple((*walk(e[2]), e[3]) for e in stage.extra_strides),
    )


def join(steps: Sequence[Step], chain: Chain, tile: ChainTile, machine: Machine) -> Step:
    """One step that does what some do."""
    first, last = steps[0], steps[-1]
    names = [name for s in steps if s.node for name in (s.node.name, *s.node.absorbed)]
    node = Node("chain", last.node.shape if last.node else None, name=names[0], absorbed=names[1:])
    operands = [argument for step in steps for argument in step.arguments[1:-1]]
    scratch = Buffer("scratch", chains.scratch_size(chain, tile.rows))
    arguments = [first.arguments[0], *operands, (scratch, 0), last.arguments[-1]]
    return Step(node, arguments, Kernel(chain, machine, tile), replaces=tuple(steps))


# -- the cost model --------------------------------------------------------------------------------


def stage_tile(stage: Stage, machine: Machine, vectors: int = 0) -> ConvTile | None:
    """How a stage is cut within a chain, if it is a convolution.

    Args:
        stage: of a chain.
        machine: the CPU it runs on.
        vectors: of output channels per block, where the weights are packed already.
    """
    if not isinstance(stage, Conv):
        return None
    height, width = stage.size
    row = (1, height * width if chains.is_flat(stage) else width)
    tile = choose_conv_tile(replace(stage, batch=1, size=row, in_size=row), machine, 1, vectors)
    return replace(tile, pixels=min(tile.pixels, width), rows=1, blocks=width, panels=1)


def chain_tiles(
    chain: Chain, steps: Sequence[Step], machine: Machine, threads: int
) -> list[ChainTile]:
    """All ways to cut a chain."""
    height = chain.stages[-1].size[0]
    cuts = [step.kernel.tile if step.kernel else None for step in steps]
    vectors = [cut.vectors if isinstance(cut, ConvTile) else 0 for cut in cuts]
    stages = zip(chain.stages, vectors, strict=True)
    tiles = tuple(stage_tile(stage, machine, count) for stage, count in stages)
    result = []
    for rows in range(1, height + 1):
        bands = -(-height // rows)
        parts = {1} if threads == 1 else {threads, 2 * threads, _TASKS_PER_THREAD * threads}
        result += [ChainTile(tiles, rows, n) for n in {-(-bands // part) for part in parts}]
    return result


def chained_cycles(chain: Chain, tile: ChainTile, machine: Machine, threads: int) -> float:
    """Estimated cycles of a chain, on the thread that takes longest."""
    stages = chain.stages
    last = stages[-1]
    bands = -(-last.size[0] // tile.rows)
    parts = -(-bands // tile.bands)
    cycles = 0.0
    overlap = 0  # rows that neighbouring bands share
    for stage, cut in zip(reversed(stages), reversed(tile.tiles), strict=True):
        height = stage.size[0]
        cycles += _arithmetic(stage, cut, _new_rows(stage, tile.rows, last), machine)
        again = (parts - 1) * min(overlap, height)
        cycles += again / height * _arithmetic(stage, cut, [height], machine)
        if stage is not last:
            cycles += (bands - parts) * overlap * 4 * stage.y_strides[1] * _MOVE
        overlap = overlap * stage.stride[0] + max(0, chains.reach(stage) - stage.stride[0])
    # Input and output rows pass through the cache, too, and heavy weights with every band.
    weights = sum(_weight_bytes(stage) for stage in stages)
    cycles += (bands - 1) * max(0, weights - machine.l2 // 2) * _READ
    widths = (stages[0].in_size[1] * chains.inputs(stages[0]), last.size[1] * chains.outputs(last))
    touched = weights + 4 * (chains.scratch_size(chain, tile.rows) + tile.rows * sum(widths))
    between = sum(_output_bytes(stage) for stage in stages[:-1]) / last.batch
    cycles += _beyond(touched, _ROOM * machine.l2) * between * (_WRITE + _READ)
    rows = [
        min(tile.rows * tile.bands, last.size[0] - i)
        for i in range(0, last.size[0], tile.rows * tile.bands)
    ]
    margin = _MARGIN if threads == 1 else _MARGIN_OF_THREADS
    cycles = margin * last.batch * cycles * _imbalance(rows * last.batch, threads)
    cycles += _passing(_input_bytes(stages[0]), _output_bytes(last), machine, threads)
    return cycles / threads + _STEP * threads


def cycles_alone(kernel: Kernel, threads: int) -> float:
    """Estimated cycles of a stage as a kernel of its own."""
    stage, tile, machine = kernel.does, kernel.tile, kernel.machine
    if isinstance(stage, Map) and (axis := transposed_axis(stage)) is not None:
        count, sides = math.prod(stage.sizes), (stage.sizes[axis], stage.sizes[-1])
        cycles = count / math.prod(sides) * _squares(*sides, machine)
        # It goes by channels, its neighbours by rows: little of either side is left in the caches.
        cycles += 4 * count * (_READ + _WRITE)
    elif isinstance(stage, Conv | Window):
        cut = tile if isinstance(tile, ConvTile) else None
        cycles = stage.batch * _arithmetic(stage, cut, None, machine)
        cycles += _passing(_input_bytes(stage), _output_bytes(stage), machine, threads)
    else:
        return 0.0
    return cycles / threads + _STEP * threads


def _imbalance(tasks: Sequence[int], threads: int) -> float:
    """The longest thread's share of tasks of these sizes over an equal one."""
    loads = [0] * threads
    for task in tasks:
        loads[loads.index(min(loads))] += task
    return max(loads) * threads / sum(loads)


def _passing(read: int, written: int, machine: Machine, threads: int) -> float:
    """Cycles for what a step reads and writes beyond the cache, half of which is others'."""
    beyond = _beyond(read + written, threads * machine.l2 // 2)
    return beyond * (read * _READ + written * _WRITE)


def _beyond(touched: float, room: float) -> float:
    """The share of so many bytes, touched in turn, for which a cache has no room."""
    return max(0.0, 1 - room / touched)


def _new_rows(stage: Stage, rows: int, last: Stage) -> list[int]:
    """The rows of a stage that each band of `rows` of the last one adds."""
    each = min(stage.size[0], max(1, rows * stage.size[0] // last.size[0]))
    whole, rest = divmod(stage.size[0], each)
    return [each] * whole + [rest] * (rest > 0)


def _arithmetic(
    stage: Stage, tile: ConvTile | None, bands: list[int] | None, machine: Machine
) -> float:
    """Cycles of a stage for one image in registers, in bands of so many rows, or alone."""
    height, width = stage.size
    if isinstance(stage, Window):
        vectors = -(-chains.outputs(stage) // machine.width)
        return height * width * vectors * (0.7 * math.prod(stage.kernel) + 1.5)
    if isinstance(stage, Relayout):
        flat = chains.is_flat(stage)
        lines = [rows * width for rows in bands or [height]] if flat else [width] * height
        return sum(_squares(line, stage.channels, machine) for line in lines)
    assert tile
    if bands is None or not chains.is_flat(stage):
        return height * block_cycles(stage, machine, even_sizes(width, tile.pixels), tile.vectors)
    blocks = sum(-(-rows * width // tile.pixels) for rows in bands)
    return block_cycles(stage, machine, [tile.pixels] * blocks, tile.vectors)


def _squares(pixels: int, channels: int, machine: Machine) -> float:
    """Cycles to copy so many pixels to another layout."""
    width = machine.width
    # A load, a store, and a shuffle per doubling of each vector of a square.
    return -(-pixels // width) * -(-channels // width) * width * (math.log2(width) + 2)


def _output_bytes(stage: Stage) -> int:
    return 4 * stage.batch * math.prod(stage.size) * chains.outputs(stage)


def _input_bytes(stage: Stage) -> int:
    return 4 * stage.batch * math.prod(stage.in_size) * chains.inputs(stage)


def _weight_bytes(stage: Stage) -> int:
    return 4 * stage.depth * stage.channels[1] if isinstance(stage, Conv) else 0
