"""The report: what separable would give a network, as one page, plots, JSON and CSV."""

from .findings import Findings, Machine, Network, Point
from .layers import Layer, Side
from .reporter import report
from .summary import Headline

__all__ = ["Findings", "Headline", "Layer", "Machine", "Network", "Point", "Side", "report"]
