"""Layer classes of timm and torchvision."""

import pytest
import torch
from torch import nn

import separable
from separable.conversion import SeparatedConv

timm = pytest.importorskip("timm")


def test_a_convolution_that_pads_to_the_same_size_by_itself():
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), Conv2dSame(12, 12, 3, stride=2)
    ).eval()
    inputs = torch.randn(32, 3, 9, 9)
    plan = separable.plan(model, inputs, "macs=0.9", progress=False)
    plan = plan.edited("2", "depthwise-pointwise", 9)
    slim = separable.apply(model, plan.edited("0", None), inputs, progress=False)
    assert isinstance(slim[2].spatial, Conv2dSame)
    torch.testing.assert_close(slim(inputs), model(inputs), rtol=1e-3, atol=1e-3)


def test_blocks_with_batch_norm_and_activation_in_one():
    from timm.layers import ConvNormAct

    torch.manual_seed(0)
    model = nn.Sequential(ConvNormAct(3, 16, 3), ConvNormAct(16, 16, 3)).eval()
    slim = separable.convert(model, torch.randn(32, 3, 9, 9), "macs=0.6", progress=False)
    assert isinstance(slim[1].conv, SeparatedConv)
    assert slim.report.plan.macs <= 0.6


def test_weight_standardisation_stays_with_a_reason():
    from timm.layers import ScaledStdConv2d, StdConv2d

    torch.manual_seed(0)
    model = nn.Sequential(
        StdConv2d(3, 16, 3), nn.ReLU(), ScaledStdConv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
    ).eval()
    inputs = torch.randn(64, 3, 11, 11)
    slim = separable.convert(model, inputs, "macs=0.9", progress=False)
    assert isinstance(slim[3], SeparatedConv)
    reasons = {row.name: row.reason for row in slim.report.plan.rows}
    assert reasons["0"] == reasons["2"] == "its class computes more than a convolution"
