"""Bad input: one clear error each, and nothing half-written."""

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
    for key, text in {"report": "{}", "aliases": "[]", "plan": "null"}.items():
        save_file(tensors, path, {**metadata, key: text})
        with pytest.raises(ValueError, match="no converted network that `save` wrote"):
            separable.load(path, model=network())
    lost = next(name for name in tensors if name.startswith("2.") and name.endswith("bias"))
    del tensors[lost]
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="lacks the bias of layer `2`"):
        separable.load(path, model=network())
