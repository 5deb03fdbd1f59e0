"""What is set, and what happens to the weights, around the calls of a compiled model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune

import separable

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    """One with a part in torch, and with a table of neighbours."""
    torch.manual_seed(0)
    up = nn.Upsample(scale_factor=2, mode="bilinear")
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.Softplus(), up, nn.Conv2d(4, 5, 3)).eval()


def reference(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("compiled_there", [False, True])
def test_another_default_dtype(dtype: torch.dtype, compiled_there: bool) -> None:
    model = network()
    expected = reference(model)
    compiled = separable.compile(model, X)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if compiled_there:
            compiled = separable.compile(model, X)
        found = compiled(X)
        explained = compiled.explain(1)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert explained.rows


@pytest.mark.parametrize("compiled_there", [False, True])
def test_another_default_device(compiled_there: bool) -> None:
    model = network()
    expected = reference(model)
    compiled = separable.compile(model, X)
    with torch.device("meta"):
        if compiled_there:
            compiled = separable.compile(model, X)
        found = compiled(X)
        compiled.explain(1)
    torch.testing.assert_close(found, expected)


def test_calls_in_inference_mode_and_outside_share_memory() -> None:
    model = network()
    compiled = separable.compile(model, X)
    with torch.inference_mode():
        compiled(X)
    torch.testing.assert_close(compiled(X), reference(model))


class Sum(nn.Module):
    """Its weight is a sum with a product, which autocast would round."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.softplus(nn.functional.linear(x, self.a + self.a @ self.b))


def test_autocast_rounds_nothing() -> None:
    model, x = Sum().eval(), torch.randn(2, 6)
    compiled = separable.compile(model, x)
    with torch.no_grad():
        model.a.add_(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(x)
    torch.testing.assert_close(found, reference(model, x))
    torch.testing.assert_close(compiled(x), reference(model, x))


class Difference(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b


def test_one_tensor_given_as_two_arguments() -> None:
    compiled = separable.compile(Difference().eval(), (X, X))
    assert torch.equal(compiled(2 * X, X), X)


class Tied(nn.Module):
    """A weight of two names, and tensors that are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.scale = torch.tensor(3.0)
        self.a.shift = torch.ones(8)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu()) * self.scale + self.a.shift


def tied() -> tuple[Tied, torch.Tensor]:
    torch.manual_seed(0)
    return Tied().eval(), torch.randn(2, 8)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("backend", [False, True])
def test_steps_of_fused_optimisers_are_seen(optimizer: type, backend: bool) -> None:
    model, x = tied()
    fast = torch.compile(model, backend="separable") if backend else separable.compile(model, x)
    fused = optimizer(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
        model(x).sum().backward()
        fused.step()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    if not backend:
        assert not fast.program._watched.changed()  # packed once, not at every call


def test_tensors_that_are_attributes_are_seen() -> None:
    model, x = tied()
    compiled = separable.compile(model, x)
    model.scale = torch.tensor(7.0)
    model.a.shift = torch.zeros(8)  # type: ignore[assignment]
    torch.testing.assert_close(compiled(x), reference(model, x))
    model.scale.mul_(2)
    torch.testing.assert_close(compiled(x), reference(model, x))


def test_tied_weights_stay_tied() -> None:
    model, x = tied()
    compiled = separable.compile(model, x)
    weight = nn.Parameter(torch.randn(8, 8))
    model.a.weight = model.b.weight = weight
    torch.testing.assert_close(compiled(x), reference(model, x))
    model.b.weight = nn.Parameter(weight.detach().clone())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"`a.weight` and `b.weight` are no longer one"):
            compiled(x)
    model.b.weight = weight
    torch.testing.assert_close(compiled(x), reference(model, x))


def test_a_fused_step_before_an_error_is_not_forgotten() -> None:
    model, x = tied()
    compiled = separable.compile(model, x)
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()
    weight = model.b.weight
    model.b.weight = nn.Parameter(weight.detach().clone())
    with pytest.raises(RuntimeError, match="are no longer one"):
        compiled(x)
    model.b.weight = weight
    torch.testing.assert_close(compiled(x), reference(model, x))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight", nn.Parameter(torch.ones(5, 4, 1, 9)), r"`3.weight` has the shape \[5, 4, 1, 9"),
        ("bias", None, "`3.bias` is gone"),
        ("bias", nn.Parameter(torch.ones(1)), r"`3.bias` has the shape \[1\] and had \[5\]"),
    ],
)
def test_other_weights_need_another_compilation(
    name: str, value: nn.Parameter | None, words: str
) -> None:
    model = network()
    compiled = separable.compile(model, X)
    expected = compiled(X)
    before = getattr(model[3], name)  # type: ignore[index]
    setattr(model[3], name, value)  # type: ignore[index]
    with pytest.raises(RuntimeError, match=f"weight {words}.*compile the model again"):
        compiled(X)
    setattr(model[3], name, before)  # type: ignore[index]
    assert torch.equal(compiled(X), expected)


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")  # torch.export's
def test_a_weight_that_was_removed() -> None:
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index]
    compiled = separable.compile(model, X)
    torch.testing.assert_close(compiled(X), reference(model))
    prune.remove(model[0], "weight")  # type: ignore[index]
    with pytest.raises(RuntimeError, match="weight_orig` is gone; compile the model again"):
        compiled(X)


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, k: int) -> torch.Tensor:
        return x * k


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> Pair:
        return Pair(x * 2, x * 3)


class Constant(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"y": x * 2, "n": 3}


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (Scaled(), (X, 3), r"argument that is no float32 tensor \(1, of type int\)"),
        (Constant(), (X,), "returns something that is no float32 tensor"),
        (Named(), (X,), "only tuples, lists and dictionaries can nest"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2, dilation=2)), (X,), "runs 0 in torch"),
    ],
)
def test_what_can_not_be_saved(
    model: nn.Module, arguments: tuple[object, ...], words: str, tmp_path: Path
) -> None:
    compiled = separable.compile(model.eval(), arguments)
    with pytest.raises(ValueError, match=words):
        compiled.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_python_functions_are_explained_by_name() -> None:
    compiled = separable.compile(Constant().eval(), X)
    assert "torch: as_it_is" in str(compiled.explain(1))


def test_softmax_over_one_value_is_saved(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 1, 12).to(memory_format=torch.channels_last)
    compiled = separable.compile(nn.Softmax(2).eval(), x)
    compiled.save(tmp_path / "a")
    assert torch.equal(separable.load_compiled(tmp_path / "a")(x), torch.ones_like(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_compiled_models_are_not_copied(duplicate: Callable[[object], object]) -> None:
    compiled = separable.compile(nn.ReLU().eval(), X)
    with pytest.raises(TypeError, match="can't be copied or pickled"):
        duplicate(compiled)


def test_what_torch_can_not_make_functional() -> None:
    with pytest.raises(ValueError, match="can't be traced as one graph"):
        separable.compile(nn.CrossMapLRN2d(3).eval(), X)


def test_no_example() -> None:
    with pytest.raises(TypeError, match=r"`example_inputs` .a NoneType. must be a tensor"):
        separable.compile(nn.ReLU().eval(), None)  # type: ignore[arg-type]


def test_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"`model` .a function. must be an nn.Module"):
        separable.compile(lambda x: x, X)  # type: ignore[arg-type]


def test_numbers_where_a_batch_should_be() -> None:
    compiled = separable.compile(nn.ReLU().eval(), X, dynamic_batch=True)
    with pytest.raises(TypeError, match=r"argument 0 \(=5\) must be a tensor"):
        compiled(5)


def test_what_is_saved_has_the_weights_of_now(tmp_path: Path) -> None:
    model = network()[0]
    compiled = separable.compile(model, X)
    with torch.no_grad():
        model.weight.mul_(10)
    compiled.save(tmp_path / "a")
    torch.testing.assert_close(separable.load_compiled(tmp_path / "a")(X), reference(model))


@pytest.mark.parametrize("fake_input", [False, True])
def test_tensors_without_data_are_refused(fake_input: bool) -> None:
    compiled = separable.compile(network(), X)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    x = mode.from_tensor(X) if fake_input else X
    with mode, pytest.raises(TypeError, match="FakeTensor"):
        compiled(x)
    torch.testing.assert_close(compiled(X), reference(network()))


def test_compiling_in_several_threads() -> None:
    model = network()
    expected = reference(model)
    with ThreadPoolExecutor(4) as pool:
        for compiled in pool.map(lambda _: separable.compile(model, X, threads=1), range(8)):
            torch.testing.assert_close(compiled(X), expected)


def test_arguments_that_mean_nothing() -> None:
    with pytest.raises(ValueError, match="`repeats`"):
        separable.compile(network(), X).explain(0)
    with pytest.raises(ValueError, match="`isa`"):
        separable.compile(network(), X, isa="")
    fast = torch.compile(network(), backend="separable", options={"threads": 0})
    with pytest.raises(Exception, match="`threads`"):  # though gradients would take it to torch
        fast(X)
    torch.compiler.reset()
