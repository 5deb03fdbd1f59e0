"""Handwritten digits, bundled with scikit-learn: no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE = 32
CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Images `[N, 1, size, size]`, standardised, and labels `[N]` from 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(test_share: float = 0.3, image_size: int = IMAGE_SIZE) -> Digits:
    """Return the 1797 digits of scikit-learn (Alpaydin & Kaynak 1998), in a fixed split.

    The 8×8 images are resized to `image_size` bilinearly and standardised by the mean and the
    standard deviation of the training images.

    Args:
        test_share: share of the images to test on, drawn from each class alike.
        image_size: height and width.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ImportError(
            "scikit-learn is not installed: pip install 'separable[demo]'", name=error.name
        ) from error
    bundled = datasets.load_digits()
    train_raw, test_raw, train_labels, test_labels = train_test_split(
        bundled.images,
        bundled.target,
        test_size=test_share,
        stratify=bundled.target,
        random_state=0,
    )
    train, test = (
        F.interpolate(
            torch.tensor(raw, dtype=torch.float32).unsqueeze(1), size=image_size, mode="bilinear"
        )
        for raw in (train_raw, test_raw)
    )
    mean, deviation = train.mean(), train.std()
    return Digits(
        (train - mean) / deviation,
        torch.tensor(train_labels),
        (test - mean) / deviation,
        torch.tensor(test_labels),
    )
