"""Trained weights from safetensors files."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from separable.models import load_weights


def network(seed=0, classes=3):
    torch.manual_seed(seed)
    head = nn.Linear(16, classes)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), head)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_weights_are_loaded_whatever_wraps_their_names(tmp_path, prefix):
    path = tmp_path / "a.safetensors"
    trained, fresh = network(1), network(2)
    save_file({prefix + name: each for name, each in trained.state_dict().items()}, path)
    load_weights(fresh, path)
    for name, each in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], each)


@pytest.mark.parametrize("name", ["one.weight", "two.weight"])
def test_a_tied_weight_is_needed_once(tmp_path, name):
    path = tmp_path / "a.safetensors"
    tensors = {"one.bias": torch.ones(4), "two.bias": torch.ones(4), name: torch.ones(4, 4)}
    save_file(tensors, path)
    fresh = Tied()
    load_weights(fresh, path)
    assert fresh.one.weight is fresh.two.weight
    assert all(bool((each == 1).all()) for each in fresh.state_dict().values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: own.pop("0.bias"), "it lacks '0.bias'"),
        (lambda own: [own.pop("0.bias"), own.pop("3.bias")], "it lacks '0.bias' and 1 more"),
        (lambda own: own.update(extra=torch.ones(1)), "the network has no 'extra'"),
        (
            lambda own: own.update(network(classes=5).state_dict()),
            r"'3.weight' .* 1 more \(\[5, 16",
        ),
        (lambda own: own.clear(), "it lacks '0.weight'"),
    ],
)
def test_weights_of_another_network(tmp_path, change, words):
    path = tmp_path / "a.safetensors"
    tensors = dict(network(1).state_dict())
    change(tensors)
    save_file(tensors, path)
    fresh = network(2)
    before = {name: each.clone() for name, each in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=f"is of another network: .*{words}"):
        load_weights(fresh, path)
    assert all(torch.equal(each, before[name]) for name, each in fresh.state_dict().items())
