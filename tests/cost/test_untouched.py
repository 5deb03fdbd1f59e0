"""Counting leaves the model, the random state and torch's switches as they were."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import separable


class Restless(nn.Module):
    """Writes to everything that a forward can write to."""

    def __init__(self, *, on_values: bool, fail: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.BatchNorm2d(4).eval()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.table = torch.ones(3)
        self.history: list[int] = []
        self.seen: dict[str, Any] = {}
        self.on_values, self.fail = on_values, fail

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.table.mul_(2)
        self.history.append(1)
        self.seen["x"] = x
        self.last = x
        self.register_buffer("late", torch.zeros(1))
        self.train(not self.training)
        x = self.drop(self.frozen(self.norm(self.conv(x))))
        random.random()
        np.random.rand()  # noqa: NPY002 the global state is what is tested
        with torch.no_grad():
            self.conv.weight.add_(1)
        if self.on_values and x.sum() > 1e9:
            raise AssertionError
        if self.fail:
            raise RuntimeError("this model fails")
        return x + torch.rand(1)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "table": model.table.clone(),
        "train": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()
        ],
        "history": list(model.history),
        "seen": dict(model.seen),
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
        "grads": [p.grad for p in model.parameters()],
        "switches": (
            torch.is_grad_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.cudnn.enabled,
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            len(torch.nn.modules.module._global_forward_hooks),
            len(torch.nn.modules.module._global_forward_pre_hooks),
        ),
        "functions": (torch.nn.functional.conv2d, torch.matmul, nn.Module.__call__, Tensor.matmul),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("fail", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("on_values", [False, True], ids=["fake", "real"])
def test_the_model_is_untouched(on_values: bool, fail: bool, training: bool | None) -> None:
    torch.manual_seed(0)
    model = Restless(on_values=on_values, fail=fail)
    model.conv.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 8, 8)
    copy_of_x = x.clone()
    before = snapshot(model)
    containers = [model.history, model.seen, model._buffers]
    if fail:
        with pytest.raises(RuntimeError, match="this model fails"):
            separable.count(model, inputs=x, training=training)
    else:
        assert separable.count(model, inputs=x, training=training).macs == 2 * 4 * 36 * 27
    after = snapshot(model)
    for what in before:
        assert same(before[what], after[what]), what
    now = [model.history, model.seen, model._buffers]
    assert list(map(id, containers)) == list(map(id, now))
    assert torch.equal(x, copy_of_x)
    assert not hasattr(model, "last")


def test_parameters_keep_their_identity_and_version() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    held = [(tensor, tensor._version) for tensor in model.state_dict(keep_vars=True).values()]
    separable.count(model, (2, 3, 8, 8))
    now = model.state_dict(keep_vars=True).values()
    for (tensor, version), current in zip(held, now, strict=True):
        assert tensor is current
        assert tensor._version == version


@pytest.mark.parametrize("on_values", [False, True], ids=["fake", "real"])
def test_nothing_is_kept(on_values: bool) -> None:
    """An operator that saves its own output, as ReLU does, must not hold itself and the model."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).relu()
            return y * float(y.sum()) if on_values else y

    model = Net()
    separable.count(model, (1, 3, 8, 8))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
