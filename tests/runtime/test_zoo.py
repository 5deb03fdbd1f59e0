"""Networks that people use: right, and without a detour through torch where there are kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import separable
from separable.models import create_model
from separable.runtime.checking import deviation

pytest.importorskip("torchvision")
pytest.importorskip("timm")

WHOLE = [
    "separable:mobilenet_v1",
    *(
        f"torchvision:{name}"
        for name in """
            convnext_tiny deeplabv3_mobilenet_v3_large efficientnet_b0 lraspp_mobilenet_v3_large
            mnasnet0_5 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_y_400mf resnet18
            resnet50 shufflenet_v2_x0_5
        """.split()
    ),
    *(
        f"timm:{name}"
        for name in """
            convnextv2_atto dla46x_c efficientnet_lite0 ghostnet_100 mixnet_s mobilenetv3_small_050
            mobilenetv4_conv_small mobilevitv2_050 poolformerv2_s12 repvgg_a0 resnest14d skresnet18
            xception41 resnetblur18 gcresnext26ts mobilevit_xxs efficientvit_b0 edgenext_xx_small
        """.split()
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_networks(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    x = torch.randn(1, 3, 64, 64)
    compiled = separable.compile(model, x, threads=1)
    steps = [step for step in compiled.program.schedule.steps if step.kernel is None and step.node]
    assert not {str(step.node.attributes["target"]) for step in steps if step.node}
    with torch.no_grad():
        eager = pytree.tree_leaves(model(x))
        exact = pytree.tree_leaves(copy.deepcopy(model).double()(x.double()))
    for ours, theirs, right in zip(pytree.tree_leaves(compiled(x)), eager, exact, strict=True):
        assert deviation(ours, right) <= max(4 * deviation(theirs, right), 2e-6)
