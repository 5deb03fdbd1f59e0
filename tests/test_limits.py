"""Whole numbers are checked in one way, wherever they are taken."""

import numpy as np
import pytest
import torch
from torch import nn

import separable
from separable.conversion.plans import check_seed
from separable.cost.measuring import check_timing
from separable.limits import MOST_THREADS, whole_number
from separable.models import mobilenet_v1
from separable.runtime.dynamo import backend
from separable.training.recipe import Recipe

X = torch.zeros(1, 3, 8, 8)


def conv():
    return nn.Conv2d(3, 3, 1).eval()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("threads", lambda value: separable.compile(conv(), X, threads=value)),
        ("threads", lambda value: separable.measure(conv(), inputs=X, threads=value)),
        ("threads", lambda value: backend(torch.fx.symbolic_trace(conv()), [X], threads=value)),
        ("repeats", lambda value: check_timing(repeats=value)),
        ("seed", check_seed),
        ("depth", lambda value: separable.count(conv(), inputs=X).to_string(depth=value)),
        ("in_channels", lambda value: separable.nn.SeparableConv2d(value, 4, 3)),
        ("num_classes", lambda value: mobilenet_v1(num_classes=value)),
        ("epochs", lambda value: Recipe(epochs=value)),
    ],
)
@pytest.mark.parametrize("value", [True, 1.5, "2"])
def test_what_is_no_int_is_a_type_error(name, call, value):
    with pytest.raises(TypeError) as caught:
        call(value)
    assert str(caught.value) == f"`{name}` (={value!r}) must be an int"


def test_bounds():
    assert whole_number("n", np.int64(3), least=3, most=3) == 3
    assert type(whole_number("n", np.int64(3))) is int
    for value, bounds, words in (
        (0, {"least": 1}, "`n` (=0) must be at least 1"),
        (3, {"most": 2}, "`n` (=3) must be at most 2"),
        (-1, {"least": 0, "most": 2}, "`n` (=-1) must be from 0 to 2"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            whole_number("n", value, **bounds)
        assert str(caught.value) == words
    with pytest.raises(ValueError, match=f"from 1 to {MOST_THREADS}"):
        separable.measure(conv(), inputs=X, threads=0)


def test_a_plan_takes_numbers_of_numpy_and_saves_them():
    plan = separable.plan(conv(), None, "macs=1", example=X, seed=np.int64(3), progress=False)
    assert separable.Plan.from_json(plan.to_json()).seed == 3
