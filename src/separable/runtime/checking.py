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
    not be.
    """
    if found.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    if not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    scale = expected.abs().max().item()
    return difference / scale if scale else difference
