"""Moments against plain definitions."""

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from separable.conversion.fitting import bias_of, targets
from separable.conversion.forms import Shape, grouped
from separable.conversion.moments import Moments, samples

from .test_forms import convolutions

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@settings(max_examples=60, deadline=None)
@given(conv=convolutions())
def test_patches_times_weight_are_the_outputs(conv):
    input = torch.randn(2, conv.in_channels, *[7] * len(conv.kernel_size)).to(conv.weight)
    output = conv(input)
    patches, wanted = samples(conv, input, output, 10**9, 0)
    weight = grouped(conv.weight, conv.groups).flatten(2)
    bias = 0 if conv.bias is None else conv.bias.view(conv.groups, -1, 1)
    torch.testing.assert_close(weight @ patches + bias, wanted)


def test_a_class_that_pads_by_itself_shows_its_own_patches():
    class Shifted(nn.Conv2d):
        def forward(self, input):
            return super().forward(nn.functional.pad(input, (2, 0, 0, 1)))

    conv = Shifted(3, 4, 3, bias=False)
    input = torch.randn(2, 3, 6, 6)
    patches, wanted = samples(conv, input, conv(input), 10**9, 0)
    torch.testing.assert_close(grouped(conv.weight, 1).flatten(2) @ patches, wanted)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streamed_moments_are_those_of_all_samples(offset):
    u = torch.randn(1, 6, 1000) + offset
    y = torch.randn(1, 4, 1000) - offset
    moments = Moments.zeros(Shape(1, 4, 2, 3))
    for part in (slice(0, 1), slice(1, 300), slice(300, 1000)):
        moments.add(u[..., part].clone(), y[..., part].clone())
    joint = torch.cat([u, y], 1)[0].double()
    covariance = torch.cov(joint, correction=0)
    torch.testing.assert_close(moments.gram[0] / 1000, covariance[:6, :6], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.cross[0] / 1000, covariance[6:, :6], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.mean[0], joint[:6].mean(1))
    assert moments.count == 1000


def test_moments_of_more_features_than_are_multiplied_at_a_time():
    u = torch.randn(2, 1100, 50, dtype=torch.float64)
    moments = Moments.zeros(Shape(2, 3, 1100, 1))
    for part in u.split(20, 2):
        moments.add(part.clone(), part[:, :3].clone())
    for group in range(2):
        covariance = torch.cov(u[group], correction=0)
        torch.testing.assert_close(moments.gram[group] / 50, covariance)
        torch.testing.assert_close(moments.cross[group] / 50, covariance[:3])


def test_a_cap_draws_the_same_positions_for_every_input():
    conv = nn.Conv2d(2, 3, 3)
    input = torch.randn(4, 2, 12, 12)
    whole, _ = samples(conv, input, conv(input), 10, 1)
    halves = [samples(conv, part, conv(part), 10, 1)[0] for part in input.split(2)]
    assert whole.shape == (1, 18, 40)
    assert torch.equal(torch.cat(halves, 2), whole)


def test_target_maps_the_new_inputs_to_the_old_outputs():
    truth = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    u = torch.randn(1, 6, 5000, dtype=torch.float64)
    y = truth.flatten(2) @ u + 3
    moments = Moments.zeros(Shape(1, 4, 2, 3))
    moments.add(u.clone(), y.clone())
    (target,) = targets(torch.randn(1, 4, 2, 3), moments, None)
    torch.testing.assert_close(target.weight, truth[0], rtol=0, atol=1e-2)
    bias = bias_of(truth, moments)
    torch.testing.assert_close(bias, torch.full((4,), 3.0, dtype=torch.float64))


def test_unseen_directions_keep_the_original_weight():
    original = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    u = torch.randn(1, 6, 100, dtype=torch.float64)
    u[:, 3:] = 0
    moments = Moments.zeros(Shape(1, 4, 2, 3))
    moments.add(u, torch.randn(1, 4, 100, dtype=torch.float64))
    (target,) = targets(original, moments, None)
    torch.testing.assert_close(target.weight[:, 1], original[0, :, 1])
