"""Torch operators as nodes: one small function per operator.

Each takes the operator's own arguments, tensors replaced by nodes, and returns a node, a tuple of
nodes, or `None` if this call of it is left to torch.
"""

from . import arithmetic, convolutions, layers, sampling, views
from .registry import LOWERINGS

__all__ = ["LOWERINGS", "arithmetic", "convolutions", "layers", "sampling", "views"]
