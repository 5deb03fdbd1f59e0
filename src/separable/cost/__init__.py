"""The account: parameters, multiply-adds, memory, traffic and latency of a network."""

from .account import Account, Cost, Row
from .counting import count, total_learnables
from .formulas import Operation, formula

__all__ = ["Account", "Cost", "Operation", "Row", "count", "formula", "total_learnables"]
