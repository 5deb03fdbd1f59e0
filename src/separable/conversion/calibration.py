"""The calibration inputs: batches of whatever was given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .following import hooked
from .sites import convolutions

BATCH = 32
"""inputs per batch where the calibration inputs come one by one"""


class Inputs:
    """The calibration inputs as batches on a model's device, as often as they are needed."""

    def __init__(self, calibration: Any, model: nn.Module) -> None:
        parameter = next(model.parameters(), None)
        self._device = None if parameter is None else parameter.device
        self._dtype = torch.float32 if parameter is None else parameter.dtype
        if isinstance(calibration, Tensor):
            calibration = calibration.split(BATCH)
        elif isinstance(calibration, Dataset):
            calibration = DataLoader(calibration, batch_size=BATCH)
        elif not isinstance(calibration, Iterable):
            raise TypeError(
                f"`calibration` (a {type(calibration).__name__}) must be an iterable of inputs, "
                "batches or (input, label) pairs, or None"
            )
        elif iter(calibration) is calibration:
            calibration = list(calibration)  # a stream runs once only, and several passes follow
        self._batches: Iterable[Any] = calibration
        self._single, self._most = False, BATCH
        self.first = self._probe(model)
        self.count, self.batches = 0, 0
        for batch in self:
            self.count += len(batch)
            self.batches += 1

    def __iter__(self) -> Iterator[Tensor]:
        """The batches; single inputs, and batches of one, are joined where their sizes allow."""
        pending: list[Tensor] = []
        for item in self._batches:
            batch = self._input(item)[None] if self._single else self._input(item)
            full = len(pending) == self._most or len(batch) > 1
            if pending and (full or batch.shape != pending[0].shape):
                yield torch.cat(pending)
                pending = []
            if len(batch) > 1:
                yield batch
            else:
                pending.append(batch)
        if pending:
            yield torch.cat(pending)

    def _input(self, item: Any) -> Tensor:
        if isinstance(item, Sequence) and len(item):
            item = item[0]
        if not isinstance(item, Tensor):
            raise TypeError(
                f"`calibration` holds a {type(item).__name__}; its items must be tensors or "
                "pairs that begin with one"
            )
        dtype = self._dtype if item.is_floating_point() else item.dtype
        return item.to(self._device, dtype, copy=True)  # some networks write into it

    @torch.no_grad()
    def _probe(self, model: nn.Module) -> Tensor:
        """Run the first item, as a batch if the model takes it so, else as one input."""
        item = next(iter(self._batches), None)
        if item is None or (isinstance(item, Tensor) and not len(item)):
            raise ValueError("`calibration` is empty; give at least one input")
        first = self._input(item)
        try:
            self._single = _runs_unbatched(model, first.clone())
        except Exception as error:
            try:
                model(first[None].clone())
            except Exception:
                raise ValueError(
                    f"`calibration`: the model rejects its first item, of shape "
                    f"{tuple(first.shape)}: {error}"
                ) from error
            self._single = True
        if not self._single and len(first) != 1:
            return first
        joined = next(iter(self))
        try:
            model(joined.clone())
        except Exception:  # a model of one input at a time
            self._most = 1
            return next(iter(self))
        return joined


def _runs_unbatched(model: nn.Module, input: Tensor) -> bool:
    """Run a model, and say whether its first convolution was given an input without a batch."""
    missing: list[bool] = []

    def hook(conv: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        missing.append(inputs[0].dim() == len(conv.kernel_size) + 1)

    with hooked((model.get_submodule(name), hook) for name in convolutions(model)):
        model(input)
    return missing[:1] == [True]
