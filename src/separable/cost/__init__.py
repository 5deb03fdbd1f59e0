"""The account: parameters, multiply-adds, memory, traffic and latency of a network."""

from .account import Account, Cost, Row
from .comparison import Comparison, compare
from .counting import count, total_learnables
from .measurement import LayerTime, Measurement
from .measuring import measure, measure_interleaved
from .operation import Operation, formula

__all__ = [
    "Account",
    "Comparison",
    "Cost",
    "LayerTime",
    "Measurement",
    "Operation",
    "Row",
    "compare",
    "count",
    "formula",
    "measure",
    "measure_interleaved",
    "total_learnables",
]
