"""Two image sets from the digits of scikit-learn: as they are, and on a cluttered canvas."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

SETS = ("digits", "cluttered")
CANVAS = 32
TEST_DIGITS = 597
TEST_SEED = 2


@functools.cache
def load(name: str, train: int = 5000, test: int = 2000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training inputs and labels, then test inputs and labels; always the same ones.

    The 1797 digits are split 1200 : 597 first, so nothing of a test image is seen in training.
    """
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    if name == "digits":
        return images[:1200], labels[:1200], images[1200:], labels[1200:]
    return (
        *cluttered(images[:1200], labels[:1200], train, seed=1),
        *cluttered(images[1200:], labels[1200:], test, seed=TEST_SEED),
    )


def digits_shown(name: str, test: int) -> Tensor:
    """Which of the test digits each of so many test images shows."""
    if name == "digits":
        return torch.arange(TEST_DIGITS)
    return _drawn(TEST_DIGITS, test, torch.Generator().manual_seed(TEST_SEED))


def _drawn(digits: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(digits, (count,), generator=generator)


def cluttered(images: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` images `[count, 1, 32, 32]`: a digit scaled and shifted, with clutter and noise.

    The digit covers 14 to 24 pixels. Six quarter pieces of other digits of the same split lie
    about it, at most as bright, then comes Gaussian noise of deviation 0.1.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def place(patches: Tensor, size: Tensor, brightness: Tensor) -> Tensor:
        zoom = CANVAS / size
        reach = (zoom - 1).abs()
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = zoom
        theta[:, 0, 2] = reach * uniform(-1, 1)
        theta[:, 1, 2] = reach * uniform(-1, 1)
        grid = F.affine_grid(theta, [count, 1, CANVAS, CANVAS], align_corners=False)
        return F.grid_sample(patches, grid, align_corners=False) * brightness[:, None, None, None]

    chosen = _drawn(len(images), count, generator)  # first, as `digits_shown` does
    canvas = place(images[chosen], uniform(14, 24), uniform(0.7, 1.0))
    for piece in range(6):
        top, left = 4 * (piece % 2), 4 * (piece // 2 % 2)
        others = images[_drawn(len(images), count, generator)]
        patches = others[:, :, top : top + 4, left : left + 4]
        canvas = torch.maximum(canvas, place(patches, uniform(5, 9), uniform(0.3, 0.8)))
    noise = torch.randn(canvas.shape, generator=generator)
    return canvas + 0.1 * noise, labels[chosen]
