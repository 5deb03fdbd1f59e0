"""How far outputs are from what they should be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""of the largest output, by which rounding in another order may change a result"""


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
