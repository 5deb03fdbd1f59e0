"""A short training, the same for every network, and an accuracy with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..training.digits import Digits

BATCH = 32
LEARNING_RATE = 0.2
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
MOST_SHIFT = 0.1


def steps_per_epoch(digits: Digits) -> int:
    """Return the number of full batches in the training images."""
    return len(digits.train_labels) // BATCH


def fit(
    network: nn.Module,
    digits: Digits,
    epochs: int,
    *,
    generator: torch.Generator,
    after_step: Callable[[], object],
) -> list[float]:
    """Train `network` in place, and return the mean training loss of each epoch.

    SGD with Nesterov momentum, one cycle of the learning rate (Smith & Topin 2019), smoothed
    labels, and images shifted at random by up to a tenth of their size in each direction.

    Args:
        network: maps `[N, 1, H, W]` to logits `[N, 10]`; left in eval mode.
        digits: the data.
        epochs: passes over the training images; the rest of a last batch is left out.
        generator: source of the order and the shifts.
        after_step: called after each step, `epochs × steps_per_epoch` times.
    """
    steps = steps_per_epoch(digits)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=epochs * steps
    )
    losses = []
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_labels), generator=generator)
        total = 0.0
        for batch in order[: steps * BATCH].split(BATCH):
            images = _shifted(digits.train_images[batch], generator)
            loss = F.cross_entropy(
                network(images), digits.train_labels[batch], label_smoothing=LABEL_SMOOTHING
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            after_step()
        losses.append(total / steps)
    network.eval()
    return losses


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by its own random offset; what enters at the border repeats its edge."""
    theta = torch.eye(2, 3).repeat(len(images), 1, 1)
    # in affine_grid's coordinates an image is 2 wide
    theta[:, :, 2] = 2 * MOST_SHIFT * (2 * torch.rand(len(images), 2, generator=generator) - 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def count_correct(network: nn.Module, digits: Digits) -> int:
    """Return how many test images `network`, in eval mode, puts into their class."""
    logits = [network(images) for images in digits.test_images.split(256)]
    return int((torch.cat(logits).argmax(1) == digits.test_labels).sum())


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
