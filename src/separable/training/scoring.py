"""An accuracy with its interval."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def count_correct(network: nn.Module, inputs: Tensor, labels: Tensor) -> int:
    """Return how many `inputs` a network, in eval mode, puts into the class of their label.

    Args:
        network: maps `[N, C, *spatial]` to logits `[N, classes]`.
        inputs: `[N, C, *spatial]`.
        labels: `[N]`.
    """
    logits = [network(part) for part in inputs.split(256)]
    return int((torch.cat(logits).argmax(1) == labels).sum())


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927), of 95 % at the default `z`.

    Args:
        correct: successes.
        total: trials, at least 1.
        z: quantile of the normal distribution for the confidence level.
    """
    share = correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)
