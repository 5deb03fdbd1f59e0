"""Weights as the user's model holds them now, and whether they changed since they were packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


class Weights:
    """Tensors looked up by name at each use.

    A weight counts as changed if another tensor took its place, or if it was written to in place,
    which torch records in the tensor's version. (Writing through `.data` or numpy goes unrecorded.)
    """

    def __init__(self) -> None:
        self._slots: list[tuple[Mapping[Any, Any], Any]] = []
        self._seen: list[tuple[torch.Tensor, int]] = []

    def add(self, holder: Mapping[Any, Any], name: Any) -> Callable[[], torch.Tensor]:
        """Watch `holder[name]`; the result reads it."""
        self._slots.append((holder, name))
        self._seen.append((holder[name], _version(holder[name])))
        return lambda: holder[name]

    def changed(self) -> bool:
        """Whether any tensor is not what it was at the last `remember`."""
        for (holder, name), (tensor, version) in zip(self._slots, self._seen, strict=True):
            if holder[name] is not tensor or _version(tensor) != version:
                return True
        return False

    def remember(self) -> None:
        """Take the tensors as they are now for unchanged."""
        self._seen = [(h[n], _version(h[n])) for h, n in self._slots]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def exported_weights(
    program: torch.export.ExportedProgram, model: nn.Module, weights: Weights
) -> dict[str, Callable[[], torch.Tensor]]:
    """Where each placeholder of an exported graph that is a weight is to be read.

    Args:
        program: the exported model.
        model: the model itself, which is watched.
        weights: what the watched tensors are added to.
    """
    signature = program.graph_signature
    recipes: dict[str, Callable[[], torch.Tensor]] = {}
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for placeholder, name in named.items():
        path, _, leaf = name.rpartition(".")
        try:
            owner = model.get_submodule(path)
        except AttributeError:
            owner = model
        for holder in (owner._parameters, owner._buffers):
            if holder.get(leaf) is not None:
                recipes[placeholder] = weights.add(holder, leaf)
                break
        else:
            recipes[placeholder] = weights.add(program.state_dict, name)
    for placeholder, name in signature.inputs_to_lifted_tensor_constants.items():
        recipes[placeholder] = weights.add(program.constants, name)
    return recipes
