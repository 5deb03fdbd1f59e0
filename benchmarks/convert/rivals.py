"""Published conversions, each written from its paper, at a given share of the multiply-adds."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import nn

from separable.conversion.applying import with_batch_norm
from separable.conversion.calibration import Inputs
from separable.conversion.choosing import cost
from separable.conversion.fitting import fit, targets
from separable.conversion.forms import Factors, Form, grouped, separated, weight_only
from separable.conversion.moments import Moments
from separable.conversion.sensitivity import divergence
from separable.conversion.sites import Site, input_moments, replaced, trace

tensorly.set_backend("pytorch")

DEPTHWISE: Form = "depthwise-pointwise"
BLUEPRINT: Form = "pointwise-depthwise"
CANONICAL: Form = "pointwise-depthwise-pointwise"
Layer = Callable[[Any, Site, float, Moments], nn.Module]


def _rank(site: Site, form: Form, macs: float) -> int:
    """The largest rank within a layer's budget, or 1: a form that cannot be so small gets more."""
    return max(1, math.floor(macs / cost(site, form, 1)[0]))


def _plain(form: Form) -> Layer:
    def layer(conv: Any, site: Site, macs: float, _: Moments) -> nn.Module:
        rank = _rank(site, form, macs)
        factors = weight_only(grouped(conv.weight.detach().double(), conv.groups), form, rank)
        return separated(conv, factors, conv.bias)

    return layer


def _aware(form: Form) -> Layer:
    """Each layer alone, in the metric of its own inputs."""

    def layer(conv: Any, site: Site, macs: float, moments: Moments) -> nn.Module:
        rank = _rank(site, form, macs)
        weight = grouped(conv.weight.detach().double(), 1)
        (goal,) = targets(weight, moments, None, own=True)
        factors = fit(goal, form, rank)
        gap = (weight - factors.dense()).flatten(2)  # the mean output stays the original's
        bias = torch.einsum("gnf,gf->gn", gap, moments.mean).flatten()
        return separated(conv, factors, bias if conv.bias is None else bias + conv.bias)

    return layer


def _cp(conv: Any, site: Site, macs: float, _: Moments) -> nn.Module:
    rank = _rank(site, CANONICAL, macs)
    weight = conv.weight.detach().double().flatten(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scale, (last, lead, spatial) = parafac(
            weight, rank, n_iter_max=200, init="random", random_state=0
        )
    factors = Factors(CANONICAL, lead.mT[None], spatial.mT[None], (last * scale)[None])
    return separated(conv, factors, conv.bias)


def _tucker(conv: Any, site: Site, macs: float, _: Moments) -> nn.Module:
    """Tucker-2 (Kim et al. 2016), both channel ranks in proportion."""
    outputs, inputs = conv.weight.shape[:2]
    taps = math.prod(conv.kernel_size)

    def price(part: float) -> float:
        n, c = max(1, int(part * outputs)), max(1, int(part * inputs))
        return site.before * inputs * c + site.after * n * (c * taps + outputs)

    part = max((k / 400 for k in range(1, 400) if price(k / 400) <= macs), default=1 / 400)
    ranks = [max(1, int(part * outputs)), max(1, int(part * inputs))]
    weight = conv.weight.detach().double()
    (core, (last, lead)), _ = partial_tucker(weight, ranks, modes=[0, 1], n_iter_max=100)
    plain = type(conv)
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    first = plain(inputs, ranks[1], 1, bias=False)
    middle = plain(ranks[1], ranks[0], *geometry, bias=False)
    final = plain(ranks[0], outputs, 1, bias=conv.bias is not None)
    with torch.no_grad():
        first.weight.copy_(lead.mT.reshape(first.weight.shape))
        middle.weight.copy_(core)
        final.weight.copy_(last.reshape(final.weight.shape))
        if conv.bias is not None:
            final.bias.copy_(conv.bias)
    return nn.Sequential(first, middle, final).eval()


RIVALS: dict[str, Layer] = {
    "network decoupling": _plain(DEPTHWISE),
    "data-driven decoupling": _aware(DEPTHWISE),
    "FALCON-style": _plain(BLUEPRINT),
    "CP": _cp,
    "Tucker-2": _tucker,
    "covariance CP": _aware(CANONICAL),
}


def seen(model: nn.Module, inputs: Inputs) -> tuple[list[Site], dict[str, Moments]]:
    """All convolutions, and the moments of the k×k ones behind the stem."""
    sites = trace(model, inputs.first)
    changing = [s for s in sites if s.shape.taps > 1 and s is not sites[0]]
    return sites, input_moments(model, changing, inputs, 0)


def convert(
    model: nn.Module,
    inputs: Inputs,
    sites: list[Site],
    moments: dict[str, Moments],
    share: float,
    layer: Layer,
) -> tuple[nn.Module, nn.Module, float]:
    """Convert every k×k layer but the stem to the same share of its multiply-adds.

    Returns:
        The network, the one with batch-norm statistics re-estimated where that lowers its
        calibration error, and its share of the multiply-adds.
    """
    dense = {site.name: cost(site, None, 0)[0] for site in sites}
    changing = [site for site in sites if site.name in moments]
    kept = sum(dense.values()) - sum(dense[site.name] for site in changing)
    part = (share * sum(dense.values()) - kept) / sum(dense[site.name] for site in changing)
    result = copy.deepcopy(model)
    for site in changing:
        conv = model.get_submodule(site.name)
        made = layer(conv, site, part * dense[site.name], moments[site.name])
        result = replaced(result, site.names, made)
    renewed = with_batch_norm(result, inputs)
    macs = sum(_macs(result.get_submodule(s.name), s) for s in sites) / sum(dense.values())
    if renewed is None or divergence(renewed, model, inputs) > divergence(result, model, inputs):
        renewed = result
    return result, renewed, macs


def _macs(module: nn.Module, site: Site) -> float:
    convs = [m for m in module.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    before = {id(convs[0])} if len(convs) > 1 and max(convs[0].kernel_size) == 1 else set()
    return sum(
        conv.weight.numel() * (site.before if id(conv) in before else site.after) for conv in convs
    )
