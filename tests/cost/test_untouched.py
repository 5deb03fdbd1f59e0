"""Counting leaves the model, the random state and torch's switches as they were."""

from __future__ import annotations

import copy
import functools
import gc
import random
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import separable
from separable.cost.preserving import plain_operators


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


class MaxNorm(nn.Conv2d):
    """Assigns `.data` of a parameter and of a buffer, as EEGNet does to bound its weights."""

    def __init__(self, *, on_values: bool) -> None:
        super().__init__(3, 4, 3)
        self.register_buffer("average", torch.ones(3))
        self.on_values = on_values

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        self.average.data = self.average.data * 0.9 + x.mean((0, 2, 3)).detach() * 0.1
        y = super().forward(x) * self.average.sum()
        return y if not self.on_values or y.sum() < 1e9 else x


ASKED = {
    "count": lambda model: separable.count(model, (1, 3, 8, 8)),
    "compare": lambda model: separable.compare(
        model, nn.Conv2d(3, 4, 3), (1, 3, 8, 8), latency=False
    ),
    "crosscheck": lambda model: separable.crosscheck(model, (1, 3, 8, 8)),
    "measure": lambda model: separable.measure(
        model, torch.ones(1, 3, 8, 8), repeats=1, min_seconds=0, warmup=1
    ),
}


@pytest.mark.parametrize("what", list(ASKED))
@pytest.mark.parametrize("on_values", [False, True], ids=["fake", "real"])
def test_data_that_a_forward_assigns_is_put_back(on_values: bool, what: str) -> None:
    model = MaxNorm(on_values=on_values)
    held = [(each, each.data_ptr(), each.detach().clone()) for each in model.state_dict().values()]
    ASKED[what](model)
    for (_, place, values), now in zip(held, model.state_dict().values(), strict=True):
        assert now.data_ptr() == place
        assert torch.equal(now, values)
    assert separable.count(model, (1, 3, 8, 8)).macs == 4 * 36 * 27


class Cache:
    """Keeps what it is given, as those of keys and values do."""

    def __init__(self) -> None:
        self.kept: list[Any] = [None]
        self.steps = 0


class Nested(nn.Module):
    """Its state lies in containers and objects."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.masks: dict[str, dict[int, Any]] = {"cpu": {}}
        self.caches = [Cache()]
        self.sums = [torch.zeros(4)]
        self.gone = [weakref.proxy(Cache())]

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.masks["cpu"].setdefault(x.shape[-1], torch.ones(x.shape[-1]))
        self.caches[0].kept[0] = y
        self.caches[0].steps += 1
        self.sums[0].add_(1)
        return y * self.masks["cpu"][x.shape[-1]]


class OnValues(nn.Module):
    """Has its model run on values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y if y.sum() < 1e9 else x


@pytest.mark.parametrize("way", ["fake", "real", "measure"])
def test_nested_state_is_put_back(way: str) -> None:
    model = Nested()
    if way == "measure":
        separable.measure(model, torch.ones(2, 4), repeats=1, min_seconds=0, warmup=1)
    else:
        separable.count(OnValues(model) if way == "real" else model, (2, 4))
    assert model.masks == {"cpu": {}}
    assert model.caches[0].kept == [None]
    assert model.caches[0].steps == 0
    assert torch.equal(model.sums[0], torch.zeros(4))


TABLE: dict[Any, Tensor] = {}
PAIRS: dict[int, Any] = {}
SEEN: list[Tensor] = []


@functools.lru_cache
def positions(number: int) -> Tensor:
    return torch.arange(float(number))


class Outside(nn.Module):
    """Keeps tensors of its run outside of itself."""

    last: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + positions(4)
        y = y * TABLE.setdefault(("scale", 4), torch.ones(4))
        y = y * PAIRS.setdefault(4, (torch.ones(4), torch.zeros(4)))[0]
        Outside.last = y
        SEEN.append(y)
        return y


@pytest.mark.parametrize("on_values", [False, True], ids=["fake", "real"])
def test_caches_outside_of_the_model_get_no_fake_tensor(on_values: bool) -> None:
    hooked: dict[str, Any] = {}
    model = Outside()
    model.linear.register_forward_hook(lambda module, args, output: hooked.update(y=output))
    for cache in (TABLE, PAIRS, SEEN):
        cache.clear()
    TABLE["other"] = torch.zeros(1)
    counted = OnValues(model) if on_values else model
    assert separable.count(counted, (2, 4)).macs == 2 * 4 * 4
    held = [*TABLE.values(), *SEEN, *hooked.values(), positions(4), Outside.last]
    assert not any(isinstance(each, FakeTensor) for each in held)
    assert list(TABLE) == (["other", ("scale", 4)] if on_values else ["other"])
    assert bool(PAIRS) == on_values
    assert type(model(torch.ones(2, 4))) is Tensor


def test_counting_leaves_no_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that only the collector frees would be taken for ones that escaped."""

    def refuse() -> int:
        raise AssertionError("gc.collect")

    gc.collect()
    monkeypatch.setattr(gc, "collect", refuse)
    for model in (nn.LSTM(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))):
        separable.count(model, (3, 2, 4))


class Slot:
    __slots__ = ("kept",)


def test_what_cannot_be_emptied_is_an_error() -> None:
    slot = Slot()

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            slot.kept = super().forward(x)
            return slot.kept

    with pytest.raises(RuntimeError, match=r"in a Slot\).*attributes of its modules"):
        separable.count(Net(4, 4), (2, 4))


def test_counts_under_autocast_leave_no_fake_weight_in_its_cache() -> None:
    model = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        separable.count(model, (2, 4))
        assert type(model(torch.ones(2, 4))) is Tensor


def switches() -> tuple[bool, ...]:
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch._C._get_mkldnn_enabled(),
        torch._C._get_cudnn_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    )


def test_switches_are_as_before_after_counts_in_threads() -> None:
    """The second block begins in the first, which ends first."""
    before = switches()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with plain_operators():
            inside.set()
            leave.wait(10)

    def second() -> None:
        inside.wait(10)
        threading.Timer(0.1, leave.set).start()
        with plain_operators():
            threads[0].join(10 if leave.is_set() else 0.5)

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    now = switches()
    torch.backends.mha.set_fastpath_enabled(before[0])
    torch._C._set_mkldnn_enabled(before[1])
    torch._C._set_cudnn_enabled(before[2])
    torch.backends.cuda.enable_flash_sdp(before[3])
    assert now == before
