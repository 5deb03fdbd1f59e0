"""Every kernel family under one roof: description in, code and task count out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from ..machine import Machine
from . import chain, conv, elementwise, reduction, relayout, resample, window
from .chain import Chain, ChainTile
from .conv import Conv, ConvTile
from .elementwise import Map
from .reduction import Columns, Rows
from .relayout import Relayout
from .resample import Resample
from .window import Window, WindowTile

Description = Conv | Window | Relayout | Chain | Map | Columns | Rows | Resample
Tile = ConvTile | WindowTile | ChainTile


class Family(NamedTuple):
    """What there is to know of the kernels of one kind of description."""

    emit: Callable[[Any, Any, Machine], str]
    """of a description, its tile and the CPU: the LLVM module"""
    tasks: Callable[[Any, Any, Machine], int]
    """of the same: how many independent tasks the work is cut into"""
    tile: type[Tile] | None = None
    """how kernels of this kind are cut, if they are"""


FAMILIES: dict[type[Description], Family] = {
    Conv: Family(conv.emit, lambda does, tile, _: math.prod(conv.task_grid(does, tile)), ConvTile),
    Window: Family(window.emit, lambda *all: math.prod(window.task_grid(*all)), WindowTile),
    Chain: Family(chain.emit, lambda does, tile, _: chain.tasks(does, tile), ChainTile),
    Relayout: Family(
        lambda does, _, machine: relayout.emit(does, machine),
        lambda does, *_: relayout.tasks(does),
    ),
    Map: Family(
        lambda does, _, machine: elementwise.emit(does, machine),
        lambda does, _, machine: elementwise.tasks(does, machine),
    ),
    Columns: Family(
        lambda does, _, machine: reduction.emit_columns(does, machine),
        lambda does, _, machine: reduction.column_tasks(does, machine),
    ),
    Rows: Family(
        lambda does, _, machine: reduction.emit_rows(does, machine),
        lambda does, *_: reduction.row_tasks(does),
    ),
    Resample: Family(
        lambda does, _, machine: resample.emit(does, machine),
        lambda does, *_: resample.tasks(does),
    ),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel, specialised to shapes and strides; equal ones share their code.

    Attributes:
        does: what is computed.
        machine: the CPU it runs on.
        tile: how a convolution, a window or a chain is cut.
    """

    does: Description
    machine: Machine
    tile: Tile | None = None

    @property
    def tasks(self) -> int:
        """How many independent tasks the work is cut into."""
        return FAMILIES[type(self.does)].tasks(self.does, self.tile, self.machine)

    @property
    def ir(self) -> str:
        """The LLVM module that computes it."""
        return _ir(self)


@lru_cache(maxsize=512)
def _ir(kernel: Kernel) -> str:
    return FAMILIES[type(kernel.does)].emit(kernel.does, kernel.tile, kernel.machine)
