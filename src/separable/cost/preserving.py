"""Run a model and leave it, the random state and torch's switches as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def untouched(model: nn.Module, values: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put back every module's attributes, and the random state, whatever the block does.

    Args:
        model: the model that runs in the block.
        values: tensors that the block may write to; copies of them are put back.
    """
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    containers = [
        (value, value.copy())
        for _, kept in attributes
        for value in kept.values()
        if isinstance(value, (dict, list, set))
    ]
    copies = [(tensor, tensor.detach().clone()) for tensor in values]
    try:
        with _random_state():
            yield
    finally:
        for container, contents in (*attributes, *containers):
            _refill(container, contents)
        with torch.no_grad():
            for tensor, copy in copies:
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and tensor attributes of a model, each once, none of them on meta."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        held += [value for value in vars(module).values() if isinstance(value, Tensor)]
        found.update((id(tensor), tensor) for tensor in held)
    return [tensor for tensor in found.values() if tensor.device.type != "meta"]


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
    if isinstance(container, list):
        container[:] = contents
    else:
        container.clear()
        container.update(contents)


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
    device, and compiled functions run as they were written.
    """
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
