"""Weights as the user's model holds them now, and whether they changed since they were packed."""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, getitem, is_not
from typing import Any

import torch
from torch import nn

from . import jit
from .machine import host
from .threads import driver_code


class Weights:
    """Tensors looked up by name at each use.

    A weight counts as changed if another tensor took its place, or if it was written to in place,
    which torch records in the tensor's version. (Writing through `.data` or numpy goes unrecorded.)
    """

    def __init__(self) -> None:
        self._holders: list[Mapping[Any, Any] | Sequence[Any]] = []
        self._names: list[Any] = []
        self.seen: Seen = ([], [], [], array("q"))
        self._fetch = jit.foreign(driver_code(host()), "fetch", 2, brief=True)

    def add(
        self, holder: Mapping[Any, Any] | Sequence[Any], name: Any
    ) -> Callable[[], torch.Tensor]:
        """Watch `holder[name]`; the result reads it."""
        self._holders.append(holder)
        self._names.append(sys.intern(name) if isinstance(name, str) else name)
        return lambda: holder[name]

    def changed(self) -> bool:
        """Whether any tensor is not what it was when it was `seen`."""
        # Before each call, hundreds of objects that are in no cache: they are fetched at once
        # instead of one after another, and no loop is Python's.
        tensors, counted, versions, lines = self.seen
        self._fetch(*lines.buffer_info())
        if any(map(is_not, map(getitem, self._holders, self._names), tensors)):
            return True
        return list(map(_VERSION, counted)) != versions

    def look(self) -> Seen:
        """The tensors as they are now."""
        tensors = list(map(getitem, self._holders, self._names))
        counted = [tensor for tensor in tensors if not tensor.is_inference()]
        lines: set[int] = set()
        for holder in self._holders:
            lines |= _lines(id(holder), type(holder).__basicsize__ // 8, 3)
        for tensor in tensors:
            lines |= _lines(id(tensor), type(tensor).__basicsize__ // 8, 1)
            lines |= _lines(tensor._cdata, 8, 1)
        return tensors, counted, list(map(_VERSION, counted)), array("q", sorted(lines))


_VERSION = attrgetter("_version")
_LINE = 64  # bytes
Seen = tuple[list[torch.Tensor], list[torch.Tensor], list[int], "array[int]"]
"""the tensors, those that count their versions, these, and the cache lines one looks at for that"""


def _lines(address: int, words: int, each: int) -> set[int]:
    """The cache lines of an object, and the first ones of whatever its words point to.

    They are only ever fetched, which no address, right or wrong, can make fail.
    """
    pointers = (ctypes.c_int64 * words).from_address(address)
    starts = [address, address + 8 * words, *(p for p in pointers if p > 1 << 20)]
    return {(start + _LINE * i) // _LINE * _LINE for start in starts for i in range(each)}


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
