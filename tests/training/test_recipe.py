"""Every option of the recipe does what it says: groups, schedule, averages, YAML."""

import dataclasses
import math

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

from separable.training.optimizing import (
    averaging,
    optimizer_of,
    rate,
    schedule_of,
    sizes_of,
    without_decay,
)
from separable.training.recipe import Distillation, Recipe, described, read_config

from .networks import net


def grouped(recipe, network):
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    plain, sizes = without_decay(network), sizes_of(network)
    optimizer = optimizer_of(network.named_parameters(), plain, recipe, sizes)
    return optimizer, [
        ({names[id(p)] for p in group["params"]}, group["weight_decay"])
        for group in optimizer.param_groups
    ]


def test_norms_biases_and_depthwise_filters_have_no_decay():
    optimizer, groups = grouped(Recipe(weight_decay=0.3, lr=0.2, momentum=0.7), net())
    assert groups == [
        ({"0.weight", "7.weight"}, 0.3),
        ({"0.bias", "2.weight", "2.bias", "3.weight", "3.bias", "7.bias"}, 0.0),
    ]
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.2
    assert optimizer.defaults["momentum"] == 0.7
    assert optimizer.defaults["nesterov"]


@pytest.mark.parametrize(
    ("conv", "plain"),
    [
        (nn.Conv2d(4, 8, 3, groups=4), True),  # two filters per channel
        (nn.Conv2d(8, 4, 3, groups=4), True),  # the sum of two depthwise filters
        (nn.Conv2d(8, 8, 3, groups=2), False),
        (nn.Conv2d(1, 8, 3), False),
        (nn.Conv1d(4, 4, 3, groups=4), True),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), True),
    ],
)
def test_which_filters_are_depthwise(conv, plain):
    assert ("0.weight" in without_decay(nn.Sequential(conv))) == plain


def test_adamw_and_frozen_parameters():
    network = net()
    network[0].requires_grad_(False)
    optimizer, groups = grouped(Recipe(optimizer="adamw"), network)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 1e-3
    assert groups[0] == ({"7.weight"}, 0.05)
    assert not any("0.weight" in names for names, _ in groups)


def test_relative_rates_are_those_of_the_tensors_sizes():
    network = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([0.5, -0.5, 0.5, -0.5]).view(2, 2, 1, 1))
        network[0].bias.zero_()
        network[2].weight.copy_(torch.tensor([0.0, 0.0, 0.3, 0.4]).view(2, 2, 1, 1))  # 0.25
    recipe = Distillation(lr=0.1, weight_decay=0.2)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    optimizer, _ = grouped(recipe, network)
    rates = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates == {
        "0.weight": (pytest.approx(0.05), 0.2),
        "0.bias": (pytest.approx(0.1 * 2**-7), 0.0),  # a hundredth, to a power of two
        "1.weight": (pytest.approx(0.1), 0.0),
        "1.bias": (pytest.approx(0.1 * 2**-7), 0.0),
        "2.weight": (pytest.approx(0.025), 0.2),
    }
    # The schedule goes on from each group's own rate, and the first step is of that size.
    optimizer, _ = grouped(Distillation(lr=0.1), network)
    schedule_of(optimizer, 10, Distillation(warmup=0.0))
    network(torch.randn(4, 2, 3, 3)).square().sum().backward()
    before = network[2].weight.detach().clone()
    optimizer.step()
    moved = (network[2].weight.detach() - before).abs().max()
    assert float(moved) == pytest.approx(0.025, rel=1e-3)
    assert [len({g["lr"] for g in grouped(r, network)[0].param_groups}) for r in (
        Distillation(relative=False), Distillation(optimizer="sgd"), Recipe(optimizer="adamw"),
        Recipe(optimizer="adamw", relative=True),
    )] == [1, 1, 1, 4]  # fmt: skip


def test_sizes_of_odd_tensors_are_finite():
    network = nn.Module()
    values = ([], [0.0], [math.nan], [math.inf], [1e30], [3.0])
    for number, value in enumerate(values):
        network.register_parameter(f"p{number}", nn.Parameter(torch.tensor(value)))
    assert list(sizes_of(network).values()) == [1.0, 2**-7, 1.0, 1.0, 1.0, 4.0]


def test_schedule_rises_linearly_and_falls_as_a_cosine():
    recipe = Recipe(lr=0.5, warmup=0.2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.peak_lr)
    schedule = schedule_of(optimizer, 10, recipe)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    falling = [0.25 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates == pytest.approx([0.25, 0.5, *falling])
    assert optimizer.param_groups[0]["lr"] == 0


def test_a_schedule_without_warmup_starts_at_the_peak():
    assert rate(0, 4, 0.0) == 1
    assert rate(4, 4, 1.0) == 0


def test_averaged_weights():
    """The average of the first copy and two updates, with the decay held back at the start."""
    callback, model = averaging(0.15), nn.Linear(1, 1, bias=False)
    averaged = torch.optim.swa_utils.AveragedModel(model, **callback._kwargs)
    expected = None
    for count, value in enumerate((1.0, 5.0, 9.0)):
        nn.init.constant_(model.weight, value)
        averaged.update_parameters(model)
        decay = min(0.15, (1 + count) / (10 + count))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert averaged.module.weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", [Recipe, Distillation])
def test_every_field_says_what_it_is(kind):
    assert [each.name for each in described(kind)] == [f.name for f in dataclasses.fields(kind)]
    assert all(each.text.endswith(".") for each in described(kind))
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().epochs = 3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"epochs": 0}, ValueError, r"`epochs` \(=0\) must be at least 1"),
        ({"epochs": 1.5}, TypeError, r"`epochs` \(=1.5\) must be an int"),
        ({"epochs": True}, TypeError, "must be an int"),
        ({"lr": -1}, ValueError, r"`lr` \(=-1.0\) must be at least 0"),
        ({"ema": 1.5}, ValueError, r"`ema` \(=1.5\) must be 0 to 1"),
        ({"lr": "fast"}, TypeError, r"`lr` \(='fast'\) must be of the type float"),
        ({"optimizer": "adam"}, ValueError, "must be one of sgd, adamw"),
        ({"learning_rate": 1}, ValueError, "Recipe has no `learning_rate`; the nearest is"),
        ({"epoch": 1}, ValueError, "the nearest is `epochs`"),
        ({"relative": True}, ValueError, r"`relative` \(=True\) needs .* optimizer=adamw"),
    ],
)
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        Recipe.of(options)


def test_defaults_by_optimiser():
    assert (Recipe().peak_lr, Recipe().decay) == (0.1, 1e-4)
    assert Recipe(optimizer="adamw", lr=3).peak_lr == 3.0
    assert Distillation().peak_lr == pytest.approx(4e-3)
    assert Distillation(relative=False).peak_lr == pytest.approx(3e-4)
    assert Distillation(optimizer="sgd").peak_lr == pytest.approx(1e-3)
    assert Distillation(lr=3).peak_lr == 3.0
    assert Recipe(mean=0.5).mean == (0.5,)
    assert Recipe(devices=2).devices == "2"


def test_yaml(tmp_path):
    path, known = tmp_path / "c.yaml", [field.name for field in described(Recipe)]
    path.write_text("epochs: 3\nlr: 1e-3\nmean: [0.5]\nema: 0\n")
    recipe = Recipe.of(read_config(path, known))
    assert (recipe.epochs, recipe.lr, recipe.mean, recipe.ema) == (3, 1e-3, (0.5,), 0.0)
    path.write_text("epoch: 3\n")
    with pytest.raises(ValueError, match=r"c.yaml' has no `epoch`; the nearest is `epochs`"):
        read_config(path, known)
    path.write_text("epochs: [3\n")
    with pytest.raises(ValueError, match="is no YAML file"):
        read_config(path, known)
    path.write_text("- epochs\n")
    with pytest.raises(ValueError, match="must hold KEY: VALUE lines"):
        read_config(path, known)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_config(tmp_path / "none.yaml", known)
    path.write_text("point: !!python/object/apply:os.system [exit]\n")
    with pytest.raises(ValueError, match="is no YAML file"):
        read_config(path, known)
