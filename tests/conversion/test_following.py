"""What follows a layer: found however a network says it, and what it leaves free."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import separable
from separable.conversion import applying, sites
from separable.conversion.calibration import Inputs
from separable.conversion.following import Affine, Sequel, followed
from separable.conversion.sensitivity import divergence
from separable.conversion.sites import Runs, collect, frozen_copy, trace

INF = math.inf


class Net(nn.Module):
    """Convolutions and a batch norm for a function to join."""

    def __init__(self, join):
        super().__init__()
        self.conv, self.side = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.join = nn.BatchNorm2d(4), join
        nn.init.uniform_(self.norm.weight, -1, 1)
        nn.init.uniform_(self.norm.running_mean, -1, 1)

    def forward(self, input):
        return self.join(self, input)


def in_place(net, input):
    output = net.norm(net.conv(input))
    output += net.side(input)
    return F.relu(output, inplace=True)


def preactivated(net, input):
    total = net.conv(input) + input
    return net.norm(total).relu() + total


def used_later(net, input):
    output = net.norm(net.conv(input))
    return F.relu(output) + output


def used_before(net, input):
    output = net.conv(input)
    return F.relu(net.norm(output)) * output.mean()


def in_batch_statistics(net, input):
    norm = net.norm
    statistics = norm.running_mean.clone(), norm.running_var.clone()
    return F.relu(F.batch_norm(net.conv(input), *statistics, norm.weight, norm.bias, training=True))


def seen(low=-INF, high=INF, norm=False, summed=False):
    return norm, summed, low, high


CASES = {
    "relu": (lambda net, x: F.relu(net.conv(x)), seen(0.0)),
    "method": (lambda net, x: net.conv(x).relu_(), seen(0.0)),
    "norm, relu": (lambda net, x: torch.relu(net.norm(net.conv(x))), seen(0.0, norm=True)),
    "relu6": (lambda net, x: F.relu6(net.conv(x)), seen(0.0, 6.0)),
    "hardtanh": (lambda net, x: F.hardtanh(net.conv(x), -2.0, max_val=3.0), seen(-2.0, 3.0)),
    "hardswish": (lambda net, x: F.hardswish(net.norm(net.conv(x))), seen(-3.0, norm=True)),
    "hardsigmoid": (lambda net, x: F.hardsigmoid(net.conv(x)), seen(-3.0, 3.0)),
    "norm": (lambda net, x: net.norm(net.conv(x)), seen(norm=True)),
    "smooth": (lambda net, x: F.silu(net.norm(net.conv(x))), seen(norm=True)),
    "pool": (lambda net, x: F.relu(F.max_pool2d(net.conv(x), 2)), seen()),
    "sum": (lambda net, x: F.relu(net.conv(x) + net.side(x)), seen(0.0, summed=True)),
    "sum in place": (in_place, seen(0.0, norm=True, summed=True)),
    "sum with a number": (lambda net, x: F.relu(net.conv(x) + 1), seen()),
    "sum of channels": (lambda net, x: F.relu(net.conv(x) + x[:, :, :1, :1]), seen()),
    "weighted sum": (lambda net, x: F.relu(torch.add(net.conv(x), x, alpha=2)), seen()),
    "sum with itself": (lambda net, x: F.relu(sum([net.conv(x)] * 2)), seen()),
    "two sums": (lambda net, x: F.relu(net.conv(x) + net.side(x) + x), seen(summed=True)),
    "norm of a sum": (preactivated, seen(summed=True)),
    "used later": (used_later, seen(norm=True)),
    "used before": (used_before, seen()),
    "batch statistics": (in_batch_statistics, seen()),
    "concatenated": (lambda net, x: F.relu(torch.cat([net.conv(x), x], 1)), seen()),
    "chunked": (lambda net, x: F.relu(net.conv(x).chunk(2, 1)[0]), seen()),
    "asked for its size": (lambda net, x: F.relu((y := net.conv(x)), y.dim() > 9), seen(0.0)),
    "twice": (lambda net, x: F.relu(net.conv(F.relu(net.conv(x)))), seen()),
}


@pytest.mark.parametrize("name", CASES)
def test_what_follows_is_found(name):
    join, expected = CASES[name]
    net = Net(join).eval()
    input = torch.randn(2, 4, 6, 6)
    before = net(input)
    sequel = {site.name: site for site in trace(net, input)}["conv"].sequel
    assert (sequel.affine is not None, sequel.summed, sequel.low, sequel.high) == expected
    if sequel.affine:
        torch.testing.assert_close(
            input * sequel.affine.scale.view(-1, 1, 1) + sequel.affine.shift.view(-1, 1, 1),
            net.norm(input),
        )
    assert torch.equal(net(input), before)
    assert not any(module._forward_hooks for module in net.modules())


def test_both_branches_of_a_sum_know_the_other():
    net = Net(in_place).eval()
    input = torch.randn(2, 4, 6, 6)
    main, side = net.norm(net.conv(input)), net.side(input)
    with torch.no_grad(), followed(net, ["conv", "side"]) as runs:
        output = net(input)
        torch.relu_(output.sub_(1))  # writes over what was kept
    for name, other in (("conv", side), ("side", main)):
        (run,) = runs[name]
        torch.testing.assert_close(run.beside, other)
        torch.testing.assert_close(run.end, F.relu(main + side))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_of_torchvision(name):
    torchvision = pytest.importorskip("torchvision")
    model = frozen_copy(getattr(torchvision.models, name)())
    found = {site.name: site.sequel for site in trace(model, torch.randn(2, 3, 64, 64))}
    assert all(sequel.affine for sequel in found.values())
    if name == "resnet18":
        assert all(sequel.low == 0 for sequel in found.values())
        assert sum(sequel.summed for sequel in found.values()) == 8 + 3
    else:
        ranges = [(sequel.low, sequel.high) for sequel in found.values()]
        assert ranges.count((0, 6)) == 35  # all but the ends of 17 blocks
        assert sum(sequel.summed for sequel in found.values()) >= 10


VALUES = st.floats(-4, 4).map(lambda x: round(x, 2))


@settings(max_examples=300, deadline=None)
@given(
    values=st.tuples(*[VALUES] * 4),
    scale=VALUES.filter(lambda x: abs(x) > 0.1),
    ends=st.tuples(VALUES, VALUES).map(sorted).filter(lambda ends: ends[0] < ends[1]),
    draws=st.lists(VALUES, min_size=5, max_size=20),
)
def test_goals_are_the_nearest_outputs_with_the_same_outcome(values, scale, ends, draws):
    wanted, reached, old, new = (torch.tensor(v, dtype=torch.float64).view(1, 1) for v in values)
    affine = Affine(torch.tensor([scale], dtype=torch.float64), torch.full((1,), 0.5).double())
    sequel = Sequel(affine, True, *ends)

    def outcome(value, other):
        return (value * scale + 0.5 + other).clamp(*ends)

    goal = sequel.goal(wanted, reached, (old, new), 0)
    torch.testing.assert_close(outcome(goal, new), outcome(wanted, old))
    for draw in draws:  # no other is nearer
        other = torch.full((1, 1), draw).double()
        if (outcome(other, new) - outcome(wanted, old)).abs() < 1e-9:
            inside = ends[0] < outcome(wanted, old) < ends[1]
            assert inside or (goal - reached).abs() <= (other - reached).abs() + 1e-9
    plain = Sequel(affine, True).goal(wanted, None, (old, new), 0)
    torch.testing.assert_close(plain * scale + new, wanted * scale + old)


def test_a_channel_that_the_norm_leaves_out_keeps_its_outputs():
    affine = Affine(torch.tensor([1.0, 0.0]), torch.zeros(2))
    wanted, reached = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    goal = Sequel(affine, low=0.0).goal(wanted, reached, None, 1)
    assert torch.equal(goal[:, 1], wanted[:, 1])
    assert goal.isfinite().all()


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU())
            self.main.append(nn.Conv2d(12, 12, 3, padding=1))

        def forward(self, input):
            return F.relu(self.main(input) + input)

    layers = [nn.Conv2d(3, 12, 3), nn.ReLU(), Block(), Block(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 5)).eval()
    with torch.no_grad():
        model[-1].weight.mul_(20)
    inputs = torch.randn(600, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plan = separable.plan(model, inputs[:200], "macs=0.2", progress=False)
    return model, inputs, plan


def fitted_once(model, plan, inputs):
    given = Inputs(inputs, model)
    sites = trace(model, given.first, given)
    return applying.fitted(model, plan, sites, given, progress=False)[0]


def test_a_sum_makes_up_for_what_its_other_branch_lost(residual, monkeypatch):
    model, inputs, plan = residual
    errors = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(Sequel, "matters", False)
            monkeypatch.setattr(applying, "ROUNDS", 0)
        found = fitted_once(model, plan, inputs[:200])
        errors.append(divergence(found, model, inputs[200:].split(100)))
    assert errors[0] < 0.9 * errors[1]


def test_outputs_that_an_activation_leaves_free_are_used(residual, monkeypatch):
    model, inputs, plan = residual
    errors = []
    for rounds in (2, 0):
        monkeypatch.setattr(applying, "ROUNDS", rounds)
        found = fitted_once(model, plan, inputs[:200])
        errors.append(divergence(found, model, inputs[200:].split(100)))
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("kept", [True, False])
def test_moments_after_a_fit_keep_the_gram_matrix(residual, monkeypatch, kept):
    model, inputs, _ = residual
    site = {site.name: site for site in trace(model, inputs[:2])}["0"]
    form = nn.Conv2d(3, 12, 3)
    monkeypatch.setattr(sites, "KEPT_BYTES", 1 << 30 if kept else 1000)
    runs = Runs(model, model, site, inputs[:100].split(20))
    first = collect(runs, 0)
    assert (runs._kept is not None) == kept
    again = collect(runs, 0, form, first)
    assert again.gram is first.gram
    torch.testing.assert_close(again.mean, first.mean)
    wanted, reached = model[0](inputs[:100]), form(inputs[:100])
    goal = wanted.where(wanted > 0, reached.clamp(max=0)).double()
    mean = goal.movedim(1, 0).flatten(1).mean(1)
    torch.testing.assert_close(again.target[0], mean, rtol=1e-4, atol=1e-6)
