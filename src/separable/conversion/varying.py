"""Variations of calibration inputs, which stand in for more of them where they are few."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .calibration import Inputs
from .moments import summed

ENOUGH, WORK = 1024, 5e10
"""inputs that the moments see, variations among them, by as many variations of each as fit in; and
the most multiply-adds that a pass of the original network over them may take"""
REACH = 1 / 16
"""largest shift, of the extent"""
NOISE = 0.1
"""largest deviation of the noise, of the inputs' own"""
CONTRAST = 0.2
"""largest change of an input's deviation from its mean, of it"""


class Varied:
    """Batches of inputs, each followed by variations of it: as many as fit into enough.

    The network that is converted tells what its outputs there should be, so an input need not be
    real, only near those that are. A batch's variations depend on it and the seed alone, not on
    the process that holds it.
    """

    def __init__(self, inputs: Inputs, macs: float, seed: int) -> None:
        """Vary `inputs` for a network that spends so many multiply-adds on each."""
        count = summed(torch.tensor(float(inputs.count))).item()
        most = ENOUGH if inputs.first.is_floating_point() else 1  # there is nothing between indices
        self.copies = max(1, int(min(most, WORK / max(macs, 1.0)) // count))
        self._inputs, self._seed = inputs, seed

    @torch.no_grad()
    def taken_by(self, model: nn.Module) -> Varied:
        """The same, without variations where the network rejects some of them.

        It may read its inputs as indices, check their range, or take their logarithm.
        """
        if self.copies > 1 and self._inputs.varied is None:
            self._inputs.varied = True
            for place, batch in enumerate(self):
                if place % self.copies and self._inputs.taken(model, batch) is None:
                    break
            rejected = summed(torch.tensor(float(not self._inputs.varied))).item()
            self._inputs.varied = not rejected
        if self._inputs.varied is False:
            self.copies = 1
        return self

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._inputs:
            yield batch.clone() if self.copies > 1 else batch  # some networks write into it
            generator = torch.Generator().manual_seed(self._seed)
            for _ in range(self.copies - 1):
                others = batch[torch.randperm(len(batch), generator=generator)]
                yield varied(batch, others, generator)


def varied(batch: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each input a little, mix it with others, change its contrast and add noise, a little.

    Args:
        batch: `[N, ...]`, floating-point; the dimensions after the second are extents.
        others: what each is blended with, `[N, ...]` (Zhang et al. 2018, arXiv:1710.09412); the
            next of them lends it a box (Yun et al. 2019, arXiv:1905.04899).
        generator: of all draws.
    """

    def drawn(low: float, high: float) -> Tensor:
        values = torch.rand(len(batch), generator=generator, dtype=torch.float32)
        values = low + (high - low) * values
        return values.to(batch).view(-1, *[1] * (batch.dim() - 1))

    result = batch
    for dim in range(2, batch.dim()):
        reach = REACH * batch.shape[dim]
        result = _shifted(result, dim, drawn(-reach, reach))
    result = result.lerp(others, drawn(0, 1))
    result = _boxed(result, others.roll(1, 0), generator)
    mean = result.flatten(1).mean(1).view(-1, *[1] * (batch.dim() - 1))
    result = mean + (result - mean) * drawn(1 - CONTRAST, 1 + CONTRAST)
    noise = torch.randn(batch.shape, generator=generator, dtype=torch.float32).to(batch)
    return result + batch.std(correction=0) * drawn(0, NOISE) * noise


def _boxed(batch: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Put a box of another input over each, of any size and place."""
    inside = torch.ones(len(batch), *[1] * (batch.dim() - 1), dtype=torch.bool)
    for dim in range(2, batch.dim()):
        size = (2, len(batch), *[1] * (batch.dim() - 1))
        ends = torch.rand(size, generator=generator, dtype=torch.float32)
        places = torch.arange(batch.shape[dim], dtype=torch.float32).add(0.5).div(batch.shape[dim])
        places = places.view(-1, *[1] * (batch.dim() - 1 - dim))
        inside = inside & (ends.amin(0) <= places) & (places < ends.amax(0))
    return torch.where(inside.to(batch.device), others, batch) if batch.dim() > 2 else batch


def _shifted(batch: Tensor, dim: int, amount: Tensor) -> Tensor:
    """Move each input along a dimension, by parts of a step too; the border repeats."""
    whole = amount.floor()
    steps = torch.arange(batch.shape[dim], device=batch.device)
    steps = steps.view(-1, *[1] * (batch.dim() - 1 - dim)) - whole.long()
    near, far = (
        batch.gather(dim, at.clamp(0, batch.shape[dim] - 1).expand_as(batch))
        for at in (steps, steps - 1)
    )
    return near.lerp(far, amount - whole)
