"""Run a model and leave it, the random state and torch's switches as they were."""

from __future__ import annotations

import copy
import random
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from ..failures import in_a_line, is_out_of_memory

Model = TypeVar("Model", bound=nn.Module)
_SWITCHES = threading.RLock()

OBJECTS_DEEP = 2  # a cache and its layers, not a trainer's whole data


class Held(NamedTuple):
    """A tensor of a model, and what it was.

    Attributes:
        tensor: the tensor.
        data: another tensor at the same memory, which stays there if `tensor.data` is assigned.
        values: a copy of its values, where the run may write to them.
    """

    tensor: Tensor
    data: Tensor
    values: Tensor | None


@contextmanager
def untouched(
    model: nn.Module, written: Callable[[Tensor], bool] = lambda tensor: False
) -> Iterator[None]:
    """Put back what a model holds, and the random state, whatever the block does.

    The attributes of modules are put back, and all below them: containers, and objects in them up
    to `OBJECTS_DEEP` in one another.

    Args:
        model: the model that runs in the block.
        written: whether the block may write to a tensor of the model; a copy of it is put back.
    """
    containers, tensors = _state(model)
    copies = [(container, _contents(container)) for container in containers]
    held = [
        Held(tensor, tensor.detach(), tensor.detach().clone() if written(tensor) else None)
        for tensor in tensors
        if tensor.device.type != "meta"
    ]
    try:
        with _random_state():
            yield
    finally:
        for container, contents in copies:
            _refill(container, contents)
        with torch.no_grad():
            for each in held:
                _put_back(each)


@overload
def copied(model: Model, *, name: str = ...) -> Model: ...


@overload
def copied(model: nn.Module, *others: Any, name: str = ...) -> Any: ...


def copied(model: nn.Module, *others: Any, name: str = "model") -> Any:
    """Deep copies of a model and of others with it; a tensor that is computed is copied as values.

    `copy.deepcopy` refuses such attributes, which `torch.nn.utils.weight_norm` and
    `spectral_norm` set at each forward.

    Args:
        model: is left as it was.
        others: what may share tensors with it.
        name: the argument that the model came from.

    Raises:
        ValueError: the model cannot be copied.
    """
    try:
        computed = (tensor for tensor in _state(model)[1] if not tensor.is_leaf)
        memo = {id(tensor): tensor.detach().clone() for tensor in computed}
        return copy.deepcopy((model, *others), memo) if others else copy.deepcopy(model, memo)
    except Exception as error:  # whatever it holds may raise
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"`{name}` cannot be copied: {in_a_line(error)}; take out of it what cannot (locks, "
            "files, results of a pass), and put it back afterwards"
        ) from error


def _state(model: nn.Module) -> tuple[list[Any], list[Tensor]]:
    """Containers (a module's or object's attributes are one) and tensors below a model."""
    containers: list[Any] = []
    tensors: list[Tensor] = []
    seen: dict[int, Any] = {}  # holds what it has seen, so that no other gets its id
    pending: deque[tuple[Any, int]] = deque((module, 0) for module in model.modules())
    while pending:
        value, depth = pending.popleft()
        if type(value) in weakref.ProxyTypes or id(value) in seen:
            continue  # a proxy's object may be gone
        if isinstance(value, (type, ModuleType, FunctionType)):
            continue
        if isinstance(value, Tensor):
            seen[id(value)] = value
            if not is_lazy(value):
                tensors.append(value)
        elif (parts := _parts(value)) is not None:
            seen[id(value)] = value
            if isinstance(value, (dict, list, set, deque)):
                containers.append(value)
            pending.extendleft((part, depth) for part in parts)
        elif hasattr(value, "__dict__") and (
            isinstance(value, nn.Module) or (depth := depth + 1) <= OBJECTS_DEEP
        ):
            seen[id(value)] = value
            pending.append((vars(value), depth))
    return containers, tensors


def _parts(value: Any) -> Iterable[Any] | None:
    """What a container holds, None for other values."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    return None


def _contents(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _refill(container: Any, contents: Any) -> None:
    # in place, because others may hold the same container; and only where something changed
    if isinstance(container, dict):
        unchanged = list(container) == list(contents) and all(
            container[key] is contents[key] for key in contents
        )
    else:
        unchanged = list(map(id, container)) == list(map(id, contents))
    if unchanged:
        return
    container.clear()
    getattr(container, "extend" if isinstance(container, (list, deque)) else "update")(contents)


def _put_back(held: Held) -> None:
    tensor, data, values = held
    if _place(tensor) != _place(data):
        tensor.data = data
    if values is not None and not torch.equal(tensor, values):
        tensor.copy_(values)


def _place(tensor: Tensor) -> Any:
    """What tells whether two tensors show the same memory in the same way."""
    if tensor.layout != torch.strided:
        return tensor.device, tensor.layout, tensor.shape
    storage = tensor.untyped_storage()._cdata
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride(), storage


@contextmanager
def _random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 the legacy state is global
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def train_flags(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Set the train flag of every module, None leaves them, and put each back.

    The flags are set one by one: `model.train()` may be overridden, and would lose flags that
    differ between modules.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            if training is not None:
                module.training = training
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def plain_operators() -> Iterator[None]:
    """Keep torch from replacing operators by fused ones, which differ between devices.

    Attention and recurrent layers then run as matrix products and pointwise operators on every
    device, and compiled functions run as they were written. The switches are the process's, so
    that other threads wait for the block to end.
    """
    with _SWITCHES:
        yield from _plain_operators()


def _plain_operators() -> Iterator[None]:
    fastpath = torch.backends.mha.get_fastpath_enabled()
    mkldnn = torch._C._get_mkldnn_enabled()
    cudnn = torch._C._get_cudnn_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        stack.callback(torch._C._set_mkldnn_enabled, mkldnn)
        stack.callback(torch._C._set_cudnn_enabled, cudnn)
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
