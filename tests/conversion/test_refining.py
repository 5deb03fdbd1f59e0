"""The pass over all layers together: what it lowers, what it leaves alone, how it adds up."""

import copy

import pytest
import torch
from torch import nn

import separable
from separable.conversion import refining
from separable.conversion.applying import fitted as fit
from separable.conversion.calibration import Inputs
from separable.conversion.refining import refined
from separable.conversion.sensitivity import divergence
from separable.conversion.sites import frozen_copy, trace


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, 5)).eval()
    with torch.no_grad():
        model[-1].weight.mul_(30)
    return model


@pytest.fixture(scope="module")
def case():
    model = network()
    inputs = torch.randn(96, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    plan = separable.plan(model, inputs, "macs=0.25", progress=False)
    given = Inputs(inputs, model)
    fitted, report = fit(model, plan, trace(model, given.first), given, progress=False)
    assert not report.refined
    return model, inputs, fitted


def test_inputs_never_shown_come_closer(case, monkeypatch):
    monkeypatch.setattr(refining, "STEPS", 200)
    model, inputs, fitted = case
    others = torch.randn(500, 3, 10, 10, generator=torch.Generator().manual_seed(2)).split(100)
    before = {name: value.clone() for name, value in fitted.state_dict().items()}
    better = refined(fitted, model, Inputs(inputs, model), 1.0, 0, progress=False)
    assert divergence(better, model, others) < 0.9 * divergence(fitted, model, others)
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in model.named_parameters():  # what stayed dense is the original's
        if name in dict(better.named_parameters()):
            assert torch.equal(value, better.get_parameter(name))


def test_flags_and_gradients_are_as_they_were(case, monkeypatch):
    monkeypatch.setattr(refining, "STEPS", 60)
    model, inputs, fitted = case
    fitted = copy.deepcopy(fitted)
    first = next(fitted.parameters()).requires_grad_(False)
    better = refined(fitted, model, Inputs(inputs, model), 1.0, 0, progress=False)
    assert not first.requires_grad
    flags = [parameter.requires_grad for parameter in better.parameters()]
    assert flags == [parameter.requires_grad for parameter in fitted.parameters()]
    assert all(parameter.grad is None for parameter in better.parameters())


def test_steps_that_make_it_worse_are_undone(case, monkeypatch):
    monkeypatch.setattr(refining, "RATE", 10.0)
    model, inputs, fitted = case
    assert refined(fitted, model, Inputs(inputs, model), 1.0, 0, progress=False) is None


def test_a_network_too_large_is_left_alone(case):
    model, inputs, fitted = case
    assert refined(fitted, model, Inputs(inputs, model), 1e12, 0, progress=False) is None


@pytest.mark.parametrize("other", ["sizes", "single"])
def test_batches_of_many_sizes(case, other):
    model, inputs, fitted = case
    given = [*inputs.split(40), inputs[:1]]
    if other == "sizes":
        given.append(torch.randn(8, 3, 12, 9))
    else:
        given = list(inputs[:9])
    better = refined(fitted, model, Inputs(given, model), 1.0, 0, progress=False)
    assert better is None or all(p.isfinite().all() for p in better.parameters())


def test_a_step_is_the_same_however_the_batches_are_divided(case):
    _, inputs, _ = case
    batches = list(inputs.split(24))

    def drawn(given):
        generator = torch.Generator().manual_seed(3)
        return torch.cat(list(refining._draws(given, 0.25, generator)))

    apart = torch.cat([drawn(batches[:2]), drawn(batches[2:])])
    assert torch.equal(apart, drawn(batches))
    assert len(apart) == 24


def test_outputs_that_are_no_logits():
    model = frozen_copy(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3)))
    inputs = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plan = separable.plan(model, inputs, "macs=0.4", progress=False)
    given = Inputs(inputs, model)
    fitted, _ = fit(model, plan, trace(model, given.first), given, progress=False)
    better = refined(fitted, model, given, 1.0, 0, progress=False)
    assert better is not None
    assert divergence(better, model, given) < divergence(fitted, model, given)
