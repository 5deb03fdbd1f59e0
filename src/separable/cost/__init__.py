"""The account: parameters, multiply-adds, memory, traffic and latency of a network."""

from .account import Account, Cost, Row
from .counting import count, total_learnables
from .crosschecking import Crosscheck, Difference, Opinion, crosscheck
from .formulas import Operation, formula
from .measurement import LayerTime, Measurement, Ratio
from .measuring import measure, measure_interleaved

__all__ = [
    "Account",
    "Cost",
    "Crosscheck",
    "Difference",
    "LayerTime",
    "Measurement",
    "Operation",
    "Opinion",
    "Ratio",
    "Row",
    "count",
    "crosscheck",
    "formula",
    "measure",
    "measure_interleaved",
    "total_learnables",
]
