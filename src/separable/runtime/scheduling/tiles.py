"""How convolutions are cut for the registers, the caches and the threads: a small cost model."""

from __future__ import annotations

from ..emit.conv import Conv, ConvTile
from ..emit.kernel import Description
from ..emit.tiling import LINE, PAGE, even_sizes
from ..emit.window import Window, WindowTile
from ..machine import Machine

_TASKS_PER_THREAD = 4  # so that a thread that falls behind leaves work to the others
_HEAVY = 2  # times the pixels: weights that are better shared out
# Cycles per load, per cache line of weights that comes from the L2 cache, and per byte and vector
# of outputs that leave it in parts, and what weights from beyond it add to a cycle: measured with
# vectors of 16 on a CPU with two multiply-adds a cycle.
_LOAD, _LINE, _PART, _FAR = 0.1, 0.6, 0.2, 0.3
_PORT = 0.53  # cycles per load, at least


def choose_tile(does: Description, machine: Machine, threads: int) -> ConvTile | WindowTile | None:
    """How a kernel is cut, if it can be cut in several ways."""
    if isinstance(does, Conv):
        return choose_conv_tile(does, machine, threads)
    if isinstance(does, Window):
        return choose_window_tile(does, machine, threads)
    return None


def choose_conv_tile(conv: Conv, machine: Machine, threads: int, vectors: int = 0) -> ConvTile:
    """Pick the tile with the fewest estimated cycles, and tasks that fit half the L2 cache.

    Args:
        conv: the convolution.
        machine: the CPU it runs on.
        threads: of one call.
        vectors: of output channels per block; the best number if 0.
    """
    total = -(-conv.channels[1] // machine.width)
    candidates = [
        (pixels, vectors)
        for vectors in ([vectors] if vectors else range(1, 2 if conv.small else 9))
        for pixels in range(1, 17)
        if _fits(conv, pixels, vectors, machine) and vectors <= total and pixels <= conv.size[1]
    ]

    rows = conv.batch * conv.size[0]
    written = 4 * conv.channels[1] * rows * conv.size[1]

    def cycles(tile: tuple[int, int]) -> tuple[float, int]:
        pixels, vectors = tile
        cost = block_cycles(conv, machine, even_sizes(conv.size[1], pixels), vectors)
        # What does not stay in the cache goes to memory a panel of each pixel at a time.
        if vectors < total and conv.groups * written > threads * machine.l2 // 2:
            part = _PART * written / rows / vectors
            split = vectors * machine.width % LINE > 0  # the next part touches this one's last line
            cost += _seen(machine) * part * (1 + split)
        return cost, -vectors

    pixels, vectors = min(candidates, key=cycles)
    blocks = len(even_sizes(conv.size[1], pixels))
    panels = len(even_sizes(total, vectors))

    inputs = conv.inputs  # all groups pass over the same rows in turn
    budget = machine.l2 // 4
    row_bytes = 4 * inputs * conv.size[1] * conv.stride[0] * conv.stride[1]
    if rows > 1:
        rows_per_task, blocks_per_task = min(rows, max(1, budget // row_bytes)), blocks
    else:
        rows_per_task = 1
        block_bytes = 4 * inputs * pixels * conv.kernel[0] * conv.stride[1]
        blocks_per_task = min(blocks, max(1, budget // block_bytes))
    shares = 1
    if threads > 1:
        wanted = _TASKS_PER_THREAD * threads
        weights = 4 * conv.depth * conv.channels[1]
        read = 4 * inputs // conv.groups * rows * conv.size[1]
        # Heavy weights are shared out by channels, so that each thread reads its own. Otherwise
        # each thread keeps to its rows, which the next step finds in its cache.
        if weights > _HEAVY * (read + written) or weights > max(read, machine.l2 // 2):
            shares = min(panels, max(1, wanted // conv.groups))
        wanted = -(-wanted // (shares * conv.groups))
        if rows > 1:
            rows_per_task = min(rows_per_task, max(1, rows // wanted))
        else:
            blocks_per_task = min(blocks_per_task, max(1, blocks // wanted))
    return ConvTile(pixels, vectors, rows_per_task, blocks_per_task, shares)


def choose_window_tile(window: Window, machine: Machine, threads: int) -> WindowTile:
    """Pick tasks that find their inputs where the step before left them.

    Small images are written by channels, for their weights are heavier than their pixels, and
    larger ones by rows.

    Args:
        window: a depthwise convolution or pool.
        machine: the CPU it runs on.
        threads: of one call.
    """
    rows, vectors = window.batch * window.size[0], -(-window.channels // machine.width)
    wanted = _TASKS_PER_THREAD * threads
    if threads > 1 and window.batch * window.in_size[0] < wanted:
        return WindowTile(rows, -(-vectors // wanted))
    return WindowTile(max(1, rows // wanted), vectors)


def _fits(conv: Conv, pixels: int, vectors: int, machine: Machine) -> bool:
    """Accumulators, a channel's weights, the broadcast input, and a product without FMA."""
    if pixels == 1 and not conv.small:
        return vectors + 2 <= machine.registers
    weights = conv.channels[0] + 1 if conv.small else vectors
    # With 32 registers, LLVM spills now and then if nearly all are taken; fewer are as fast. With
    # 16, it does where there is no loop over channels.
    spare = 2 if machine.registers == 32 else int(conv.x_strides[3] != 1)
    spare += bool(conv.w_strides) and conv.channels[1] % machine.width > 0  # a mask
    taken = pixels * vectors + weights + 1 + (not machine.fma) + spare
    return taken <= machine.registers


def block_cycles(conv: Conv, machine: Machine, sizes: list[int], vectors: int) -> float:
    """Estimated cycles of blocks of these sizes, in pixels, over all output channels."""
    total = -(-conv.channels[1] // machine.width)
    arithmetic = 0.5 if machine.fma else 1.0
    arithmetic *= 1 + conv.small  # each product takes a lane of its own from the input
    cycles = 0.0
    for m, count in _counts(sizes):
        for n, panels in _counts(even_sizes(total, vectors)):
            # Two multiply-adds a cycle, and four cycles until a sum can be added to.
            step = arithmetic * m * n + _seen(machine) * _LOAD * (m + n)
            step = max(step, _PORT * (m + n), 4.0)
            if 4 * (machine.width * n + m) * conv.depth > machine.l1:
                step += _seen(machine) * _LINE * n * machine.width / LINE
            # While a panel is read, the one behind it is fetched: both are to stay in the L2 cache.
            if 8 * machine.width * n * conv.depth > 0.75 * machine.l2:
                step *= 1 + _seen(machine) * _FAR
            # Long sums hide the start and the epilogue of a block, short ones do not.
            cycles += count * panels * (step * conv.depth + 2 * m * n + 10)
    # Pixels a page apart fall into the same cache set, which holds eight lines at most.
    if conv.x_strides[2] % PAGE == 0 and max(sizes) > 4:
        cycles *= 1.5
    return cycles


def _seen(machine: Machine) -> float:
    """The share of loads that arithmetic does not hide, which takes longer in narrow vectors.

    A quarter with vectors of 8, as measured on Zen 3.
    """
    return (machine.width / 16) ** 2


def _counts(sizes: list[int]) -> list[tuple[int, int]]:
    return [(size, sizes.count(size)) for size in sorted(set(sizes))]
