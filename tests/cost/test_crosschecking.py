"""Other counters beside the account: what they say, where they differ, that they leave no trace.

The logic is tested with counters made up for the purpose, and the real ones by what must hold of
any version of theirs.
"""

import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from separable.cost import crosschecking
from separable.cost.counters import Counter
from separable.cost.crosschecking import crosscheck


class Functional(nn.Module):
    """A convolution that is no module, after one that is."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.weight = nn.Parameter(torch.randn(5, 4, 1, 1))

    def forward(self, x):
        return F.relu(F.conv2d(self.first(x), self.weight))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)


class Noise(nn.Module):
    """Draws numbers, writes to its input, and is for evaluation only."""

    def forward(self, x):
        assert not self.training
        return x.add_(torch.rand(()))


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


# model, input size, multiply-adds by hand
MODELS = {
    "network": (small_network, (2, 3, 6, 6), 2 * (8 * 27 * 36 + 2 * 8 * 9 * 36 + 80)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (1, 4, 5, 5), 4 * 25 * 27),
    "functional": (Functional, (1, 3, 6, 6), 36 * (4 * 27 + 5 * 4)),
    "lstm": (lambda: nn.LSTM(4, 3, batch_first=True), (2, 5, 4), 2 * 5 * 4 * 3 * 7),
    "attention": (Attention, (1, 5, 8), 4 * 5 * 64 + 2 * 25 * 8),
    "nothing": (nn.ReLU, (1, 3), 0),
}
models = pytest.mark.parametrize(("make", "size", "macs"), MODELS.values(), ids=MODELS.keys())
REAL = ["FlopCounterMode", "fvcore", "ptflops", "thop", "torchinfo"]


@models
def test_differences_add_up_for_the_counters_that_are_installed(make, size, macs):
    result = crosscheck(make(), size)
    assert result.account.macs == macs
    assert sorted([o.counter for o in result.opinions] + list(result.missing)) == REAL
    for opinion in result.opinions:
        assert opinion.error is None
        parts = [each.theirs - each.ours for each in opinion.differences]
        assert sum(parts) == opinion.macs - macs
        assert 0 not in parts
        assert [abs(part) for part in parts] == sorted(map(abs, parts), reverse=True)
        assert all(each.why for each in opinion.differences)


def test_flop_counter_of_torch_agrees_on_convolutions():
    make, size, macs = MODELS["network"]
    opinions = {each.counter: each for each in crosscheck(make(), size).opinions}
    assert opinions["FlopCounterMode"].macs == macs
    assert opinions["FlopCounterMode"].differences == ()
    assert opinions["FlopCounterMode"].version == torch.__version__.partition("+")[0]


def test_figures_are_for_the_whole_batch():
    model = Functional()
    one, three = (crosscheck(model, (batch, 3, 8, 8)) for batch in (1, 3))
    for single, triple in zip(one.opinions, three.opinions, strict=True):
        assert single.macs > 0
        assert triple.macs == 3 * single.macs


def made_up(monkeypatch, ask):
    counter = Counter("torch", "made up", ask)
    monkeypatch.setattr(crosschecking, "COUNTERS", {"made up": counter})


def by_kind(figures):
    """A counter that knows the figure of each kind of module, from hooks."""

    def ask(model, x):
        total = 0

        def add(module, args, output):
            nonlocal total
            total += figures.get(type(module), lambda module, output: 0)(module, output)

        for module in model.modules():
            module.register_forward_hook(add)
        model(x)
        return total

    return ask


def differences(model, size):
    (opinion,) = crosscheck(model, size).opinions
    return [(d.where, d.calls, d.theirs, d.ours, d.why) for d in opinion.differences]


def test_reasons_of_modules(monkeypatch):
    def multiply_adds(module, output):
        return output.numel() * module.weight[0].numel()

    made_up(
        monkeypatch,
        by_kind(
            {
                nn.Conv2d: multiply_adds,
                nn.Linear: lambda module, output: multiply_adds(module, output) + output.numel(),
                nn.BatchNorm2d: lambda module, output: 4 * output.numel(),
                nn.ReLU: lambda module, output: 7,
            }
        ),
    )
    assert differences(small_network(), (2, 3, 6, 6)) == [
        ("BatchNorm2d", 1, 2304, 0, "4 per output counted as multiply-adds; ours are in `norm`"),
        ("Linear", 1, 180, 160, "bias added in"),
        ("ReLU", 1, 7, 0, "operations counted as multiply-adds; ours are in `elementwise`"),
    ]
    made_up(monkeypatch, by_kind({nn.Conv2d: lambda module, output: 8 * 9 * 36}))
    assert differences(small_network(), (2, 3, 6, 6)) == [
        ("Conv2d", 3, 7776, 25920, "30.0% of its multiply-adds"),
        ("Linear", 1, 0, 160, "not known, counted as 0"),
    ]


def test_equal_reasons_of_one_kind_are_one_line(monkeypatch):
    made_up(monkeypatch, lambda model, x: 0)
    assert differences(small_network(), (2, 3, 6, 6)) == [
        ("Conv2d", 3, 0, 25920, "not known, counted as 0"),
        ("Linear", 1, 0, 160, "not known, counted as 0"),
    ]


def test_transposed_convolution_counted_to_its_output(monkeypatch):
    per_output = 4 // 2 * 9
    for bias in (0, 1):
        made_up(
            monkeypatch,
            by_kind({nn.ConvTranspose2d: lambda m, out, b=bias: out.numel() * (per_output + b)}),
        )
        ((where, calls, theirs, ours, why),) = differences(
            nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (1, 4, 5, 5)
        )
        assert (where, calls, ours) == ("ConvTranspose2d", 1, 4 * 25 * 27)
        assert theirs == 6 * 11 * 11 * (per_output + bias)
        assert why == "transposed, but counted as a regular convolution to its output"


def test_what_is_between_the_modules(monkeypatch):
    conv = {nn.Conv2d: lambda module, output: output.numel() * 27}
    made_up(monkeypatch, by_kind(conv))
    missed = "functional calls, `@`, attention or `.forward` not seen"
    assert differences(Functional(), (1, 3, 6, 6)) == [("between modules", 0, 0, 720, missed)]
    made_up(monkeypatch, by_kind(conv | {Functional: lambda module, output: 720 + 180}))
    added = "operations on tensors that are no multiply-adds added in"
    assert differences(Functional(), (1, 3, 6, 6)) == [("between modules", 0, 900, 720, added)]


def test_a_counter_that_raises_is_an_opinion_too(monkeypatch):
    def ask(model, x):
        raise KeyError("no such layer\nand much more")

    made_up(monkeypatch, ask)
    result = crosscheck(small_network(), (2, 3, 6, 6))
    (opinion,) = result.opinions
    assert opinion.macs is None
    assert opinion.error.startswith("KeyError: 'no such layer")
    assert opinion.differences == ()
    assert "no such layer" in str(result)


def test_a_module_that_cannot_be_counted_alone_is_left_between(monkeypatch):
    def ask(model, x):
        if isinstance(model.module, nn.Linear):
            raise RuntimeError
        return 0

    made_up(monkeypatch, ask)
    assert differences(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), (1, 4))[0][:4] == (
        "between modules",
        0,
        0,
        8,
    )


def test_missing_ones_are_named_with_the_extra(monkeypatch):
    monkeypatch.setattr(
        crosschecking, "find_spec", lambda name: None if name in ("thop", "fvcore") else True
    )
    result = crosscheck(nn.ReLU(), (1, 3))
    assert result.missing == ("thop", "fvcore")
    assert "thop" not in [opinion.counter for opinion in result.opinions]
    assert "Not installed: thop, fvcore; pip install 'separable[crosscheck]'" in str(result)
    assert result.to_dict()["missing"] == ["thop", "fvcore"]


def functions():
    """Everything of torch that a counter might patch."""
    owners = [torch, F, torch.Tensor, nn.Module, nn.Conv2d, nn.Linear]
    return {(owner, name): value for owner in owners for name, value in inspect.getmembers(owner)}


@pytest.mark.parametrize("fail", [False, True], ids=["succeeds", "raises"])
def test_nothing_is_changed_or_printed(fail, capfd, monkeypatch):
    if fail:
        made_up(monkeypatch, lambda model, x: model.module[0].weight.zero_() or 1 / 0)
    x = torch.randn(2, 3, 6, 6)
    crosscheck(small_network(), inputs=x)  # what is loaded on first use is loaded
    model = small_network()
    model.insert(2, Noise())
    model[1].eval()
    model[0].register_forward_hook(lambda module, args, output: None)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    flags = [module.training for module in model.modules()]
    copy, random, patched = x.clone(), torch.get_rng_state(), functions()
    capfd.readouterr()
    crosscheck(model, inputs=x)
    assert capfd.readouterr() == ("", "")
    assert functions() == patched
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, copy)
    assert flags == [module.training for module in model.modules()]
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    for module, before in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == before.keys()
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_several_inputs_and_keywords():
    class Weighted(nn.Module):
        def forward(self, x, pair, *, weight):
            return {"result": x @ pair[1] * weight, "rest": None}

    x = torch.randn(2, 3)
    pair = (None, torch.randn(3, 4))
    result = crosscheck(Weighted(), inputs=(x, pair), kwargs={"weight": 2.0})
    assert result.account.macs == 24
    opinions = {opinion.counter: opinion for opinion in result.opinions}
    assert opinions["FlopCounterMode"].macs == 24
    assert [opinion.error for opinion in result.opinions] == [None] * len(result.opinions)


def test_a_tensor_that_is_given_twice_stays_one(monkeypatch):
    class Same(nn.Module):
        def forward(self, x, pair):
            assert x is pair[0] is not pair[1]
            return x.sum()

    def ask(model, x):
        return sum(int(model(each)[0]) for each in (x, torch.ones(4)))

    made_up(monkeypatch, ask)
    x = torch.zeros(3)
    (opinion,) = crosscheck(Same(), inputs=(x, (x, torch.zeros(3)))).opinions
    assert opinion.macs == 4


def test_formats():
    result = crosscheck(small_network(), (2, 3, 6, 6))
    assert str(result) == result.to_string("table")
    figures = json.loads(result.to_string("json"))
    assert figures["macs"] == result.account.macs
    assert [each["counter"] for each in figures["opinions"]] == [
        each.counter for each in result.opinions
    ]
    rows = result.to_string("csv").splitlines()
    assert rows[0] == "Counter,Version,MACs,Of ours,Convention"
    assert len(rows) == 2 + len(result.opinions)
    for format in ("table", "markdown", "html"):
        assert f"{result.account.macs:,}" in result.to_string(format)
    with pytest.raises(ValueError, match=r"`format` \(='xml'\) must be one of"):
        result.to_string("xml")


def test_errors_are_those_of_count():
    with pytest.raises(TypeError, match="`input_size` or `inputs` is missing"):
        crosscheck(nn.ReLU())
    with pytest.raises(TypeError, match=r"`model` \(a str\) must be an nn.Module"):
        crosscheck("resnet18", (1, 3))


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_a_hook_computes(norm):
    """Such an attribute is no leaf of autograd's graph, which deepcopy refuses."""
    model = nn.Sequential(norm(nn.Linear(4, 5)), nn.ReLU())
    check = crosscheck(model, (2, 4))
    assert check.account.macs >= 2 * 4 * 5
    assert all(opinion.error is None for opinion in check.opinions)


def test_without_a_tensor_there_is_nothing_to_ask():
    class Made(nn.Linear):
        def forward(self, number):
            return super().forward(torch.ones(number, 4))

    with pytest.raises(TypeError, match="`inputs` has no tensor, which the other counters need"):
        crosscheck(Made(4, 5), inputs=(3,))
