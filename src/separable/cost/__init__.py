"""The account: parameters, multiply-adds, memory, traffic and latency of a network."""

from .account import Account, Cost, Row
from .comparison import Comparison, compare
from .counting import count, total_learnables
from .crosschecking import Crosscheck, Difference, Opinion, crosscheck
from .measurement import LayerTime, Measurement, Ratio
from .measuring import keep_freed_memory, measure, measure_interleaved
from .operation import Operation, formula

__all__ = [
    "Account",
    "Comparison",
    "Cost",
    "Crosscheck",
    "Difference",
    "LayerTime",
    "Measurement",
    "Operation",
    "Opinion",
    "Ratio",
    "Row",
    "compare",
    "count",
    "crosscheck",
    "formula",
    "keep_freed_memory",
    "measure",
    "measure_interleaved",
    "total_learnables",
]
