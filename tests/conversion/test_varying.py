"""Variations of calibration inputs: how many, how far, and the same in all processes."""

import pytest
import torch
from torch import nn

import separable
from separable.conversion import varying
from separable.conversion.calibration import Inputs
from separable.conversion.sensitivity import divergence
from separable.conversion.varying import Varied, varied


def given(count, macs=1.0, size=(3, 8, 8)):
    inputs = torch.randn(count, *size, generator=torch.Generator().manual_seed(1))
    return Varied(Inputs(inputs, nn.Identity()), macs, seed=0), inputs


@pytest.mark.parametrize(
    ("count", "macs", "shown"),
    [(32, 1.0, 1024), (100, 1.0, 1000), (600, 1.0, 600), (1100, 1.0, 1100), (32, 1e9, 32)],
)
def test_few_inputs_become_enough_and_many_stay_as_they_are(count, macs, shown):
    batches, inputs = given(count, macs)
    found = list(batches)
    assert sum(map(len, found)) == shown
    assert torch.equal(torch.cat(found[:: batches.copies]), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, batches, strict=True))
    if shown > count:
        assert len({float(batch.sum()) for batch in found}) == len(found)


def test_indices_have_no_variations():
    tokens = torch.zeros(8, 20, dtype=torch.long)
    batches = Varied(Inputs(tokens, nn.Identity()), 1.0, seed=0)
    assert batches.copies == 1
    assert sum(map(len, batches)) == 8


@pytest.mark.parametrize("size", [(5,), (3, 20), (2, 9, 16), (2, 4, 6, 8)])
def test_variations_stay_near_the_inputs(size):
    generator = torch.Generator().manual_seed(0)
    inputs = 7 + torch.rand(64, *size, generator=generator)
    found = varied(inputs, inputs.flip(0), generator)
    assert found.shape == inputs.shape
    assert not torch.equal(found, inputs)
    room = varying.CONTRAST + 6 * varying.NOISE * inputs.std()
    assert 7 - room < found.min()
    assert found.max() < 8 + room


def test_a_shift_is_by_parts_of_a_step_and_the_border_repeats():
    ramp = torch.arange(10.0).repeat(3, 2, 1)
    amount = torch.tensor([-1.25, 0.5, 2.0]).view(3, 1, 1)
    expected = (ramp - amount).clamp(0, 9)
    torch.testing.assert_close(varying._shifted(ramp, 2, amount), expected)


def test_a_box_of_another_input_lies_over_each():
    zeros, ones = torch.zeros(500, 2, 12, 16), torch.ones(500, 2, 12, 16)
    found = varying._boxed(zeros, ones, torch.Generator().manual_seed(0))
    rows, columns = found[:, 0].amax(2), found[:, 0].amax(1)
    assert torch.equal(found, (rows[:, :, None] * columns[:, None])[:, None].expand(-1, 2, -1, -1))
    for side in (rows, columns):  # one stretch of each side
        assert (side.diff(dim=1) == 1).sum(1).max() <= 1
    # both ends are uniform, so a side is covered by a third in the mean
    assert abs(found.mean() - 1 / 9) < 0.02
    flat = torch.zeros(4, 3)
    assert torch.equal(varying._boxed(flat, flat + 1, torch.Generator()), flat)


def test_indices_are_left_as_they_are():
    batches = Varied(Inputs(torch.arange(12).view(4, 3), nn.Identity()), 1.0, 0)
    assert len(list(batches)) == 1


def test_variations_do_not_depend_on_what_other_batches_there_are():
    inputs = list(torch.randn(4, 8, 2, 5))
    whole = list(Varied(Inputs(inputs, nn.Identity()), 1.0, 0))
    half = list(Varied(Inputs(inputs[2:], nn.Identity()), 1.0, 0))
    for a, b in zip(whole[64:96], half[:32], strict=True):
        assert torch.equal(a, b)


def test_they_help_where_the_inputs_are_few(classifier, monkeypatch):
    smooth = nn.functional.interpolate(torch.randn(312, 3, 3, 3), 10, mode="nearest")
    errors = []
    for enough in (1024, 1):
        monkeypatch.setattr(varying, "ENOUGH", enough)
        slim = separable.convert(classifier, smooth[:12], "macs=0.25", progress=False)
        errors.append(divergence(slim, classifier, smooth[12:].split(100)))
    assert errors[0] < 0.9 * errors[1]
