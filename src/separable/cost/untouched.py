"""Run a model and leave it, the random state and torch's switches as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def untouched(model: nn.Module, *, values: bool) -> Iterator[None]:
    """Put back every module's attributes, and the random state, whatever the block does.

    Args:
        model: the model that runs in the block.
        values: whether the block may write to the tensors that the model holds, so that their
            values have to be copied and put back too. Fake tensors can't.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    containers = [
        (value, value.copy())
        for kept in attributes
        for value in kept.values()
        if isinstance(value, (dict, list, set))
    ]
    tensors = [(tensor, tensor.detach().clone()) for tensor in _tensors(modules)] if values else []
    try:
        with _random_state():
            yield
    finally:
        for module, kept in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(kept)
        for container, contents in containers:
            _refill(container, contents)
        with torch.no_grad():
            for tensor, copy in tensors:
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)


def _tensors(modules: list[nn.Module]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for module in modules:
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        found.update((id(value), value) for value in held if isinstance(value, Tensor))
    return [tensor for tensor in found.values() if tensor.device.type != "meta"]


def _refill(container: Any, contents: Any) -> None:
    # in place, because others may hold the same container
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
