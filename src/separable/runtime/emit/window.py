"""Sliding windows over each channel alone: depthwise convolutions and pools.

    for each task (vectors of channels × output rows), for each of its rows:
      for each block of pixels, for each vector of channels:
        accumulators = bias
        for each tap row inside the image, for each tap:
          accumulators = combine(accumulators, input pixels, weights)
        output = epilogue(accumulators, extras)

Pixels that neighbouring windows share are loaded once per tap row. Columns outside the image are
left out when the code is generated, rows when it runs, so the inner loop has no border in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from llvmlite import ir

from ..machine import Machine
from . import expression
from .builder import F32, I32, Builder, Index, Value
from .elementwise import load_strided
from .expression import Expression
from .tiling import Run, surroundings, taps_inside, window_runs


@dataclass(frozen=True)
class Window:
    """A depthwise convolution or pool; every size and stride is fixed, in floats.

    Attributes:
        kind: `"conv"`, `"max"`, or `"mean"`, which leaves padding out of the count.
        batch: images.
        size: output (height, width).
        in_size: input (height, width).
        channels: input channels, neighbours in memory.
        kernel: (height, width) of the window.
        x_strides: input strides along (N, H, W).
        y_strides: output strides along (N, H, W).
        stride: of the window.
        padding: positions before the first row and column.
        dilation: of the window.
        multiplier: output channels per input channel.
        extra_strides: strides along (N, H, W, C) of each further operand; C's is 0 or 1.
        epilogue: of the window's result (operand 0) and the extras (1, 2, ...).
    """

    kind: str
    batch: int
    size: tuple[int, int]
    in_size: tuple[int, int]
    channels: int
    kernel: tuple[int, int]
    x_strides: tuple[int, ...]
    y_strides: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    extra_strides: tuple[tuple[int, ...], ...] = ()
    epilogue: Expression = ("x", 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates, padding included; none in a pool."""
        if self.kind != "conv":
            return 0
        outputs = self.batch * self.size[0] * self.size[1] * self.channels * self.multiplier
        return outputs * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class WindowTile:
    """How a window is cut.

    Attributes:
        rows: output rows per task.
        vectors: vectors of channels per task.
    """

    rows: int
    vectors: int


def task_grid(window: Window, tile: WindowTile, machine: Machine) -> tuple[int, int]:
    """Tasks along (channels, rows)."""
    vectors = -(-window.channels // machine.width)
    return -(-vectors // tile.vectors), -(-window.batch * window.size[0] // tile.rows)


def pixels_per_block(window: Window, machine: Machine) -> int:
    """How many neighbouring windows are computed together, by the registers they take."""
    kw, stride = window.kernel[1], window.stride[1]

    def registers(pixels: int) -> int:
        inputs = (pixels - 1) * min(stride, kw) + min(kw, 4)
        return pixels * window.multiplier + inputs + 2

    best = 1
    for pixels in range(1, 9):
        if registers(pixels) <= machine.registers:
            best = pixels
    return best


def pack(
    window: Window, machine: Machine, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay weights out in the order the kernel reads them.

    Args:
        window: the depthwise convolution.
        machine: its vector width decides the layout.
        weight: `[channels × multiplier, 1, kh, kw]`.
        bias: `[channels × multiplier]` or `None`.

    Returns:
        Weights `[multiplier][kh][kw][channels]` and bias `[multiplier][channels]`, channels filled
        up with zeros to whole vectors, both flat.
    """
    channels, multiplier = window.channels, window.multiplier
    fill = -channels % machine.width
    w = weight.detach().reshape(channels, multiplier, *window.kernel).permute(1, 2, 3, 0)
    b = weight.new_zeros(channels * multiplier) if bias is None else bias.detach()
    b = b.reshape(channels, multiplier).t()
    return F.pad(w, (0, fill)).flatten(), F.pad(b, (0, fill)).flatten()


def emit(window: Window, tile: WindowTile, machine: Machine) -> str:
    """Generate the kernel; its arguments are input, weights, bias, extras and output.

    A pool has no weights and bias.
    """
    b = Builder(machine, (4 if window.kind == "conv" else 2) + len(window.extra_strides))
    emitter = _Emitter(window, b)
    b.loop(b.begin, b.end, lambda task: emitter.task(task, tile))
    return b.finish()


def define_rows(window: Window, b: Builder) -> None:
    """Write the kernel into `b`, a function with its arguments, each output row a task."""
    emitter = _Emitter(window, b)
    b.loop(b.begin, b.end, lambda row: emitter.row(row, 0, window.channels))


class _Emitter:
    def __init__(self, window: Window, b: Builder) -> None:
        self.window, self.b = window, b
        weighted = window.kind == "conv"
        self.x, *others, self.y = b.pointers
        self.w, self.bias = others[:2] if weighted else (self.x, self.x)
        self.extras = others[2:] if weighted else others
        self.padded = -(-window.channels // b.width) * b.width
        self.runs = window_runs(window, pixels_per_block(window, b.machine))

    def task(self, task: Index, tile: WindowTile) -> None:
        b, window = self.b, self.window
        shares, bands = task_grid(window, tile, b.machine)
        share, band = b.divmod(task, bands) if shares > 1 else (0, task)

        def part(number: Index, size: int, length: int) -> tuple[Index, Index]:
            start = b.mul(number, size)
            return start, b.minimum(b.add(start, size), length)

        lanes = part(share, tile.vectors * b.width, window.channels)
        if tile.rows == 1:
            self.row(band, *lanes)
        else:
            rows = part(band, tile.rows, window.batch * window.size[0])
            b.loop(*rows, lambda row: self.row(row, *lanes))

    def row(self, number: Index, first: Index, last: Index) -> None:
        """Emit an output row of the channels `first <= c < last`."""
        b, window = self.b, self.window
        image, row = b.divmod(number, window.size[0])
        if window.batch == 1:
            image, row = 0, number
        kh = window.kernel[0]
        top = b.add(b.mul(row, window.stride[0]), -window.padding[0])
        low, high = taps_inside(b, top, window)

        def blocks(low: Index, high: Index) -> None:
            for run in self.runs:
                self.blocks(run, (image, row), top, (low, high), (first, last))

        if isinstance(low, int) or kh > 3:
            blocks(low, high)
            return
        # Straight-line code for the rows whose whole window is inside.
        inside = b.ir.icmp_signed("==", b.index(b.add(high, b.mul(low, -1))), b.index(kh))
        with b.ir.if_else(inside) as (then, otherwise):
            with then:
                blocks(0, kh)
            with otherwise:
                blocks(low, high)

    def blocks(
        self,
        run: Run,
        place: tuple[Index, Index],
        top: Index,
        taps: tuple[Index, Index],
        lanes: tuple[Index, Index],
    ) -> None:
        b, window = self.b, self.window
        first, last = lanes
        image, row = place
        whole = window.channels - window.channels % b.width

        def block(number: Index) -> None:
            column = b.add(run.start, b.mul(number, run.size))
            corner = b.add(b.mul(column, window.stride[1]), -window.padding[1])
            x = b.at(self.x, b.dot((image, top, corner), window.x_strides))
            position = (image, row, column)

            def channels(c: Index, count: int) -> None:
                sums = self.taps(run, b.at(x, c), c, *taps, count)
                self.epilogue(run, position, c, sums, count)

            b.loop(first, b.minimum(last, whole), lambda c: channels(c, b.width), step=b.width)
            if whole < window.channels:
                b.loop(
                    whole, last, lambda c: channels(whole, window.channels - whole), step=b.width
                )

        b.loop(0, run.count, block)

    def taps(
        self, run: Run, x: Value, c: Index, low: Index, high: Index, count: int
    ) -> list[Value]:
        b, window = self.b, self.window
        kh, kw = window.kernel
        multiplier = window.multiplier
        if window.kind == "conv":
            each = [b.load(b.at(self.bias, c, j * self.padded)) for j in range(multiplier)]
        else:
            each = [b.constant(float("-inf") if window.kind == "max" else 0.0)]

        def line(ky: Index, *sums: Value) -> list[Value]:
            result = list(sums)
            source = b.at(x, b.mul(ky, window.dilation[0] * window.x_strides[1]))
            pixels: dict[int, Value] = {}
            for kx in range(kw):
                weights = []
                if window.kind == "conv":
                    at = b.at(self.w, b.add(c, b.mul(ky, kw * self.padded)), kx * self.padded)
                    weights = [
                        b.load(b.at(at, j * kh * kw * self.padded)) for j in range(multiplier)
                    ]
                for i in range(*run.taps[kx]):
                    column = i * window.stride[1] + kx * window.dilation[1]
                    if column not in pixels:
                        pixel = b.at(source, column * window.x_strides[2])
                        pixels[column] = b.load(pixel, count)
                    for j in range(multiplier):
                        at = i * multiplier + j
                        weight = weights[j] if weights else None
                        result[at] = self.combine(result[at], pixels[column], weight)
            return result

        sums = b.loop(low, high, line, each * run.size)
        if window.kind == "mean":
            rows = b.ir.sitofp(b.index(b.add(high, b.mul(low, -1))), F32)
            columns = [sum(i in range(*tap) for tap in run.taps) for i in range(run.size)]
            sums = [
                b.ir.fdiv(value, b.broadcast(b.ir.fmul(rows, b.constant(float(n), F32))))
                for value, n in zip(sums, columns, strict=True)
            ]
        return sums

    def combine(self, total: Value, pixel: Value, weight: Value | None) -> Value:
        if weight is not None:
            return self.b.fma(pixel, weight, total)
        if self.window.kind == "max":
            return self.b.intrinsic("maximum", total, pixel)
        return self.b.ir.fadd(total, pixel)

    def epilogue(
        self, run: Run, position: Sequence[Index], c: Index, sums: list[Value], count: int
    ) -> None:
        b, window = self.b, self.window
        multiplier = window.multiplier
        channel = b.mul(c, multiplier)
        out = b.at(self.y, b.add(b.dot(position, window.y_strides), channel))
        extras = [
            b.at(pointer, b.dot((*position, channel), strides))
            for pointer, strides in zip(self.extras, window.extra_strides, strict=True)
        ]
        for i in range(run.size):
            mine = _interleave(b, sums[i * multiplier : (i + 1) * multiplier])
            for v, result in enumerate(mine):
                lanes = min(b.width, count * multiplier - v * b.width)
                if lanes <= 0:
                    break

                def load(
                    number: int, i: int = i, v: int = v, lanes: int = lanes, result: Value = result
                ) -> Value:
                    if number == 0:
                        return result
                    *_, along, lane = window.extra_strides[number - 1]
                    source = b.at(extras[number - 1], i * along + v * b.width * lane)
                    return load_strided(b, source, lane, lanes)

                value = expression.emit(b, window.epilogue, load)
                b.store(value, b.at(out, i * window.y_strides[2] + v * b.width), lanes)


def _interleave(b: Builder, vectors: list[Value]) -> list[Value]:
    """Lanes `a0 b0 a1 b1 ...` of equally long vectors `a`, `b`, ..."""
    if len(vectors) == 1:
        return vectors
    results = []
    for out in range(len(vectors)):
        result = ir.Constant(vectors[0].type, ir.Undefined)
        places = [divmod(out * b.width + lane, len(vectors)) for lane in range(b.width)]
        for j, vector in enumerate(vectors):
            lanes = [
                b.width + source if which == j else lane
                for lane, (source, which) in enumerate(places)
            ]
            mask = ir.Constant(ir.VectorType(I32, b.width), lanes)
            result = b.ir.shuffle_vector(result, vector, mask)
        results.append(result)
    return results


def reference(
    window: Window,
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    extras: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """The same in plain torch.

    Args:
        window: the depthwise convolution or pool.
        x: `[N, channels, H, W]`.
        weight: `[channels × multiplier, 1, kh, kw]` of a convolution.
        bias: `[channels × multiplier]` or `None`.
        extras: tensors that broadcast to the output.

    Returns:
        `[N, channels × multiplier, *size]`.
    """
    padding = surroundings(window)
    if window.kind == "conv":
        assert weight is not None
        padded = F.pad(x, padding)
        out = F.conv2d(
            padded, weight, bias, window.stride, 0, window.dilation, groups=window.channels
        )
    elif window.kind == "max":
        padded = F.pad(x, padding, value=float("-inf"))
        out = F.max_pool2d(padded, window.kernel, window.stride, 0, window.dilation)
    else:
        ones = torch.ones(window.channels, 1, *window.kernel, dtype=x.dtype)
        plain = replace(window, kind="conv", epilogue=("x", 0), extra_strides=())
        out = reference(plain, x, ones) / reference(plain, torch.ones_like(x), ones)
    return expression.evaluate(window.epilogue, [out, *extras])
