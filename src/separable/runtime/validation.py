"""What a description may say: its types, and the floats its kernel touches.

Descriptions that come out of a file are checked here before any code is generated or loaded for
them. Strides are never negative, so what a kernel touches of an operand is a run of floats that
starts where the operand does; `footprints` gives its length.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .emit import chain, relayout, resample
from .emit.chain import Chain, ChainTile, Stage
from .emit.conv import Conv, ConvTile
from .emit.elementwise import Map
from .emit.expression import PRIMITIVES, Expression, operands_of
from .emit.kernel import Kernel
from .emit.reduction import REDUCTIONS, SOFTMAXES, Columns, Rows
from .emit.relayout import Relayout
from .emit.resample import Resample
from .emit.window import Window, WindowTile
from .graph import MOST_TAPS
from .machine import Machine
from .memory import Buffer

_LARGEST = 1 << 40  # of any whole number in a file: offsets in bytes stay far from overflow
_PAIR = 2


def parsed(hint: Any, value: Any, name: str = "") -> Any:
    """What JSON says, as the type that an annotation names.

    Args:
        hint: `int` (0 or more), `float`, `str`, `bool`, `None`, a tuple, a union, a dataclass, or
            `Any`, which stands for an expression.
        value: of `json.loads`.
        name: of the value, for errors.

    Raises:
        ValueError: if the value is of another type, or out of its range.
    """
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = [field.name for field in dataclasses.fields(hint)]
        if not isinstance(value, dict) or set(value) != set(names):
            raise ValueError(f"{name or 'it'} must have exactly the entries {', '.join(names)}")
        return typing.cast(type, hint)(**{n: parsed(hints[n], value[n], n) for n in names})
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [each for each in arguments if each is not types.NoneType]
        return None if value is None else parsed(inner[0], value, name)
    if origin is tuple and isinstance(value, list | tuple):
        repeated = arguments[-1] is Ellipsis
        expected = [arguments[0]] * len(value) if repeated else list(arguments)
        if len(expected) == len(value):
            return tuple(parsed(h, v, name) for h, v in zip(expected, value, strict=True))
    elif hint is Any:
        return _expression(value)
    elif hint is int and type(value) is int and 0 <= value < _LARGEST:
        return value
    elif hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif hint in (str, bool) and type(value) is hint:
        return value
    raise ValueError(f"{name} (={str(value)[:60]}) is not what it should be")


def _expression(value: Any) -> Expression:
    if type(value) in (int, float):
        return value
    if isinstance(value, list | tuple) and value:
        kind, *parts = value
        if kind == "x" and len(parts) == 1 and type(parts[0]) is int and parts[0] >= 0:
            return ("x", parts[0])
        if isinstance(kind, str) and kind in PRIMITIVES:
            # the emitter's parameters: the builder, then the operands
            arity = len(inspect.signature(PRIMITIVES[kind][0]).parameters) - 1
            if len(parts) == arity:
                return (kind, *map(_expression, parts))
    raise ValueError(f"epilogue (={str(value)[:60]}) has a part that is no expression")


def footprints(kernel: Kernel) -> list[int]:
    """Per argument of a kernel, how many floats from its address on it may touch.

    Raises:
        ValueError: if the description contradicts itself.
    """
    if isinstance(kernel.does, Chain):
        return _chain(kernel.does, kernel)
    lengths, operands = _FOOTPRINTS[type(kernel.does)](kernel.does, kernel)
    used = operands_of(getattr(kernel.does, "epilogue", ("x", 0)))
    if used and max(used) >= operands:
        raise ValueError(f"epilogue reads operand {max(used)}, the kernel has {operands}")
    return lengths


def _chain(does: Chain, kernel: Kernel) -> list[int]:
    tile, stages = kernel.tile, does.stages
    known = all(isinstance(stage, Stage) for stage in stages)
    if not isinstance(tile, ChainTile) or len(stages) < 2 or not known:
        raise ValueError("a chain is of several convolutions and windows, and needs a `tile`")
    first, *inner, last = stages
    _require(
        batch=all(stage.batch == first.batch for stage in stages),
        groups=all(not isinstance(stage, Conv) or stage.groups == 1 for stage in stages),
        w_strides=not any(isinstance(stage, Conv) and stage.w_strides for stage in stages),
        extra_strides=not any(stage.extra_strides for stage in stages[:-1]),
        rows=1 <= tile.rows <= last.size[0],
        bands=tile.bands >= 1,
        tiles=len(tile.tiles) == len(stages)
        and all(
            cut is None or (cut.rows == cut.panels == 1 and cut.pixels <= stage.size[1])
            for stage, cut in zip(stages, tile.tiles, strict=False)
        ),
    )
    for before, after in itertools.pairwise(stages):
        if before.size != after.in_size or chain.outputs(before) != chain.inputs(after):
            raise ValueError("a stage of a chain does not fit the one before")
    if chain.joined(stages) != does:
        raise ValueError("the buffers of a chain have strides of their own")
    # Between stages lies one image at a time; the first one's results have no other place.
    height, width, channels = *first.size, chain.outputs(first)
    dense = height * width * channels, width * channels, channels
    walk = dense + (1,) * isinstance(first, Relayout)
    alone = [replace(first, y_strides=walk), *(replace(stage, batch=1) for stage in inner), last]
    cuts = [
        WindowTile(rows=1, vectors=1) if isinstance(stage, Window) else cut
        for stage, cut in zip(alone, tile.tiles, strict=True)
    ]
    parts = [
        footprints(Kernel(stage, kernel.machine, cut))
        for stage, cut in zip(alone, cuts, strict=True)
    ]
    operands = [length for part in parts for length in part[1:-1]]
    return [parts[0][0], *operands, chain.scratch_size(does, tile.rows), parts[-1][-1]]


def _reach(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """One past the last float of a strided array."""
    if len(sizes) != len(strides) or min(sizes, default=1) < 1:
        raise ValueError(f"sizes {tuple(sizes)} and strides {tuple(strides)} do not fit")
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _written(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """The same of an output, whose values all have places of their own."""
    reach = _reach(sizes, strides)
    if math.prod(sizes) > reach:
        raise ValueError(f"outputs of sizes {tuple(sizes)} overlap")
    return reach


def _require(**conditions: bool) -> None:
    for name, holds in conditions.items():
        if not holds:
            raise ValueError(f"`{name}` is out of its range")


def _padded(channels: int, machine: Machine) -> int:
    return -(-channels // machine.width) * machine.width


def _sliding(does: Conv | Window) -> None:
    """Conditions on the filter of a convolution or pool."""
    _require(
        kernel=all(1 <= k <= MOST_TAPS for k in does.kernel),
        stride=min(does.stride) >= 1,
        dilation=min(does.dilation) >= 1,
        in_size=min(does.in_size) >= 1,
        extra_strides=all(len(e) == 4 and e[3] in (0, 1) for e in does.extra_strides),
    )


def _conv(does: Conv, kernel: Kernel) -> tuple[list[int], int]:
    tile = kernel.tile
    _sliding(does)
    if not isinstance(tile, ConvTile):
        raise ValueError("a convolution needs a `tile`")
    inputs, outputs = does.channels
    _require(
        tile=min(dataclasses.astuple(tile)) >= 1
        and tile.pixels * tile.vectors <= kernel.machine.registers
        and tile.rows <= does.batch * does.size[0]
        and tile.blocks <= does.size[1]
        and tile.panels <= _padded(outputs, kernel.machine),
        small=not does.small
        or (
            does.groups == tile.vectors == does.x_strides[3] == 1
            and kernel.machine.width % inputs == outputs % inputs == 0
        ),
    )
    out = (does.batch, *does.size, does.groups * outputs)
    x = _reach((does.batch, *does.in_size, does.inputs), does.x_strides)
    extras = [_reach(out, strides) for strides in does.extra_strides]
    y = _written(out, (*does.y_strides, 1))
    if does.w_strides:
        alone = Conv(
            does.batch, does.size, does.size, does.channels, does.x_strides, does.y_strides
        )
        kept = {name: getattr(does, name) for name in ("w_strides", "extra_strides", "epilogue")}
        _require(w_strides=replace(alone, **kept) == does)  # a pointwise convolution
        sizes = (does.batch, does.size[0], inputs, outputs)
        return [x, _reach(sizes, (*does.w_strides, 1)), *extras, y], 1 + len(extras)
    padded = does.groups * _padded(outputs, kernel.machine)
    return [x, padded * does.depth, padded, *extras, y], 1 + len(extras)


def _window(does: Window, kernel: Kernel) -> tuple[list[int], int]:
    tile = kernel.tile
    _sliding(does)
    if not isinstance(tile, WindowTile):
        raise ValueError("a window needs a `tile`")
    weighted = does.kind == "conv"
    _require(
        tile=1 <= tile.rows <= does.batch * does.size[0]
        and 1 <= tile.vectors <= _padded(does.channels, kernel.machine),
        kind=does.kind in ("conv", "max", "mean"),
        multiplier=does.multiplier == 1 or (weighted and does.multiplier > 1),
    )
    out = (does.batch, *does.size, does.channels * does.multiplier)
    x = _reach((does.batch, *does.in_size, does.channels), (*does.x_strides, 1))
    padded = _padded(does.channels, kernel.machine) * does.multiplier
    weights = [padded * math.prod(does.kernel), padded] if weighted else []
    extras = [_reach(out, strides) for strides in does.extra_strides]
    return [x, *weights, *extras, _written(out, (*does.y_strides, 1))], 1 + len(extras)


def _relayout(does: Relayout, kernel: Kernel) -> tuple[list[int], int]:
    sizes = (does.batch, *does.size, does.channels)
    x, y = _reach(sizes, does.x_strides), _written(sizes, does.y_strides)
    _require(y_strides=relayout.is_square(does))
    return [x, y], 1


def _map(does: Map, kernel: Kernel) -> tuple[list[int], int]:
    operands = [_reach(does.sizes, strides) for strides in does.x_strides]
    _require(sizes=len(does.sizes) >= 1)
    return [*operands, _written(does.sizes, does.y_strides)], len(operands)


def _columns(does: Columns, kernel: Kernel) -> tuple[list[int], int]:
    x = _reach((*does.kept, *does.reduced), (*does.x_kept, *does.x_reduced))
    _require(
        kind=does.kind in REDUCTIONS,
        kept=len(does.kept) >= 1,
        x_kept=does.x_kept[-1:] == (1,),
    )
    extras = [_reach(does.kept, strides) for strides in does.extra_strides]
    return [x, *extras, _written(does.kept, does.y_strides)], 1 + len(extras)


def _rows(does: Rows, kernel: Kernel) -> tuple[list[int], int]:
    _require(
        kind=does.kind in ("norm", "log_softmax", *SOFTMAXES, *REDUCTIONS),
        sizes=len(does.sizes) >= 1,
        x_strides=does.x_strides[-1:] == (1,),
        y_strides=does.kind not in SOFTMAXES or does.y_strides[-1:] == (1,) or does.sizes[-1] == 1,
    )
    out = (*does.sizes[:-1], 1) if does.kind in REDUCTIONS else does.sizes
    extras = [_reach(out, strides) for strides in does.extra_strides]
    x, y = _reach(does.sizes, does.x_strides), _written(out, does.y_strides)
    return [x, *extras, y], 1 + len(extras)


def _resample(does: Resample, kernel: Kernel) -> tuple[list[int], int]:
    _require(kind=does.kind in resample.KINDS)
    out = (does.batch, *does.size, does.channels)
    x = _reach((does.batch, *does.in_size, does.channels), (*does.x_strides, 1))
    extras = [_reach(out, strides) for strides in does.extra_strides]
    y = _written(out, (*does.y_strides, 1))
    return [x, sum(does.size) * resample.ENTRY, *extras, y], 1 + len(extras)


def check_footprint(kernel: Kernel, arguments: Sequence[tuple[Buffer, int]]) -> None:
    """Refuse arguments that a kernel would read or write beyond.

    Args:
        kernel: whose description is checked too.
        arguments: its buffers, and where in them it begins.

    Raises:
        ValueError: there are others than it takes, or one ends too early.
    """
    needs = footprints(kernel)
    if len(needs) != len(arguments):
        raise ValueError(f"a kernel of {len(needs)} arguments has {len(arguments)}")
    for (buffer, offset), need in zip(arguments, needs, strict=True):
        if offset + need > buffer.size:
            raise ValueError(
                f"a kernel needs floats {offset} to {offset + need} of a buffer of {buffer.size}"
            )


# description: floats touched per argument, and the number of the epilogue's operands
_FOOTPRINTS: dict[type, Callable[[Any, Kernel], tuple[list[int], int]]] = {
    Conv: _conv,
    Window: _window,
    Relayout: _relayout,
    Map: _map,
    Columns: _columns,
    Rows: _rows,
    Resample: _resample,
}
