"""The calibration inputs: batches of whatever was given, and how a network takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..failures import in_a_line, is_out_of_memory
from ..outputs import Outputs
from .following import hooked
from .sensitivity import GRADIENTS, Returned, tensors
from .sites import convolutions

BATCH = 32
"""inputs per batch where the calibration inputs come one by one"""


class Inputs:
    """The calibration inputs as batches on a model's device, as often as they are needed.

    Attributes:
        first: the first batch.
        count: number of inputs.
        batches: number of batches.
        whole: whether the network takes the batches as they are only, as those of a fixed size.
        varied: whether it takes variations of the inputs too; None while that is not known.
        notes: what a report should tell of the inputs, a sentence each.
    """

    def __init__(self, calibration: Any, model: nn.Module) -> None:
        parameter = next(model.parameters(), None)
        self._device = None if parameter is None else parameter.device
        self._dtype = torch.float32 if parameter is None else parameter.dtype
        if isinstance(calibration, Tensor):
            calibration = calibration.split(BATCH) if calibration.dim() else [calibration]
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
        self.varied: bool | None = None
        self.notes: list[str] = []
        self.first = self._probe(model)
        self.whole = self._takes_no_parts(model)
        self.count, self.batches = 0, 0
        for batch in self:
            self.count += len(batch)
            self.batches += 1
        self._joined()  # several passes follow

    def _joined(self) -> Tensor:
        """The first batch."""
        batch = next(iter(self), None)
        if batch is None:
            raise ValueError(
                "`calibration` yields its inputs once only, and several passes need them; give a "
                "list of them, or an iterable that starts anew each time"
            )
        return batch

    def __iter__(self) -> Iterator[Tensor]:
        """The batches; single inputs, and batches of one, are joined where their sizes allow."""
        pending: list[Tensor] = []
        for item in self._batches:
            batch = self._input(item)[None] if self._single else self._input(item)
            if not len(batch):
                continue
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

    def measured(self, outputs: Outputs) -> Outputs:
        """How the network's outputs are compared: as "logits" or "values".

        Raises:
            ValueError: they cannot be compared, or not so.
        """
        return self._returned.compared_as(outputs)

    def taken(self, model: nn.Module, batch: Tensor) -> Any:
        """A network's output on a variation of inputs; None where it takes no variations."""
        try:
            output = model(batch.clone())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            said = in_a_line(error)
        else:
            found = tensors(output)
            if not any(tensor.isnan().any() for tensor in found) and (
                self._infinite or not any(tensor.isinf().any() for tensor in found)
            ):
                return output
            said = "its outputs are not finite"
        self.varied = False
        self.note(f"the network rejects variations of the inputs, so there were none ({said})")
        return None

    def note(self, text: str) -> None:
        """Tell something in the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def _input(self, item: Any) -> Tensor:
        if isinstance(item, Sequence) and len(item):
            item = item[0]
        if not isinstance(item, Tensor):
            raise TypeError(
                f"`calibration` holds a {type(item).__name__}; its items must be tensors or "
                "pairs that begin with one"
            )
        if not item.dim():
            raise ValueError("`calibration` holds a single number; its items must be inputs")
        dtype = self._dtype if item.is_floating_point() else item.dtype
        return item.to(self._device, dtype, copy=True)  # some networks write into it

    @torch.no_grad()
    def _probe(self, model: nn.Module) -> Tensor:
        """Run the first item, as a batch if the model takes it so, else as one input."""
        first = next((each for each in map(self._input, self._batches) if len(each)), None)
        if first is None:
            raise ValueError("`calibration` is empty; give at least one input")
        try:
            self._single = _runs_unbatched(model, first.clone())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            try:
                model(first[None].clone())
            except Exception as second:
                if is_out_of_memory(second):
                    raise
                raise ValueError(
                    f"`calibration`: the model rejects its first item, of shape "
                    f"{tuple(first.shape)}: {error}"
                ) from error
            self._single = True
        if not self._single and len(first) != 1:
            return first
        joined = self._joined()
        try:
            model(joined.clone())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.note(f"the network takes one input at a time ({in_a_line(error)})")
            self._most = 1
            return self._joined()
        return joined

    @torch.no_grad()
    def _takes_no_parts(self, model: nn.Module) -> bool:
        """See what the network returns, and whether it takes a part of a batch."""
        output = model(self.first.clone())
        self._returned = Returned.of(output)
        self._infinite = any(tensor.isinf().any() for tensor in tensors(output))
        part = self.first[: GRADIENTS // 2].clone()
        if len(part) == len(self.first):
            return False
        try:
            model(part)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.note(f"the network takes no part of a batch ({in_a_line(error)})")
            return True
        return False


def _runs_unbatched(model: nn.Module, input: Tensor) -> bool:
    """Run a model, and say whether its first convolution was given an input without a batch."""
    missing: list[bool] = []

    def hook(conv: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        missing.append(inputs[0].dim() == len(conv.kernel_size) + 1)

    with hooked((model.get_submodule(name), hook) for name in convolutions(model)):
        model(input)
    return missing[:1] == [True]
