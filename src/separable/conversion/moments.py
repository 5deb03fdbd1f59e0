"""Streaming first and second moments of the patches that a convolution sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from ..failures import is_out_of_memory
from .forms import Conv, Shape, customised, grouped, like

BLOCK = 512
"""rows of a gram matrix that are multiplied at a time"""


@dataclass
class Moments:
    """Centred second moments of patches u and outputs y, of each group, in float64.

    They add: the moments of two sets of samples give those of their union (Chan, Golub and
    LeVeque 1983), so their memory does not depend on the number of samples. Centring at each
    step keeps float64's accuracy whatever the means are.
    """

    count: float
    """number of samples"""
    mean: Tensor
    """mean of u, `[G, F]`, F = inputs × taps"""
    target: Tensor
    """mean of y, `[G, N]`"""
    gram: Tensor
    """sum of (u - mean)(u - mean)ᵀ, `[G, F, F]`, or `[G, 0, 0]`"""
    cross: Tensor
    """sum of (y - target)(u - mean)ᵀ, `[G, N, F]`"""

    @classmethod
    def zeros(cls, shape: Shape, device: torch.device | None = None, gram: bool = True) -> Moments:
        """The moments of no samples; without a gram matrix where it is known already."""
        groups, outputs, inputs, taps = shape
        features = inputs * taps

        def empty(*size: int) -> Tensor:
            return torch.zeros(groups, *size, dtype=torch.float64, device=device)

        return cls(
            0.0,
            empty(features),
            empty(outputs),
            empty(features, features) if gram else empty(0, 0),
            empty(outputs, features),
        )

    def add(self, patches: Tensor, outputs: Tensor) -> None:
        """Take in samples, in place.

        Args:
            patches: `[G, F, samples]`.
            outputs: `[G, N, samples]`.
        """
        u, y = patches.double(), outputs.double()
        count = u.shape[2]
        mean, target = u.mean(2), y.mean(2)
        u -= mean[..., None]
        y -= target[..., None]
        self._merge(count, mean, target)
        for start in range(
            0, self.gram.shape[1], BLOCK
        ):  # the rest of each row follows by symmetry
            rows = slice(start, start + BLOCK)
            product = torch.bmm(u[:, rows], u[:, : start + BLOCK].mT)
            self.gram[:, rows, : start + BLOCK] += product
            self.gram[:, :start, rows] += product[..., :start].mT
        self.cross.baddbmm_(y, u.mT)

    def _merge(self, count: float, mean: Tensor, target: Tensor) -> None:
        """Account for the distance between the two means, and move to their common mean."""
        total = self.count + count
        step, shift = mean - self.mean, target - self.target
        scale = self.count * count / total
        if self.gram.numel():
            self.gram.baddbmm_(step[:, :, None], step[:, None], alpha=scale)
        self.cross.baddbmm_(shift[:, :, None], step[:, None], alpha=scale)
        self.mean = self.mean + step * (count / total)
        self.target = self.target + shift * (count / total)
        self.count = total

    def reduced(self) -> Moments:
        """The moments of the samples of all processes, where torch.distributed is set up."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        sums = [torch.full_like(self.mean[:1, :1], self.count)]
        sums += [self.mean * self.count, self.target * self.count]
        total = summed(*sums).item()
        mean, target = sums[1] / total, sums[2] / total
        step, shift = self.mean - mean, self.target - target
        gram = self.gram
        if gram.numel():
            gram = torch.baddbmm(gram, step[:, :, None], step[:, None], alpha=self.count)
        cross = torch.baddbmm(self.cross, shift[:, :, None], step[:, None], alpha=self.count)
        summed(gram, cross)
        return Moments(total, mean, target, gram, cross)


def summed(*tensors: Tensor) -> Tensor:
    """Sum tensors over all processes, in place; returns the first."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors[0]


def samples(
    conv: Conv, input: Tensor, output: Tensor, most: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The patches that a convolution multiplies with its weight, and the outputs beside them.

    Args:
        conv: the convolution; its weight plays no part.
        input: `[B, C, *spatial]` or `[C, *spatial]`.
        output: `[B, N, *positions]` or without `B`.
        most: positions to take of each input; more are drawn from, the same ones for all inputs.
        seed: of the draw.

    Returns:
        Patches `[G, C / G × taps, samples]`, in the order of `weight.flatten(1)`, and outputs
        `[G, N / G, samples]`.
    """
    dims = len(conv.kernel_size)
    if input.dim() == dims + 1:
        input, output = input[None], output[None]
    places = math.prod(output.shape[2:])
    chosen = torch.arange(places)
    if places > most:
        chosen = torch.randperm(places, generator=torch.Generator().manual_seed(seed))[:most]
    at: Any = torch.unravel_index(chosen.to(input.device), output.shape[2:])
    if not customised(conv):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        windows = F.pad(input, conv._reversed_padding_repeated_twice, mode=mode)
        for dim in range(dims):
            reach = conv.dilation[dim] * (conv.kernel_size[dim] - 1) + 1
            windows = windows.unfold(dim + 2, reach, conv.stride[dim])
            windows = windows[..., :: conv.dilation[dim]]
        picked = windows[:, :, *at].flatten(3)  # [B, C, samples, taps]
    else:
        # a class of its own pads in its own way: let it copy its taps out
        picked = _taps(conv, input)[:, :, :, *at].movedim(2, 3)
    picked = picked.unflatten(1, (conv.groups, -1)).permute(1, 2, 4, 0, 3)
    taken = output[:, :, *at].unflatten(1, (conv.groups, -1)).permute(1, 2, 0, 3)
    return picked.flatten(3).flatten(1, 2), taken.flatten(2)


def is_convolution(conv: Conv, input: Tensor, output: Tensor) -> bool:
    """Whether a class of its own computes its weight times its patches, and no more than pads.

    Weight standardisation does more, and so does whatever changes the input or the output.
    """
    if not customised(conv):
        return True
    try:
        patches, wanted = samples(conv, input, output, 64, 0)
    except Exception as error:  # a constructor of its own may raise anything
        if is_out_of_memory(error):
            raise
        return False
    computed = grouped(conv.weight.detach(), conv.groups).flatten(2) @ patches
    if conv.bias is not None:
        computed = computed + conv.bias.detach().view(conv.groups, -1, 1)
    rest = (computed - wanted).double().square().sum()
    return bool(rest <= 1e-6 * wanted.double().square().sum())


def _taps(conv: Conv, input: Tensor) -> Tensor:
    """The input under each tap, `[B, C, taps, *positions]`, by a convolution of `conv`'s class."""
    taps = math.prod(conv.kernel_size)
    copier = like(conv, conv.in_channels, conv.in_channels * taps, conv.in_channels, bias=False)
    eye = torch.eye(taps, dtype=conv.weight.dtype, device=conv.weight.device)
    with torch.no_grad():
        copier.weight.copy_(eye.repeat(conv.in_channels, 1).view_as(copier.weight))
        return copier(input).unflatten(1, (conv.in_channels, taps))  # type: ignore[no-any-return]
