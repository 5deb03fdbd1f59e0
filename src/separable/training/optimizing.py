"""The optimiser, its parameter groups, the learning rate's schedule, and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .recipe import Recipe

_LEAST_SIZE = 0.01  # of a tensor that begins at zero


def without_decay(network: nn.Module) -> set[str]:
    """Names of the parameters that have no weight decay: of norms, biases and depthwise filters.

    A depthwise filter sees one channel or few, so decay would shrink it without need (Howard et
    al. 2017, section 3.3). Everything of one dimension belongs to norms and biases.
    """
    names = set()
    for prefix, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            depthwise = (
                isinstance(module, nn.modules.conv._ConvNd)
                and module.groups > 1
                and module.groups in (module.in_channels, module.out_channels)
            )
            if parameter.ndim <= 1 or depthwise:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def sizes_of(network: nn.Module) -> dict[str, float]:
    """The root mean square of each parameter, to the nearest power of two.

    Relative steps are those of Shazeer and Stern 2018 (arXiv:1804.04235, section 8), whose tensors
    have a least size too, for those that begin at zero. Powers of two make few groups.
    """
    sizes = {}
    for name, parameter in network.named_parameters():
        size = float(parameter.detach().float().square().mean().sqrt())
        size = max(size, _LEAST_SIZE) if math.isfinite(size) else 1.0
        sizes[name] = 2.0 ** round(math.log2(size))
    return sizes


def optimizer_of(
    parameters: Iterable[tuple[str, nn.Parameter]],
    plain: set[str],
    recipe: Recipe,
    sizes: Mapping[str, float],
) -> torch.optim.Optimizer:
    """Build the recipe's optimiser.

    Args:
        parameters: with their names; those that need no gradient are left out.
        plain: names of those without weight decay.
        recipe: optimiser, peak rate, momentum and decay.
        sizes: of the parameters, by name; read where the recipe's rate is relative to them.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            decay = 0.0 if name in plain else recipe.decay
            lr = recipe.peak_lr * (sizes[name] if recipe.is_relative else 1.0)
            members.setdefault((decay, lr), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": each, "weight_decay": decay, "lr": lr}
        for (decay, lr), each in sorted(members.items(), key=lambda item: item[0], reverse=True)
    ]
    lr = recipe.peak_lr
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate in a step: a linear rise, then half a cosine down to zero.

    The cosine is that of Loshchilov and Hutter 2017 (arXiv:1608.03983), without restarts.

    Args:
        step: from 0.
        steps: how many there are.
        warmup: share of them that the rise takes.
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    if step >= steps:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def schedule_of(optimizer: torch.optim.Optimizer, steps: int, recipe: Recipe) -> LambdaLR:
    """Build the schedule of a training of `steps` optimiser steps."""
    return LambdaLR(optimizer, lambda step: rate(step, steps, recipe.warmup))


def averaging(decay: float) -> WeightAveraging:
    """Build the callback that keeps a moving average of the weights and statistics.

    After n steps the decay is at most (1 + n) / (10 + n), as in TensorFlow's
    `ExponentialMovingAverage`, so that a short training forgets where it began. Whole numbers, such
    as tables of positions, have no average and are copied; an infinity that stays, as in a mask,
    is kept.
    """
    masks: dict[int, bool] = {}
    """by its address, whether a tensor began with infinities"""

    def average(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Any) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        plain: tuple[list[Tensor], list[Tensor]] = [], []
        for held, weight in zip(averages, weights, strict=True):
            if not (held.is_floating_point() or held.is_complex()):
                held.copy_(weight)
                continue
            address = held.data_ptr()
            if address not in masks:
                masks[address] = not bool(held.isfinite().all())
            if masks[address]:
                held.copy_(held.lerp(weight, 1 - now).where(held != weight, held))
                continue
            plain[0].append(held)
            plain[1].append(weight)
        if plain[0]:
            get_ema_multi_avg_fn(now)(*plain, count)

    return WeightAveraging(multi_avg_fn=average)
