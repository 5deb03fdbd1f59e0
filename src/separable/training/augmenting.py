"""Random changes of training inputs, drawn with the CPU's generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .recipe import Augment

SHARE = 0.125
"""of the size, the furthest shift"""


def shifted(input: Tensor) -> Tensor:
    """Move an input `[C, *spatial]` by up to an eighth of its size; its border repeats."""
    input = torch.as_tensor(input)  # datasets may hold numpy's arrays
    for dim in range(1, input.dim()):
        size = input.shape[dim]
        most = round(SHARE * size)
        by = int(torch.randint(-most, most + 1, ()))
        source = (torch.arange(size) - by).clamp(0, size - 1)
        input = input.index_select(dim, source)
    return input


def flipped(input: Tensor) -> Tensor:
    """Mirror an input left to right, half the time."""
    input = torch.as_tensor(input)
    return input.flip(-1) if torch.rand(()) < 0.5 else input


def flip_shifted(input: Tensor) -> Tensor:
    """Do both."""
    return shifted(flipped(input))


def augmentation(kind: Augment) -> Callable[[Tensor], Tensor] | None:
    """The change of a tensor that an option names; cropping is for images alone.

    Raises:
        ValueError: the data has no images to crop.
    """
    if kind == "flip-crop":
        raise ValueError("`augment` (='flip-crop') needs images of a folder or of Hugging Face")
    return {"none": None, "shift": shifted, "flip-shift": flip_shifted}[kind]
