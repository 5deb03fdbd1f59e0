"""Sums of products: the inner loop of every convolution.

    for each input channel:
      accumulators += input pixels (broadcast) × weights (vectors)

A long sum is added up in parts, and what is read next is fetched on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

from .builder import Builder, Index, Value
from .tiling import LINE

_CHAIN = 256  # products added up in one go; rounding errors grow with the root of the length
_FEW = 3 / 8  # of the registers are accumulators: the others hold what several channels need
_SHORT = 16  # channels: too few for the loop around them to matter


@dataclass(frozen=True)
class Products:
    """What is multiplied.

    Attributes:
        x: the first channel of the first pixel.
        weights: `[depth][vectors × width]`, where they are packed.
        depth: channels.
        pixels: the pixels `low <= i < high` of the block, which the sum is for.
        vectors: of weights per channel.
        x_strides: floats between (pixels, channels).
        step: floats from the weights of a channel to those of the next.
        tail: weights in the last vector of a channel.
        lanes: if not 0, so many lanes of the one vector hold outputs of groups of `depth` channels
            each, and `x` is the input channel of the first lane.
    """

    x: Value
    weights: Value
    depth: int
    pixels: tuple[int, int]
    vectors: int
    x_strides: tuple[int, int]
    step: int
    tail: int
    lanes: int = 0


def add(
    b: Builder,
    products: Products,
    sums: list[Value],
    total: int,
    ahead: tuple[int, Index, int],
) -> list[Value]:
    """Add products to the accumulators.

    Args:
        b: where to emit.
        products: what is multiplied.
        sums: an accumulator per pixel of the block and vector.
        total: products that each accumulator sees, of which these are some.
        ahead: floats from the weights to those behind them, and which of how many blocks that read
            these weights in turn this is: each fetches a share of what follows.

    Returns:
        The accumulators.
    """
    low, high = products.pixels
    if low == high:
        return sums
    if products.lanes:
        return _add_groups(b, products, sums)
    depth, vectors = products.depth, products.vectors
    pixel, step = products.x_strides
    lanes = vectors * b.width
    many = (high - low) * vectors > _FEW * b.machine.registers
    scarce = many and b.machine.registers < 32
    unroll = min(depth, 3 if depth % 3 == 0 and depth % 4 else 4)
    if scarce:
        unroll = min(unroll, 2 if vectors > 1 else 1)
    if not b.machine.fma or (many and not scarce and depth < _SHORT):
        unroll = 1
    distance, turn, turns = ahead
    fetched = 0
    if turns > 1 and depth > 4:
        # So many floats per channel: often several channels ask for one line, as each that is on
        # its way from memory holds a buffer that lines from the L2 cache need, too.
        fetched = -(-lanes // turns)
        following = b.at(products.weights, b.mul(turn, fetched * depth), distance)

    def one(x: Value, weights: Value, sums: list[Value]) -> list[Value]:
        # LLVM would load what several channels need at once, and run out of registers.
        if scarce:
            x, weights = (b.after(sums[-1], pointer) for pointer in (x, weights))
        elif many:
            b.fence()
        counts = [b.width] * (vectors - 1) + [products.tail]
        columns = [b.load(b.at(weights, v * b.width), n) for v, n in enumerate(counts)]
        result = list(sums)
        for i in range(low, high):
            value = b.broadcast(b.load_scalar(b.at(x, i * pixel)))
            for v, column in enumerate(columns):
                at = i * vectors + v
                result[at] = b.fma(value, column, sums[at])
        return result

    def chain(start: Index, length: int, sums: list[Value]) -> list[Value]:
        x = b.at(products.x, b.mul(start, step))
        weights = b.at(products.weights, b.mul(start, products.step))

        def several(k: Index, *sums: Value) -> list[Value]:
            if fetched:
                floats = b.mul(b.add(start, k), fetched)
                for line in range(-(-fetched * unroll // LINE)):
                    b.prefetch(b.at(following, floats, LINE * line))
            source, columns = b.at(x, b.mul(k, step)), b.at(weights, b.mul(k, products.step))
            result = list(sums)
            for i in range(unroll):
                result = one(b.at(source, i * step), b.at(columns, i * products.step), result)
            return result

        whole = length - length % unroll
        sums = b.loop(0, whole, several, sums, step=unroll)
        for k in range(whole, length):
            sums = one(b.at(x, k * step), b.at(weights, k * products.step), sums)
        return sums

    def part(number: Index, *sums: Value) -> list[Value]:
        partial = chain(b.mul(number, length), length, [b.zero()] * len(sums))
        return [b.ir.fadd(s, p) for s, p in zip(sums, partial, strict=True)]

    # Where the registers hold two sets of sums, more parts cost nothing.
    longest = _CHAIN if many else _CHAIN // 4
    if total <= longest:
        return chain(0, depth, sums)
    parts = -(-depth // longest)
    length = depth // parts // unroll * unroll
    sums = b.loop(0, parts, part, sums)
    return chain(parts * length, depth - parts * length, sums)


def _add_groups(b: Builder, products: Products, sums: list[Value]) -> list[Value]:
    """The same where several groups fill a vector: each lane multiplies channels of its own."""
    depth, width = products.depth, b.width
    columns = [b.load(b.at(products.weights, k * width)) for k in range(depth)]
    result = list(sums)
    for i in range(*products.pixels):
        x = b.load(b.at(products.x, i * products.x_strides[0]), products.lanes)
        for k, column in enumerate(columns):
            value = b.pick(x, [lane // depth * depth + k for lane in range(width)])
            result[i] = b.fma(value, column, result[i])
    return result
