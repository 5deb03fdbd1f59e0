"""The findings against what the account, the plan and the runtime say of the same networks."""

import copy
import csv
import io
import json
import math

import pytest
import torch
from torch import nn

import separable
from separable.conversion.sensitivity import divergence
from separable.reporting.layers import to_csv
from separable.reporting.wording import amount, milliseconds, small, times

from .conftest import HOSTILE, QUICK, images, labelled, network

SIZE = (1, 3, 12, 12)


@pytest.fixture(scope="module")
def converted(hasty):
    return separable.convert(
        network().eval(), images(), "macs=0.5", seed=3, example=torch.zeros(SIZE), progress=False
    )


def test_both_accounts_are_those_of_count(findings, converted):
    for reported, model in ((findings.regular, network().eval()), (findings.converted, converted)):
        account = separable.count(model, SIZE)
        assert reported.account.macs == account.macs
        assert reported.account.params == account.params
        assert reported.account.traffic_bytes == account.traffic_bytes
    assert findings.regular.account.macs > 1.8 * findings.converted.account.macs


def test_the_plan_is_that_of_convert_at_the_same_seed(findings, converted):
    assert findings.plan == converted.report.plan
    assert findings.plan.seed == findings.seed == 3
    assert findings.error == pytest.approx(converted.report.error, rel=1e-3)


def test_layers_stand_in_execution_order_with_what_became_of_them(findings, converted):
    layers = {layer.name: layer for layer in findings.layers}
    assert list(layers) == [
        "", "stem", "stem.0", "stem.1", "stem.2", "body", "body.0", "body.1", HOSTILE,
        "head", "head.0", "head.1", "classifier",
    ]  # fmt: skip
    assert [name for name, layer in layers.items() if not layer.is_leaf] == [
        "", "stem", "body", "head",
    ]  # fmt: skip
    account = {row.name: row for row in separable.count(converted, SIZE).rows}
    for row in converted.report.plan.rows:
        layer = layers[row.name]
        assert (layer.form, layer.rank) == (row.form or "", row.rank)
        assert layer.before.macs == row.macs_before
        # of a converted layer, all that stands in its place
        assert layer.after.macs == account[row.name].macs == row.macs_after
        if row.form is None:
            assert layer.reason == row.reason != ""
        else:
            assert f"{row.macs_before / row.macs_after:.1f}× fewer MACs" in layer.reason
    assert any(layer.form for layer in layers.values())
    assert layers["classifier"].reason == "not a convolution"
    assert layers["stem.1"].reason == layers[""].reason == ""


def test_runtime_seconds_are_those_of_explain(findings):
    for each, side in ((findings.regular, "before"), (findings.converted, "after")):
        rows = each.explanation.rows
        layers = {layer.name: getattr(layer, side) for layer in findings.layers}
        whole = layers[""].runtime_seconds
        assert whole == pytest.approx(sum(row.seconds for row in rows))
        for name in ("body.0", HOSTILE, "classifier"):
            below = [
                row.seconds for row in rows if row.layer == name or row.layer.startswith(f"{name}.")
            ]
            if below:
                assert layers[name].runtime_seconds == pytest.approx(sum(below))
            else:
                assert layers[name].runtime_seconds is None
                assert layers[name].runs_in
    before = {layer.name: layer.before for layer in findings.layers}
    # batch norm and ReLU run in the kernel of the convolution before them
    assert before["stem.1"].runs_in == before["stem.2"].runs_in == "stem.0"
    assert before["stem.1"].runtime_seconds is None
    assert before["stem.1"].torch_seconds > 0


def test_kernels_of_several_layers_are_marked():
    block = nn.Sequential(nn.Conv2d(8, 48, 1), nn.ReLU(), nn.Conv2d(48, 48, 3, groups=48))
    model = nn.Sequential(block, nn.ReLU(), nn.Conv2d(48, 8, 1))
    found = separable.report(model, (1, 8, 16, 16), **QUICK)
    rows = [row for row in found.regular.explanation.rows if row.macs]
    sides = {layer.name: layer.before for layer in found.layers}
    for name in ("0.0", "0.2", "2"):
        touched = [row for row in rows if name in (row.layer, *row.fused)]
        others = {"0.0", "0.2", "2"} - {name}
        expected = any(others & {row.layer, *row.fused} for row in touched)
        assert sides[name].is_shared == expected
    assert not sides[""].is_shared
    assert sum(row.macs for row in rows) == found.regular.account.macs


def test_torch_seconds_contain_those_of_the_modules_inside(findings):
    for layer in findings.layers:
        for side in (layer.before, layer.after):
            assert side.torch_seconds > 0
    before = {layer.name: layer.before.torch_seconds for layer in findings.layers}
    assert before["stem"] > before["stem.0"]
    assert before[""] > before["stem"]


def test_accuracies_are_shares_of_the_labels(findings):
    assert findings.tested == 40
    assert findings.regular.accuracy == 0.75  # one label in four was made wrong
    assert 0 <= findings.converted.accuracy <= 1
    regular, chosen, smaller = findings.frontier
    assert regular.accuracy == 0.75
    assert chosen.accuracy == findings.converted.accuracy
    assert smaller.macs < chosen.macs < regular.macs


def test_the_frontier_begins_with_the_regular_network_and_marks_the_chosen(findings):
    assert [(point.name, point.kind) for point in findings.frontier] == [
        ("regular", "regular"),
        ("macs=0.5", "fitted once"),  # few images: the last pass is not kept
        ("macs=0.3, fitted once", "fitted once"),
    ]
    assert [point.chosen for point in findings.frontier] == [False, True, False]
    regular, chosen, smaller = findings.frontier
    assert regular.error == 0
    assert chosen.error == findings.error
    assert smaller.error > chosen.error
    assert chosen.torch_seconds == findings.converted.torch.median
    assert chosen.runtime_seconds == findings.converted.runtime.median


def test_headlines_are_ratios_of_both(findings):
    params, macs, latency, accuracy = findings.headlines
    regular, slim = findings.regular, findings.converted
    assert params.ratio == f"{times(regular.account.params / slim.account.params)} fewer"
    assert macs.details == f"{regular.account.macs:,} → {slim.account.macs:,}"
    speed = regular.torch.ratio_to(slim.runtime).median
    assert latency.ratio == f"{times(speed)} as fast"
    assert latency.value == f"{milliseconds(slim.runtime.median)} ms"
    assert accuracy.name == "Accuracy"
    assert accuracy.before == "75.0 %"
    assert all(each.convention for each in findings.headlines)
    for word in (macs.ratio, params.ratio, latency.ratio, "75.0 %"):
        assert word in findings.answer


def test_without_labels_the_fourth_figure_is_the_error():
    model = network()
    found = separable.report(model, SIZE, budget="macs=0.5", calibration=images(), **QUICK)
    name, value = found.headlines[3].name, found.headlines[3].value
    assert (name, value) == ("Output error", small(found.error))
    assert small(found.error) in found.answer
    assert found.tested == 0


def test_one_network_alone(alone):
    assert alone.converted is alone.plan is None
    assert alone.frontier == ()
    assert all(layer.after is None for layer in alone.layers)
    assert not any(layer.reason for layer in alone.layers)
    assert alone.headlines[0].ratio == ""
    assert alone.headlines[3].value == small(alone.regular.deviation)
    assert 0 < alone.regular.deviation < 1e-3
    assert "the separable runtime runs it" in alone.answer
    assert alone.command == "separable.report(Sequential, (1, 3, 12, 12), threads=1, seed=0)"


def test_the_model_is_as_before():
    model = network().train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    separable.report(model, SIZE, **QUICK)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_converted_network_may_be_given(converted):
    model = network().eval()
    found = separable.report(
        model, SIZE, converted=converted, beside={"itself": model}, calibration=images(), **QUICK
    )
    assert found.plan == converted.report.plan
    assert found.error == converted.report.error
    assert [point.name for point in found.frontier] == ["regular", "macs=0.5", "itself"]
    assert found.frontier[2].error == pytest.approx(0, abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*more calibration inputs would help")
def test_values_are_compared_as_the_conversion_did(hasty):
    model, options = network().eval(), {"outputs": "values", "progress": False}
    slim = separable.convert(model, images(), "macs=0.5", **options)
    given = {"calibration": images(), **QUICK}
    found = separable.report(model, SIZE, converted=slim, **given)
    assert (found.error, found.error_convention) == (slim.report.error, "relative squared error")
    anew = separable.report(model, SIZE, converted=slim, outputs="logits", **given)
    assert anew.error == divergence(slim, model, images().split(32), "logits") != slim.report.error
    assert anew.error_convention.startswith("mean KL divergence")
    assert "outputs='logits'" in anew.command
    made = separable.report(
        model, SIZE, budget="macs=0.5", frontier=["macs=0.3"], outputs="values", **given
    )
    assert made.error_convention == "relative squared error"
    assert made.plan.outputs == "values"
    with pytest.raises(ValueError, match="`outputs` \\(='words'\\) must be one of"):
        separable.report(model, SIZE, outputs="words", **QUICK)


class Classes(nn.Sequential):
    """Returns whole numbers, whose distance says nothing."""

    def forward(self, x):
        return super().forward(x).argmax(1)


@pytest.mark.filterwarnings("ignore:conversion without calibration inputs")
def test_outputs_that_cannot_be_compared_are_no_hindrance():
    model = Classes(network())
    found = separable.report(model, SIZE, budget="params=0.5", **QUICK)
    assert found.converted is not None
    assert found.error is None


def test_an_error_from_before_a_training_is_not_reported(converted):
    model = network().eval()
    tuned = copy.deepcopy(converted)
    with torch.no_grad():
        tuned.classifier.bias += torch.arange(4.0)
    tuned.report = converted.report.after_training()
    assert separable.report(model, SIZE, converted=tuned, **QUICK).error is None
    found = separable.report(model, SIZE, converted=tuned, calibration=images(), **QUICK)
    assert found.error == divergence(tuned, model, images().split(32)) > converted.report.error


def test_nothing_to_convert_is_said_and_the_rest_reported():
    found = separable.report(
        nn.Sequential(nn.Linear(4, 3)), (2, 4), budget="macs=0.5", calibration=None, **QUICK
    )
    assert found.converted is None
    assert "There is nothing to convert: it has no convolution." in found.answer
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    found = separable.report(
        depthwise, (1, 4, 8, 8), budget="macs=0.5", calibration=torch.randn(8, 4, 8, 8), **QUICK
    )
    assert "nothing to convert: no convolution can change (0: already depthwise)" in found.answer


class Branches(nn.Module):
    """Control flow on values, which has no graph."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x - 1


def test_a_network_without_a_runtime_is_reported_without_it():
    found = separable.report(Branches(), (1, 4), **QUICK)
    assert found.regular.runtime is None
    assert found.regular.problem
    assert "The separable runtime can't take it: " in found.answer
    assert found.headlines[3].value == "none"
    assert "\n" not in found.answer
    assert found.layers[0].before.runtime_seconds is None


def test_what_goes_back_to_torch_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3, dilation=2))
    found = separable.report(model, SIZE, **QUICK)
    before = {layer.name: layer.before for layer in found.layers}
    assert before["1"].runs_in == "torch"
    assert before["1"].runtime_seconds is None
    assert before["0"].runtime_seconds > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "speed=1"}, r"`budget` \(='speed=1'\)"),
        ({"budget": "macs=0.5", "frontier": ["0.3"]}, r"`budget` \(='0.3'\)"),
        ({"frontier": ["macs=0.5"]}, "belong to a conversion"),
        ({"beside": {"itself": nn.Identity()}}, "belong to a conversion"),
        ({"budget": "macs=0.5", "converted": nn.Identity()}, "exclude each other"),
        ({"repeats": 0}, r"`repeats` \(=0\)"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        separable.report(network(), SIZE, **{**QUICK, "calibration": images(), **options})


@pytest.mark.parametrize("options", [{"title": 3}, {"data": 5}])
def test_arguments_of_other_types(options):
    (name,) = options
    with pytest.raises(TypeError, match=rf"`{name}` \(={options[name]}\) must be"):
        separable.report(network(), (1, 3, 12, 12), **QUICK, **options)


def test_other_networks_have_the_outputs_of_the_first():
    fewer = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for arguments, name in (
        ({"converted": fewer}, "`converted`"),
        ({"converted": network(), "beside": {"thin": fewer}}, r"`beside\['thin'\]`"),
    ):
        with pytest.raises(ValueError, match=rf"{name} \(output shapes \(\(1, 2\),\)\) must map"):
            separable.report(network(), (1, 3, 12, 12), **QUICK, **arguments)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
def test_weights_that_a_hook_computes():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())
    found = separable.report(model, (1, 3, 8, 8), **{**QUICK, "repeats": 1})
    assert found.regular.account.macs == 4 * 36 * 27


def test_labels_need_a_classifier():
    model = nn.Conv2d(3, 4, 3)
    data = [(images(4), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(ValueError, match="`data` is for networks that return one score per class"):
        separable.report(model, SIZE, data=data, **QUICK)


def test_labels_are_outputs_of_the_network():
    data = [(images(4), torch.tensor([0, 1, 2, 4]))]
    with pytest.raises(ValueError, match="`data` has classes from 0 to 4 and `model` 4 outputs"):
        separable.report(network(), SIZE, data=data, **QUICK)


def test_json_and_csv_hold_the_same_figures(findings):
    read = json.loads(json.dumps(findings.to_dict()))
    assert read["answer"] == findings.answer
    assert read["regular"]["account"]["macs"] == findings.regular.account.macs
    assert read["frontier"][1]["chosen"] is True
    rows = list(csv.DictReader(io.StringIO(to_csv(findings.layers))))
    assert len(rows) == len(findings.layers) == len(read["layers"])
    for row, layer, other in zip(rows, findings.layers, read["layers"], strict=True):
        assert row["name"] == layer.name == other["name"]
        assert int(row["regular_macs"]) == layer.before.macs == other["before"]["macs"]
        assert int(row["converted_params"]) == layer.after.params
        assert float(row["regular_torch_seconds"]) == layer.before.torch_seconds
        assert row["reason"] == layer.reason


def test_labelled_data_are_used_once(findings):
    """A generator of batches serves all networks."""
    model = network()
    batches = iter(labelled(model))
    found = separable.report(model, SIZE, data=batches, **QUICK)
    assert (found.tested, found.regular.accuracy) == (40, findings.regular.accuracy)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (999_600, "1.00 M"), (11_689_512, "11.7 M")],
)
def test_amounts(number, text):
    assert amount(number) == text


def test_figures_in_words():
    assert milliseconds(0.0123456) == "12.3"
    assert milliseconds(0.000123) == "0.123"
    assert milliseconds(None) == ""
    assert [times(value) for value in (0.5, 7.384, 17.98, math.inf)] == [
        "0.50×", "7.38×", "18.0×", "∞×",
    ]  # fmt: skip
    assert small(0.0312) == "0.031"
    assert small(2.44e-6) == "2.4·10⁻⁶"


class Writing(torch.nn.Module):
    """Standardises its input in place."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input):
        return self.net(input.sub_(1.0).mul_(2.0))


def test_networks_that_write_into_their_input():
    model = Writing(network().eval())
    seen = images(8)
    labels = model(seen.clone()).argmax(1)
    found = separable.report(
        model, SIZE, converted=model, calibration=seen, data=[(seen, labels)], **QUICK
    )
    assert found.regular.accuracy == found.converted.accuracy == 1.0
    assert torch.equal(seen, images(8))


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ((images(8), torch.zeros(8, 1).long()), ValueError, r"labels \[8, 1\] of torch.int64 for"),
        ((images(8), torch.zeros(1).long()), ValueError, r"must be classes, \[8\] whole numbers"),
        ((images(8), torch.zeros(8)), ValueError, r"labels \[8\] of torch.float32"),
        ((images(8), torch.zeros(8).bool()), ValueError, "of torch.bool"),
        ((images(8), torch.zeros(8).long() - 1), ValueError, "classes from -1 to -1"),
        ((images(8), [0] * 8), TypeError, "not of Tensor and list"),
        (images(8), TypeError, "not of Tensor and NoneType"),
    ],
)
def test_labels_of_other_kinds(batch, error, words):
    with pytest.raises(error, match=words):
        separable.report(network(), SIZE, data=[batch], **QUICK)
