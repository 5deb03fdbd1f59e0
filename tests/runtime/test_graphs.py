"""Graphs that are no plain networks: writes in place, other results than floats, odd arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import separable


class Graph(nn.Module):
    """A function of a module with a convolution and a weight, and of tensors."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = function
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.linear = nn.Linear(2, 4)
        for parameter in self.parameters():
            parameter.data.uniform_(-0.5, 0.5, generator=generator)
        self.weight = nn.Parameter(torch.rand(2, 6, 5, 7, generator=generator))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, *arguments: Any) -> Any:
        return self.function(self, *arguments)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 6, 5, 7), generator=torch.Generator().manual_seed(1))


def twice(y: torch.Tensor, axis: int = 1) -> torch.Tensor:
    return torch.cat([y, y * 2], axis)


def written(view: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def function(m: Graph, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = m.conv(x)
        view(y).add_(1)
        return y

    return function


def base_written(m: Graph, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    part = y.narrow(1, 0, 2)
    y.add_(1)
    return part


def integers_written(m: Graph, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x + 1
    row = x[0]
    x.add_(1)
    return row, x


def written_after_cat(m: Graph, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = m.conv(x)
    both = torch.cat([y, x], 1)
    return both, y.erf_()


def with_out(m: Graph, x: torch.Tensor) -> torch.Tensor:
    z = torch.empty_like(x)
    torch.add(x, 2, out=z)
    return z


def in_modes(m: Graph, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        y = m.conv(x)
    with torch.enable_grad():
        return m.conv(y)


def alone(x: torch.Tensor) -> torch.Tensor:
    return x.sum((0, 1, 2, 3))


X, INTEGERS = image(), torch.tensor([[1, 2, 3], [4, 5, 6]])
GRAPHS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "linear-in-cat": (lambda m, x: twice(m.linear(x)), (image(8, 1, 5, 2),)),
    "softmax-in-cat": (lambda m, x: twice(x.softmax(-1)), (image(8, 1, 5, 6),)),
    "softmax-in-cat-2d": (lambda m, x: twice(x.softmax(0)), (image(3, 1),)),
    "softmax-in-cat-3d": (lambda m, x: twice(x.softmax(1), 2), (image(2, 4, 1),)),
    "weight-plus-scaled": (lambda m, x: torch.add(m.weight, x, alpha=3), (X,)),
    "weight-plus-product": (lambda m, x: torch.addcmul(m.weight, x, x, value=2.5), (X,)),
    "weight-minus": (lambda m, x: (m.weight - x) / (2 + m.weight / (3 + x * x)), (X,)),
    "minus-itself": (lambda m, x: torch.sub(x, x, alpha=-2), (X,)),
    "times-infinity": (lambda m, x: m.conv(x) * float("inf"), (X,)),
    "over-zero": (lambda m, x: m.conv(x) / 0, (X,)),
    "narrow-written": (written(lambda y: y.narrow(1, 0, 2)), (X,)),
    "slice-written": (written(lambda y: y[:, 1:3]), (X,)),
    "diagonal-written": (written(lambda y: y.diagonal(0, 2, 3)), (X,)),
    "moved-written": (written(lambda y: y.movedim(1, 2)), (X,)),
    "transposed-written": (written(lambda y: y.mT), (X,)),
    "part-written": (written(lambda y: y.tensor_split(2, 1)[0]), (X,)),
    "strided-written": (written(lambda y: y.as_strided((2,), (1,))), (X,)),
    "base-written": (base_written, (X,)),
    "integers-written": (integers_written, (INTEGERS,)),
    "written-after-cat": (written_after_cat, (X,)),
    "clone-written": (lambda m, x: x.clone().add_(1), (X,)),
    "copy-written": (lambda m, x: x.permute(0, 2, 3, 1).contiguous().mul_(2), (X,)),
    "out": (with_out, (X,)),
    "results-of-all-kinds": (lambda m, x: {"a": (x * 2, None), "b": [3, "c"]}, (X,)),
    "results-that-are-constants": (lambda m, x: (x * 2, torch.arange(3), torch.tensor(5)), (X,)),
    "results-that-are-arguments": (lambda m, x, i: (x * 2, i, i + 1, x), (X, INTEGERS)),
    "result-of-no-size": (lambda m, x: m.conv(x).split([6, 0], 1), (X,)),
    "second-result": (lambda m, x: F.adaptive_max_pool2d(x, 1, return_indices=True), (X,)),
    "number": (lambda m, x, k: x * k, (X, 3)),
    "no-batch": (lambda m, x: m.conv(x), (image(6, 5, 7),)),
    "no-axes": (
        lambda m, x: [
            alone(x).flatten(), alone(x).sum(-1), alone(x).softmax(0), alone(x).transpose(0, 0)
        ],
        (X,),
    ),
    "addmm-scaled": (
        lambda m, x: torch.addmm(m.linear.bias, x, m.linear.weight.t(), beta=2, alpha=0.5),
        (image(3, 2),),
    ),
    "branches": (lambda m, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), (X,)),
    "modes": (in_modes, (X,)),
    "larger": (lambda m, x: [F.interpolate(x, scale_factor=s) for s in (1.3, 2.2, 0.7)], (X,)),
    "larger-twice": (lambda m, x: F.interpolate(x, scale_factor=2.2), (image(1, 3, 2, 2),)),
    "smoother": (
        lambda m, x: [F.interpolate(x, scale_factor=s, mode="bilinear") for s in (1.3, 2.2)],
        (image(1, 3, 2, 2),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name: str) -> None:
    function, arguments = GRAPHS[name]
    model = Graph(function).eval()
    expected = copy.deepcopy(model)(*copy.deepcopy(arguments))
    compiled = separable.compile(model, arguments, threads=1)
    for _ in range(2):
        pytree.tree_map(close, compiled(*arguments), expected)


@pytest.mark.parametrize(
    "name",
    ["narrow-written", "results-of-all-kinds", "integers-written", "addmm-scaled", "no-axes"],
)
def test_graphs_behind_torch_compile(name: str) -> None:
    function, arguments = GRAPHS[name]
    model = Graph(function).eval()
    expected = copy.deepcopy(model)(*copy.deepcopy(arguments))
    compiled = torch.compile(model, backend="separable")
    with torch.no_grad():
        pytree.tree_map(close, compiled(*arguments), expected)


def close(actual: Any, expected: Any) -> None:
    if not isinstance(expected, torch.Tensor):
        assert actual == expected
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_random_numbers_are_drawn_anew() -> None:
    compiled = separable.compile(Graph(lambda m, x: torch.rand_like(m.weight) + x).eval(), X)
    assert not torch.equal(compiled(X), compiled(X))


def count(m: Graph, x: torch.Tensor) -> torch.Tensor:
    m.count = m.count + 1
    return x * 2


@pytest.mark.parametrize(
    "function", [lambda m, x: (x.diagonal(0, 2, 3).add_(1), m.conv(x))[1], count]
)
def test_what_is_written_outside_is_refused(function: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="writes into its input or a weight"):
        separable.compile(Graph(function).eval(), X)


def test_arguments_that_torch_reads_are_checked() -> None:
    compiled = separable.compile(Graph(lambda m, x, k, i: x * k + i[0, 0]).eval(), (X, 3, INTEGERS))
    assert len(compiled.explain(repeats=1).fallbacks) > 0
    with pytest.raises(ValueError, match=r"argument 1 .=4. must be 3"):
        compiled(X, 4, INTEGERS)
    with pytest.raises(ValueError, match=r"argument 2 .of torch.int64 and shape .1, 3."):
        compiled(X, 3, INTEGERS[:1])
    with pytest.raises(TypeError, match=r"argument 2 .*must be a tensor on the CPU"):
        compiled(X, 3, 7)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x.argmax(1), x * 2),
        lambda m, x: x.permute(1, 0, 2, 3) * 1,
        lambda m, x: x.flatten(0, 1) * 1,
    ],
)
def test_any_batch_needs_results_with_a_batch(function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="float32 results with the batch as their first axis"):
        separable.compile(Graph(function).eval(), X, dynamic_batch=True)


def test_any_batch_of_what_is_no_number() -> None:
    compiled = separable.compile(Graph(lambda m, x: x.log()).eval(), X, dynamic_batch=True)
    torch.testing.assert_close(compiled(image(3, 6, 5, 7)), image(3, 6, 5, 7).log(), equal_nan=True)


def test_rows_of_padding_alone_end_a_chain() -> None:
    strided = nn.Conv2d(8, 8, 2, 3, padding=1, groups=8)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), strided, nn.Conv2d(8, 8, 1, padding=1)).eval()
    x = image(1, 8, 14, 14)
    compiled = separable.compile(model, x, threads=1)
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_padding_is_saved(tmp_path: Path) -> None:
    model = Graph(lambda m, x: F.avg_pool2d(F.pad(x, (1, 2), value=3.0), 3, 2, 1)).eval()
    compiled = separable.compile(model, X, threads=1)
    compiled.save(tmp_path / "model")
    assert torch.equal(separable.load_compiled(tmp_path / "model")(X), compiled(X))


INF = float("inf")
HIDDEN = torch.tensor([[-INF, -INF, -INF], [0.0, -INF, 1.0], [-INF, INF, 0.0]])
ONES = torch.ones(2, 3, 3)
WHOLE = torch.randint(0, 2, (5, 197), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (lambda q, m: F.scaled_dot_product_attention(q, q, q, m), (torch.ones(2, 3, 4), HIDDEN)),
        (lambda m: m.softmax(-1), (HIDDEN,)),
        (
            lambda b, x: torch.baddbmm(b, x, x, beta=0),
            (HIDDEN.expand(2, 3, 3), torch.ones(2, 3, 3)),
        ),
        (lambda x: F.linear(x, torch.ones(3, 4), torch.ones(1)), (torch.ones(2, 4),)),
        (lambda x: torch.addmm(torch.ones(1), x, torch.ones(4, 3)), (torch.ones(2, 4),)),
        (lambda x: F.avg_pool1d(x, 5000), (torch.randn(1, 2, 5000),)),
        (lambda x: F.max_pool2d(x, (1, 5000)), (torch.randn(1, 2, 3, 5000),)),
        (lambda x: x.var(0, correction=3), (torch.tensor([[1.0], [2.0]]),)),
        (lambda x: (x.sum(-1), x.sum(0), x.sum()), (WHOLE,)),
    ],
)
@pytest.mark.filterwarnings("ignore:var")
def test_corners_of_what_torch_defines(
    function: Callable[..., object], arguments: tuple[torch.Tensor, ...]
) -> None:
    class Model(nn.Module):
        def forward(self, *given: torch.Tensor) -> object:
            return function(*given)

    expected = function(*arguments)
    found = separable.compile(Model().eval(), arguments, threads=1)(*arguments)
    torch.testing.assert_close(found, expected, equal_nan=True)
    if arguments[0] is WHOLE:
        assert all(map(torch.equal, found, expected))
