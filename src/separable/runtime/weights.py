"""Weights as the user's model holds them now, and whether they changed since they were packed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
import weakref
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from operator import attrgetter, getitem, is_not
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import jit
from .machine import host
from .threads import driver_code

TRACING = threading.RLock()
"""held while a network is traced, by torch that puts fakes in the place of its weights for all
threads, and while weights are read"""


class Weights:
    """Tensors looked up by name at each use.

    A weight counts as changed if another tensor took its place, or if it was written to in place,
    which torch records in the tensor's version. Fused optimisers do not, so their steps are
    listened to. (Writing through `.data` or numpy goes unrecorded.)
    """

    def __init__(self) -> None:
        self._holders: list[Mapping[Any, Any] | Sequence[Any]] = []
        self._names: list[Any] = []
        self._labels: list[str] = []
        self._shapes: list[torch.Size] = []
        self._ties: list[tuple[int, int]] = []
        self.seen: Seen = ([], [], [], array("q"))
        self.stepped = False
        """whether a fused optimiser wrote to one since it was `seen`"""
        self._fetch = jit.foreign(driver_code(host()), "fetch", 2, brief=True)
        _listen()
        _ALIVE.add(self)

    def add(
        self, holder: Mapping[Any, Any] | Sequence[Any], name: Any, label: str = ""
    ) -> Callable[[], torch.Tensor]:
        """Watch `holder[name]`, which errors call `label`; the result reads it."""
        self._holders.append(holder)
        self._names.append(sys.intern(name) if isinstance(name, str) else name)
        self._labels.append(label or str(name))
        return lambda: holder[name]

    def tie(self, holder: Mapping[Any, Any], name: Any, label: str) -> None:
        """Watch another name of the tensor that was added, or tied, last."""
        self._ties.append((len(self._holders) - 1, len(self._holders)))
        self.add(holder, name, label)

    def changed(self) -> bool:
        """Whether any tensor is not what it was when it was `seen`."""
        # Before each call, hundreds of objects that are in no cache: they are fetched at once
        # instead of one after another, and no loop is Python's.
        tensors, counted, versions, lines = self.seen
        self._fetch(*lines.buffer_info())
        try:
            if any(map(is_not, map(getitem, self._holders, self._names), tensors)):
                return True
        except LookupError:  # one is gone
            return True
        return self.stepped or list(map(_VERSION, counted)) != versions

    def look(self) -> Seen:
        """The tensors as they are now.

        Raises:
            RuntimeError: one is gone, has another shape, or is no longer tied to another.
        """
        tensors = self._tensors()
        self.stepped = False  # before a value is read: later steps are seen at the next call
        counted = [tensor for tensor in tensors if not tensor.is_inference()]
        lines: set[int] = set()
        for holder in self._holders:
            lines |= _lines(id(holder), type(holder).__basicsize__ // 8, 3)
        for tensor in tensors:
            lines |= _lines(id(tensor), type(tensor).__basicsize__ // 8, 1)
            lines |= _lines(tensor._cdata, 8, 1)
        return tensors, counted, list(map(_VERSION, counted)), array("q", sorted(lines))

    def holds(self, ids: Set[int]) -> bool:
        """Whether one of the tensors that were `seen` has one of these ids."""
        return not ids.isdisjoint(map(id, self.seen[0]))

    def _tensors(self) -> list[torch.Tensor]:
        tensors = []
        for holder, name, label in zip(self._holders, self._names, self._labels, strict=True):
            try:
                tensor = holder[name]
            except LookupError:
                tensor = None
            if not isinstance(tensor, torch.Tensor):
                raise RuntimeError(f"weight `{label}` is gone; {_AGAIN}")
            tensors.append(tensor)
        shapes = [tensor.shape for tensor in tensors]
        self._shapes = self._shapes or shapes
        for label, shape, before in zip(self._labels, shapes, self._shapes, strict=True):
            if shape != before:
                raise RuntimeError(
                    f"weight `{label}` has the shape {list(shape)} and had {list(before)}; {_AGAIN}"
                )
        for first, second in self._ties:
            if tensors[first] is not tensors[second]:
                raise RuntimeError(
                    f"weights `{self._labels[first]}` and `{self._labels[second]}` are no longer "
                    f"one; {_AGAIN}"
                )
        return tensors


_AGAIN = "compile the model again"
_ALIVE: weakref.WeakSet[Weights] = weakref.WeakSet()


@functools.cache
def _listen() -> None:
    """Hear of every optimiser's steps, from the first compiled model on."""
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    fused = [group["params"] for group in optimizer.param_groups if group.get("fused")]
    written = {id(parameter) for parameters in fused for parameter in parameters}
    for weights in list(_ALIVE) if written else ():
        weights.stepped = weights.stepped or weights.holds(written)


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
    names: dict[int, list[tuple[Mapping[str, Any], str, str]]] = defaultdict(list)
    for path, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for leaf, tensor in holder.items():
                names[id(tensor)].append((holder, leaf, f"{path}.{leaf}" if path else leaf))

    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for placeholder, name in named.items():
        path, _, leaf = name.rpartition(".")
        try:
            owner = model.get_submodule(path)
        except AttributeError:
            owner = model
        for holder in (owner._parameters, owner._buffers):
            if holder.get(leaf) is not None:
                recipes[placeholder] = weights.add(holder, leaf, name)
                for other in names[id(holder[leaf])]:  # the graph has tied ones once
                    if other[2] != name:
                        weights.tie(*other)
                break
        else:
            recipes[placeholder] = weights.add(program.state_dict, name)
    for placeholder, name in signature.inputs_to_lifted_tensor_constants.items():
        constant = program.constants[name]
        path, _, leaf = name.rpartition(".")
        with contextlib.suppress(AttributeError):
            attributes = vars(model.get_submodule(path))
            if attributes.get(leaf) is constant:
                recipes[placeholder] = weights.add(attributes, leaf, name)
        if placeholder not in recipes:
            recipes[placeholder] = weights.add(program.constants, name)
    return recipes
