"""Every kernel family under one roof: description in, code and task count out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

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
        match self.does:
            case Conv():
                assert isinstance(self.tile, ConvTile)
                return math.prod(conv.task_grid(self.does, self.tile))
            case Window():
                assert isinstance(self.tile, WindowTile)
                return math.prod(window.task_grid(self.does, self.tile, self.machine))
            case Relayout():
                return relayout.tasks(self.does)
            case Chain():
                assert isinstance(self.tile, ChainTile)
                return chain.tasks(self.does, self.tile)
            case Map():
                return elementwise.tasks(self.does, self.machine)
            case Columns():
                return reduction.column_tasks(self.does, self.machine)
            case Rows():
                return reduction.row_tasks(self.does)
            case Resample():
                return resample.tasks(self.does)

    @property
    def ir(self) -> str:
        """The LLVM module that computes it."""
        return _ir(self)


@lru_cache(maxsize=512)
def _ir(kernel: Kernel) -> str:
    does, machine = kernel.does, kernel.machine
    match does:
        case Conv():
            assert isinstance(kernel.tile, ConvTile)
            return conv.emit(does, kernel.tile, machine)
        case Window():
            assert isinstance(kernel.tile, WindowTile)
            return window.emit(does, kernel.tile, machine)
        case Relayout():
            return relayout.emit(does, machine)
        case Chain():
            assert isinstance(kernel.tile, ChainTile)
            return chain.emit(does, kernel.tile, machine)
        case Map():
            return elementwise.emit(does, machine)
        case Columns():
            return reduction.emit_columns(does, machine)
        case Rows():
            return reduction.emit_rows(does, machine)
        case Resample():
            return resample.emit(does, machine)
