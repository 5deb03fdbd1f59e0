"""Which steps are joined into chains, and how a chain is cut: a cost model of few constants."""

from __future__ import annotations

from dataclasses import replace

from .emit.chain import Stage, is_flat
from .emit.conv import Conv, ConvTile
from .machine import Machine
from .tiles import choose_tile


def stage_tile(stage: Stage, rows: int, machine: Machine) -> ConvTile | None:
    """The tile of a stage that computes some `rows` at once, of a convolution."""
    if not isinstance(stage, Conv):
        return None
    if not is_flat(stage):
        tile = choose_tile(stage, machine, 1)
        return replace(tile, rows=1, blocks=stage.size[1], panels=1)
    row = (1, rows * stage.size[1])
    tile = choose_tile(replace(stage, batch=1, size=row, in_size=row), machine, 1)
    return replace(tile, pixels=min(tile.pixels, stage.size[1]))
