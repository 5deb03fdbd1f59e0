"""Bad input: one clear error each, and nothing half-written."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import separable

INPUTS = torch.randn(8, 3, 8, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()


def broken(value):
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = value
    return model


def scored(bias=0.0):
    model = nn.Sequential(*network(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[-1].bias[0] = bias
    return model


def biased(value):
    model = network()
    with torch.no_grad():
        model[2].bias[0] = value
    return model


@pytest.mark.parametrize(
    ("model", "calibration", "budget", "error", "message"),
    [
        (nn.Linear(3, 3), torch.randn(8, 3), "macs=0.5", ValueError, "no convolution"),
        (nn.ConvTranspose2d(3, 3, 3), INPUTS, "macs=0.5", ValueError, "transposed"),
        (network(), INPUTS, "macs=0.0001", ValueError, r"nearest one that can be is 'macs=0\.\d"),
        (network(), INPUTS, "macs", ValueError, "`budget`"),
        (network(), INPUTS, "flops=0.5", ValueError, "`budget`"),
        (network(), INPUTS, "macs=nan", ValueError, "`budget`"),
        (network(), INPUTS, "macs=1.5", ValueError, "at most 1"),
        (network(), INPUTS, 0.5, TypeError, "`budget`"),
        (network(), torch.randn(8, 4, 8, 8), "macs=0.5", ValueError, "rejects its first item"),
        (network(), [], "macs=0.5", ValueError, "empty"),
        (network(), INPUTS[:0], "macs=0.5", ValueError, "empty"),
        (network(), 3, "macs=0.5", TypeError, "`calibration`"),
        (network(), ["a"], "macs=0.5", TypeError, "`calibration`"),
        (network(), INPUTS * float("nan"), "macs=0.5", ValueError, "layer `0` hold NaN"),
        (scored(), INPUTS * float("nan"), "macs=0.5", ValueError, "layer `0` hold NaN"),
        (scored(), INPUTS * float("inf"), "macs=0.5", ValueError, "layer `0` hold NaN"),
        (scored(float("nan")), INPUTS, "macs=0.5", ValueError, "outputs of `model` hold NaN"),
        (scored(float("inf")), INPUTS, "macs=0.5", ValueError, "outputs of `model` hold infinity"),
        (biased(float("nan")), INPUTS, "macs=0.5", ValueError, "the bias of layer `2`"),
        (network(), [torch.tensor(1.0)], "macs=0.5", ValueError, "single number"),
        (network(), torch.tensor(1.0), "macs=0.5", ValueError, "single number"),
        ("resnet18", INPUTS, "macs=0.5", TypeError, "`model` .a str. must be an nn.Module"),
        (network().state_dict(), INPUTS, "macs=0.5", TypeError, "`model`"),
        (None, INPUTS, "macs=0.5", TypeError, "`model`"),
        (
            nn.Sequential(nn.LazyConv2d(8, 3)),
            INPUTS,
            "macs=0.5",
            ValueError,
            "without a shape",
        ),
        (network().to("meta"), INPUTS, "macs=0.5", ValueError, "on the meta device"),
        (broken(float("nan")), INPUTS, "macs=0.5", ValueError, "weight of layer `2`"),
        (network(), None, "macs=0.5", ValueError, "needs `example`"),
        (network(), None, "error=0.5", ValueError, "needs `calibration`"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*positions; more calibration")
def test_bad_input(model, calibration, budget, error, message):
    with pytest.raises(error, match=message):
        separable.convert(model, calibration, budget, progress=False)


@pytest.mark.parametrize("forms", [["cp"], [], "low-rank"])
def test_unknown_forms(forms):
    with pytest.raises(ValueError, match="`forms`"):
        separable.plan(network(), INPUTS, "macs=0.5", forms=forms, progress=False)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("skip", "0", TypeError, "sequence of names"),
        ("skip", None, TypeError, "sequence of names"),
        ("skip", [0], TypeError, "must hold names"),
        ("forms", None, TypeError, "sequence of forms"),
        ("forms", ["low-rank"], ValueError, "fits no layer"),
        ("seed", 1.5, TypeError, "must be an int"),
        ("seed", "a", TypeError, "must be an int"),
        ("seed", None, TypeError, "must be an int"),
        ("seed", True, TypeError, "must be an int"),
        ("seed", 2**70, ValueError, "must be from"),
        ("compile", 3, TypeError, "a function"),
        ("example", [1], TypeError, "must be a tensor"),
        ("outputs", "scores", ValueError, "one of auto, logits, values"),
        ("outputs", None, ValueError, "one of auto, logits, values"),
    ],
)
def test_bad_arguments(argument, value, error, message):
    with pytest.raises(error, match=f"`{argument}` .*{message}"):
        separable.convert(network(), INPUTS, "macs=0.5", progress=False, **{argument: value})


def test_an_example_that_the_network_rejects():
    wide = torch.rand(1, 5, 8, 8)
    for calibration, budget in ((None, "macs=0.5"), (INPUTS, "latency=0.9")):
        with pytest.raises(ValueError, match="`example`: the model rejects"):
            separable.plan(network(), calibration, budget, example=wide, progress=False)


@pytest.mark.filterwarnings("ignore:.*positions; more calibration")
def test_forms_from_a_generator():
    forms = (form for form in ["depthwise-pointwise"])
    found = separable.plan(network(), INPUTS, "macs=0.7", forms=forms, progress=False)
    assert {row.form for row in found.rows} <= {None, "depthwise-pointwise"}


class Once:
    def __init__(self):
        self.batches = iter(INPUTS.split(2))

    def __iter__(self):
        yield from self.batches


class Same(Once):
    def __iter__(self):
        return self.batches


@pytest.mark.parametrize("kind", [Once, Same])
def test_inputs_that_come_once_only(kind):
    with pytest.raises(ValueError, match="yields its inputs once only"):
        separable.plan(network(), kind(), "macs=0.5", progress=False)


@pytest.mark.filterwarnings("ignore:.*positions; more calibration")
def test_empty_batches_are_passed_over():
    given = [INPUTS[:0], INPUTS[:4], INPUTS[:0], INPUTS[4:]]
    found = separable.plan(network(), given, "macs=0.5", progress=False)
    assert found == separable.plan(network(), given[1::2], "macs=0.5", progress=False)


def plan():
    return separable.plan(network(), INPUTS, "macs=0.5", progress=False)


def test_a_plan_of_another_network():
    with pytest.raises(ValueError, match="which `model` has not"):
        separable.apply(nn.Sequential(nn.Conv2d(3, 8, 3)), plan(), INPUTS)
    other = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 5))
    with pytest.raises(ValueError, match="another shape"):
        separable.apply(other, plan(), INPUTS)
    with pytest.raises(TypeError, match="`plan`"):
        separable.apply(network(), "macs=0.5", INPUTS)


def test_bad_edits_and_bad_json():
    with pytest.raises(KeyError, match="no layer"):
        plan().edited("9", None)
    with pytest.raises(ValueError, match="`rank`"):
        plan().edited("2", "depthwise-pointwise", 9)
    with pytest.raises(ValueError, match="`form`"):
        plan().edited("2", "cp", 1)
    for text in ("", "{}", "[1]", plan().to_json().replace('"form"', '"shape_of"')):
        with pytest.raises(ValueError, match="not a conversion plan"):
            separable.Plan.from_json(text)


@pytest.mark.parametrize("rank", [1.5, True, "2", None])
def test_ranks_that_are_no_whole_numbers(rank):
    with pytest.raises(TypeError, match="`rank` of layer `2`"):
        plan().edited("2", "depthwise-pointwise", rank)


EDITS = {
    "rank": [-1, 0, 10**4, 10**10, "3", 2.0, None, True],
    "form": [5, ["a"], "cp"],
    "name": [["a"], None],
    "shape": [None, 5, [1, 2, 3], [1, 8, 8, "9"], [1.0, 8, 8, 9], [0, 8, 8, 9]],
    "positions": [None, ["a", "b"], [1], [1, -1], [1, float("inf")]],
    "macs_before": ["x", None],
    "params_before": [-1, 2.5],
    "error": ["x", True],
    "geometry": [3],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in EDITS.items() for v in values])
def test_plans_that_someone_changed(key, value):
    fields = json.loads(plan().to_json())
    fields["rows"][1][key] = value
    with pytest.raises(ValueError, match="not a conversion plan"):
        separable.Plan.from_json(json.dumps(fields))


def test_plans_are_checked_as_a_whole():
    fields = json.loads(plan().to_json())
    changes = [{"seed": "x"}, {"budget": 5}, {"outputs": "scores"}, {"seconds_before": "x"}]
    for change in (*changes, {"rows": [fields["rows"][1]] * 2}):
        with pytest.raises(ValueError, match="not a conversion plan"):
            separable.Plan.from_json(json.dumps({**fields, **change}))
    with pytest.raises(ValueError, match="not a conversion plan"):
        separable.Plan.from_json("[" * 10**5)


def test_costs_follow_from_ranks_and_positions():
    right = plan()
    fields = json.loads(right.to_json())
    for key in ("macs_before", "macs_after", "params_after"):
        fields["rows"][1][key] = 1
    assert separable.Plan.from_json(json.dumps(fields)) == right


def test_plans_of_before_outputs_and_geometry():
    fields = json.loads(plan().to_json())
    del fields["outputs"]
    for row in fields["rows"]:
        del row["geometry"]
    old = separable.Plan.from_json(json.dumps(fields))
    assert old.macs == plan().macs
    separable.apply(network(), old, INPUTS, progress=False)


def test_damaged_and_foreign_files(tmp_path):
    slim = separable.apply(network(), plan(), INPUTS, progress=False)
    path = tmp_path / "slim.safetensors"
    separable.save(slim, path)
    whole = path.read_bytes()
    for damage in (b"", whole[:50], whole[:-10], b"not a file at all"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="no converted network"):
            separable.load(path, model=network())
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="no converted network"):
        separable.load(path, model=network())
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="another network"):
        separable.load(path, model=nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(FileNotFoundError):
        separable.load(tmp_path / "none", model=network())


def test_nothing_half_written(tmp_path):
    with pytest.raises(ValueError, match="report"):
        separable.save(network(), tmp_path / "file")
    slim = separable.apply(network(), plan(), INPUTS, progress=False)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        separable.save(slim, tmp_path / "no" / "folder")
    with pytest.raises(IsADirectoryError, match="name a file"):
        separable.save(slim, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_converted_or_merged_already():
    slim = separable.apply(network(), plan(), INPUTS, progress=False)
    with pytest.raises(ValueError, match=r"`model` is a converted network already: `\d` is"):
        separable.convert(slim, INPUTS, "macs=0.5", progress=False)
    merged = separable.merge(slim)
    with pytest.raises(ValueError, match="`model` has no `report`"):
        separable.save(merged, "nowhere")
    again = separable.convert(merged, INPUTS, "macs=0.6", progress=False)
    assert again.report.plan.macs <= 0.6


def test_a_file_that_someone_changed(tmp_path):
    slim = separable.apply(network(), plan(), INPUTS, progress=False)
    path = tmp_path / "slim.safetensors"
    separable.save(slim, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    report = json.loads(metadata["report"])
    texts = [("report", json.dumps({**report, "error": "x"})), ("aliases", "[" * 10**5)]
    texts += [("report", "{}"), ("aliases", "[]"), ("plan", "null"), ("plan", "[" * 10**5)]
    for key, text in texts:
        save_file(tensors, path, {**metadata, key: text})
        with pytest.raises(ValueError, match="no converted network that `save` wrote"):
            separable.load(path, model=network())
    whole = {name: value.to(torch.int8) for name, value in tensors.items()}
    save_file(whole, path, metadata)
    with pytest.raises(ValueError, match=r"is of torch.int8, not torch.float32"):
        separable.load(path, model=network())
    lost = next(name for name in tensors if name.startswith("2.") and name.endswith("bias"))
    del tensors[lost]
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="lacks the bias of layer `2`"):
        separable.load(path, model=network())


def test_another_stride_is_another_network(tmp_path):
    path, chosen = tmp_path / "slim.safetensors", plan()
    separable.save(separable.apply(network(), chosen, INPUTS, progress=False), path)
    for layer in (0, 2):
        other = network()
        other[layer].stride = (2, 2)
        with pytest.raises(ValueError, match=r"has kernel_size=.*stride=\(1, 1\)"):
            separable.load(path, model=other)
        with pytest.raises(ValueError, match=r"another layer .*stride=\(1, 1\)"):
            separable.apply(other, chosen, INPUTS, progress=False)


def test_what_a_file_cannot_hold(tmp_path):
    class Stateful(nn.Sequential):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    slim = separable.apply(Stateful(*network()).eval(), plan(), INPUTS, progress=False)
    with pytest.raises(ValueError, match="extra state `_extra_state`, a dict"):
        separable.save(slim, tmp_path / "file")
    slim = separable.apply(network(), plan(), INPUTS, progress=False)
    with pytest.raises(TypeError, match="`weights`"):
        separable.save(slim, tmp_path / "file", weights=5)
    own = slim.state_dict()
    for wrong in ({"a": torch.ones(3)}, {name: value[:1] for name, value in own.items()}):
        with pytest.raises(ValueError, match="`weights` must have"):
            separable.save(slim, tmp_path / "file", weights=wrong)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="`model`"):
        separable.load(tmp_path / "file", model=None)
