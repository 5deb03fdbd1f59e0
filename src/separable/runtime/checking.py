"""How far outputs are from what they should be."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

TOLERANCE = 1e-3
"""of the largest output, by which rounding in another order may change a result"""


def outputs_deviation(found: Any, expected: Any) -> float:
    """Largest `deviation` of a network's outputs, however it nests them.

    It is infinite where their numbers differ.
    """
    pairs = [
        [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
        for outputs in (found, expected)
    ]
    if len(pairs[0]) != len(pairs[1]):
        return math.inf
    return max(map(deviation, *pairs), default=0.0)


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest magnitude expected.

    It is infinite where the shapes differ, or where a value is missing or not finite that should
    be, or the other way round.
    """
    if found.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    if not expected.numel():
        return 0.0
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return math.inf
    odd = ~expected.isfinite()
    if not torch.equal(found[odd].nan_to_num(0.0), expected[odd].nan_to_num(0.0)):
        return math.inf
    difference = (found[~odd].double() - expected[~odd].double()).abs()
    if not difference.numel():
        return 0.0
    worst, scale = difference.max().item(), expected[~odd].abs().max().item()
    return worst / scale if scale else worst
