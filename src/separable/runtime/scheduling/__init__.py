"""Nodes into steps: where each value lies in memory, which kernel runs, and on what.

Images lie channels last, so that pointwise convolutions are matrix products and every kernel walks
channels by vectors. Views cost nothing where strides can express them, and concatenated parts are
written in place. What each kind of node becomes is one function: of those with weights in
`convolutions.py`, of those that only compute in `values.py`, of those that only move in `moves.py`.
How kernels are cut is chosen in `tiles.py`, and which become one in `fusing.py`.
"""

from . import convolutions, moves, values
from .scheduler import schedule

__all__ = ["convolutions", "moves", "schedule", "values"]
