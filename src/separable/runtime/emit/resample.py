"""Upsampling, padding by what is there, and adaptive pools, from tables made in advance.

for each task (an output row):
  for each pixel, for each vector of channels:
    output = epilogue(weighted sum of the neighbours, or mean or maximum of the window, extras)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..machine import Machine
from . import expression
from .builder import I64, Builder, Index, Value
from .elementwise import load_strided
from .expression import Expression

ENTRY = 4  # floats per table entry: two neighbours, two weights; or ends of a window, its size
PADDING = ("reflect", "replicate", "circular")
WINDOWS = ("mean", "max")
KINDS = ("nearest", "bilinear", *PADDING, *WINDOWS)


@dataclass(frozen=True)
class Resample:
    """An image at another size; every size and stride is fixed, in floats.

    Attributes:
        kind: `"nearest"` or `"bilinear"`; `"reflect"`, `"replicate"` or `"circular"` padding;
            `"mean"` or `"max"` of adaptive windows.
        batch: images.
        size: output (height, width).
        in_size: input (height, width).
        channels: neighbours in memory.
        x_strides: input strides along (N, H, W).
        y_strides: output strides along (N, H, W).
        align_corners: as in `torch.nn.functional.interpolate`.
        scales: given factors, or `None` to take the ratio of sizes.
        before: padding above and to the left.
        extra_strides: strides along (N, H, W, C) of each further operand.
        epilogue: of the resampled value (operand 0) and the extras (1, 2, ...).
    """

    kind: str
    batch: int
    size: tuple[int, int]
    in_size: tuple[int, int]
    channels: int
    x_strides: tuple[int, ...]
    y_strides: tuple[int, ...]
    align_corners: bool = False
    scales: tuple[float | None, float | None] = (None, None)
    before: tuple[int, int] = (0, 0)
    extra_strides: tuple[tuple[int, ...], ...] = ()
    epilogue: Expression = ("x", 0)

    @property
    def macs(self) -> int:
        """None: counted as elementwise work."""
        return 0


def tasks(resample: Resample) -> int:
    """One per output row."""
    return resample.batch * resample.size[0]


def table(resample: Resample) -> torch.Tensor:
    """Neighbours and weights of every output row, then of every output column.

    Returns:
        `[(H + W) × 4]`: first and second neighbour, and their weights, in torch's own arithmetic;
        or first and last place of a window, how many they are, and nothing.
    """
    entries = []
    axes = zip(resample.size, resample.in_size, resample.scales, resample.before, strict=True)
    for out, inside, scale, before in axes:
        at = torch.arange(out, dtype=torch.float32)
        if resample.kind in PADDING:
            entries.append(_alone(_padded(resample.kind, at - before, inside)))
            continue
        if resample.kind in WINDOWS:
            place = torch.arange(out)
            first, last = place * inside // out, ((place + 1) * inside - 1) // out
            entries.append(torch.stack([first, last, last - first + 1, place * 0], 1).float())
            continue
        double = resample.kind == "nearest" and out == 2 * inside
        if out == inside or double:  # whatever the given factor is
            entries.append(_alone((at / (1 + double)).floor()))
            continue
        if resample.kind == "nearest":
            ratio = torch.tensor(1 / scale if scale else inside / out, dtype=torch.float32)
            entries.append(_alone((at * ratio).floor().clamp(max=inside - 1)))
            continue
        if resample.align_corners:
            ratio = torch.tensor((inside - 1) / (out - 1) if out > 1 else 0.0, dtype=torch.float32)
            source = at * ratio
        else:
            ratio = torch.tensor(1 / scale if scale else inside / out, dtype=torch.float32)
            source = ((at + 0.5) * ratio - 0.5).clamp(min=0)
        first = source.floor().clamp(max=inside - 1)
        second = (first + 1).clamp(max=inside - 1)
        weight = (source - first).clamp(0, 1)
        entries.append(torch.stack([first, second, 1 - weight, weight], 1))
    return torch.cat(entries).flatten()


def _alone(place: torch.Tensor) -> torch.Tensor:
    """Entries of one neighbour each, of weight 1."""
    return torch.stack([place, place, place * 0 + 1, place * 0], 1)


def _padded(kind: str, place: torch.Tensor, inside: int) -> torch.Tensor:
    """Where the value of a place beside an axis is taken from."""
    if kind == "circular":
        return place % inside
    if kind == "reflect":
        last = inside - 1
        place = last - (last - place.abs()).abs()
    return place.clamp(0, inside - 1)


def emit(resample: Resample, machine: Machine) -> str:
    """Generate the kernel; its arguments are input, table, extras and output."""
    b = Builder(machine, 3 + len(resample.extra_strides))
    x, entries, *extras, y = b.pointers
    sides = 1 if resample.kind in ("nearest", *PADDING) else 2

    def neighbours(entry: Index) -> tuple[list[Value], list[Value]]:
        at = b.at(entries, b.mul(entry, ENTRY))
        places = [b.ir.fptosi(b.load_scalar(b.at(at, s)), I64) for s in range(sides)]
        return places, [b.broadcast(b.load_scalar(b.at(at, 2 + s))) for s in range(sides)]

    def row(t: Index) -> None:
        image, oy = b.divmod(t, resample.size[0])
        ys, wy = neighbours(oy)
        lines = [b.at(x, b.dot((image, place), resample.x_strides[:2])) for place in ys]

        def pixel(ox: Index) -> None:
            xs, wx = neighbours(b.add(ox, resample.size[0]))
            sources = [
                [b.at(line, b.mul(place, resample.x_strides[2])) for place in xs] for line in lines
            ]

            def interpolated(c: Index, count: int) -> Value:
                values = [[b.load(b.at(source, c), count) for source in line] for line in sources]
                if sides == 1:
                    return values[0][0]
                upper, lower = (
                    b.fma(first, wx[0], b.ir.fmul(second, wx[1])) for first, second in values
                )
                return b.fma(upper, wy[0], b.ir.fmul(lower, wy[1]))

            def pooled(c: Index, count: int) -> Value:
                def line(place: Index, total: Value) -> list[Value]:
                    def point(column: Index, total: Value) -> list[Value]:
                        at = b.dot((image, place, column, c), (*resample.x_strides, 1))
                        value = b.load(b.at(x, at), count)
                        if resample.kind == "mean":
                            return [b.ir.fadd(total, value)]
                        return [b.intrinsic("maximum", total, value)]

                    return b.loop(xs[0], b.add(xs[1], 1), point, [total])

                start = b.constant(0.0 if resample.kind == "mean" else float("-inf"))
                (total,) = b.loop(ys[0], b.add(ys[1], 1), line, [start])
                if resample.kind == "max":
                    return total
                return b.quotient(total, b.ir.fmul(wy[0], wx[0]))

            def channels(c: Index, count: int) -> None:
                result = (pooled if resample.kind in WINDOWS else interpolated)(c, count)

                def operand(k: int) -> Value:
                    if k == 0:
                        return result
                    strides = resample.extra_strides[k - 1]
                    at = b.at(extras[k - 1], b.dot((image, oy, ox, c), strides))
                    return load_strided(b, at, strides[3], count)

                value = expression.emit(b, resample.epilogue, operand)
                place = b.add(b.dot((image, oy, ox), resample.y_strides), c)
                b.store(value, b.at(y, place), count)

            whole = resample.channels - resample.channels % b.width
            b.loop(0, whole, lambda c: channels(c, b.width), step=b.width)
            if whole < resample.channels:
                channels(whole, resample.channels - whole)

        b.loop(0, resample.size[1], pixel)

    b.loop(b.begin, b.end, row)
    return b.finish()


def reference(
    resample: Resample, x: torch.Tensor, extras: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """The same in plain torch, `[N, C, H, W]` to `[N, C, *size]`."""
    if resample.kind in WINDOWS:
        pool = F.adaptive_avg_pool2d if resample.kind == "mean" else F.adaptive_max_pool2d
        out = pool(x, resample.size)
    elif resample.kind in PADDING:
        (top, left), (h, w), (height, width) = resample.before, resample.in_size, resample.size
        pads = (left, width - w - left, top, height - h - top)
        out = F.pad(x, pads, mode=resample.kind)
    else:
        corners = resample.align_corners if resample.kind == "bilinear" else None
        out = F.interpolate(x, resample.size, mode=resample.kind, align_corners=corners)
    return expression.evaluate(resample.epilogue, [out, *extras])
