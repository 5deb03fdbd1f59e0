"""The account over torchvision's and timm's networks, against totals by others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import separable

torchvision = pytest.importorskip("torchvision", reason="needs the extra `zoo`")
timm = pytest.importorskip("timm", reason="needs the extra `zoo`")


@contextmanager
def without_values() -> Iterator[None]:
    """Build a network with shapes alone: on the meta device, its warnings about that silenced."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def torchvision_model(name: str) -> nn.Module:
    if name.startswith("regnet"):  # computes its widths with tensors, so not on meta
        empty = mock.patch.multiple(
            nn.init,
            kaiming_uniform_=lambda tensor, **_: tensor,
            uniform_=lambda tensor, *_, **__: tensor,
            normal_=lambda tensor, *_, **__: tensor,
        )
        with empty:
            return torchvision.models.get_model(name, weights=None)
    # the published weights of these two come without their auxiliary heads' parameters
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name == "googlenet":
        options["aux_logits"] = False
    with without_values():
        return torchvision.models.get_model(name, weights=None, **options)


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_torchvision_agrees_with_its_own_figures(name: str) -> None:
    """torchvision publishes parameters and 10⁹ MACs of each set of weights at their input size."""
    weights: Any = torchvision.models.get_model_weights(name)
    sizes = {entry: entry.transforms().crop_size[0] for entry in weights}
    model = torchvision_model(name)
    assert len(sizes) > 0
    for entry, size in sizes.items():
        if entry is not weights.DEFAULT and size == sizes[weights.DEFAULT]:
            continue
        if name.startswith("vit") and size != model.image_size:
            continue
        account = separable.count(model, (1, 3, size, size), strict=True)
        assert account.params == entry.meta["num_params"]
        assert account.macs / 1e9 == pytest.approx(entry.meta["_ops"], abs=1.01e-3)


# the shortest name of each of timm's modules, and families that share a module with others; an LSTM
# over each row and column takes long and is left out
LEFT_OUT = {"sequencer2d_l"}
FURTHER = set(
    """
    fbnetc_100 gernet_s ghostnetv2_100 lcnet_050 mixnet_s mnasnet_100 mobilenetv4_conv_small
    mobileone_s0 repvgg_a0 semnasnet_100 spnasnet_100 tf_mobilenetv3_small_100 tinynet_e
    """.split()
)


def timm_models() -> list[str]:
    by_module = (timm.list_models(module=module) for module in timm.list_modules())
    names = {min(sorted(models), key=len) for models in by_module if models}
    return sorted((names | FURTHER) - LEFT_OUT)


UNKNOWN = {"naflexvit_base_patch16_gap": ("_upsample_bicubic2d_aa",)}


@pytest.mark.parametrize("name", timm_models())
def test_timm_agrees_with_torch_flop_counter(name: str) -> None:
    """FlopCounterMode is right on forward passes: 2 FLOPs per MAC."""
    try:
        with without_values():
            model = timm.create_model(name)
    except (RuntimeError, NotImplementedError):  # computes a schedule with tensors
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(name)
    size = (1, *model.default_cfg["input_size"])
    account = separable.count(model, size)
    assert account.unknown == UNKNOWN.get(name, ())
    assert account.params == sum(p.numel() for p in model.parameters())

    model.eval().requires_grad_(False)
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(size, device=device))
    assert 2 * account.macs == counter.get_total_flops()


def test_there_are_enough_families() -> None:
    assert len(timm_models()) >= 100
    assert len(torchvision.models.list_models(module=torchvision.models)) >= 80
