"""The conversion: trained networks of regular convolutions to separable ones, without labels."""

from .applying import Report, apply
from .converting import convert, merge
from .files import load, save
from .forms import SeparatedConv
from .planning import plan
from .plans import Plan, Row

__all__ = [
    "Plan",
    "Report",
    "Row",
    "SeparatedConv",
    "apply",
    "convert",
    "load",
    "merge",
    "plan",
    "save",
]
