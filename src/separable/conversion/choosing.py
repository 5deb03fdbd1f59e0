"""What can be done with each convolution, and the choice that costs least error."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..outputs import Outputs
from ..progress import progress as progress_bar
from .calibration import Inputs
from .checking import check_fit, check_reached
from .fitting import Target, curve, fit, targets
from .forms import Form, SeparatedConv, attached, exact_rank, grouped, weights_per_position
from .plans import NothingToConvert, Row
from .sensitivity import fisher
from .sites import Site, input_moments, trace

SURVEY_BYTES = 1.5e9
"""memory for the moments of the layers that are surveyed in one pass"""
ANCHOR_STEPS, ANCHOR_WORK = 15, 3e8
"""optimiser steps of the one fit that sets the level of an error curve, and the multiply-adds a
step beyond which a layer takes the usual level instead"""
WORTH = 0.75
"""share of the dense cost above which a form is not considered"""
USUAL_LEVEL = {"depthwise-pointwise": 0.7, "pointwise-depthwise-pointwise": 0.5}
"""error of a fit relative to its closed-form start, where no fit is tried: a guess, not measured
on layers of that size"""


class Option(NamedTuple):
    """One thing that can be done with a layer."""

    form: Form | None
    """None keeps it dense"""
    rank: int
    error: float
    macs: float
    params: int


class Candidates(NamedTuple):
    """The layers of a network and what can be done with each."""

    sites: list[Site]
    options: dict[str, list[Option]]
    """of the layers that may change, dense first"""
    reasons: dict[str, str]
    """why the others stay"""


def candidates(
    original: nn.Module,
    inputs: Inputs | None,
    example: Tensor | None,
    skip: tuple[str, ...],
    forms: tuple[Form, ...],
    seed: int,
    shares: Collection[float],
    outputs: Outputs,
    progress: bool,
) -> dict[float, Candidates]:
    """Find what can be done with each convolution, and what error to expect of it.

    All shares have the same options. Their errors differ, by a fit near each.

    Args:
        original: the network, in eval mode.
        inputs: calibration inputs, or None for the plain norm of the weights.
        example: an input for the shapes, or None.
        skip: names or patterns of layers to keep.
        forms: the forms to consider.
        seed: of every draw.
        shares: fractions of the dense cost near which the errors should be most exact.
        outputs: what the network's outputs are.
        progress: whether to show a progress bar.

    Returns:
        The candidates for each share.
    """
    for name, module in original.named_modules():
        if isinstance(module, SeparatedConv):
            raise ValueError(
                f"`model` is a converted network already: `{name}` is a {type(module).__name__}; "
                "convert the original, or what separable.merge makes of this one"
            )
    first = inputs.first if inputs is not None else example
    sites = trace(original, first, inputs or ())
    if not sites:
        raise NothingToConvert({})
    reasons = {
        site.name: reason
        for site in sites
        if (reason := _stays(original, site, skip, first is not None))
    }
    chosen = [site for site in sites if site.name not in reasons]
    for site in chosen:
        conv: Any = original.get_submodule(site.name)
        for key, values in (("weight", conv.weight), ("bias", conv.bias)):
            if values is not None and not values.isfinite().all():
                raise ValueError(f"the {key} of layer `{site.name}` holds NaN or infinity")
    check_fit(chosen, forms)
    if first is not None:
        check_reached(original, chosen, first, inputs or ())
    options: dict[float, dict[str, list[Option]]] = {share: {} for share in shares}
    information: dict[str, Tensor] = {}
    with progress_bar("planning", 2 * len(chosen), "layer", shown=progress) as bar:
        if inputs is not None and chosen:
            kind = inputs.measured(outputs)
            information = fisher(original, chosen, inputs, seed, kind, inputs.whole)
        for group in _split_by_memory(chosen):
            moments = input_moments(original, group, inputs, seed) if inputs is not None else {}
            bar.update(len(group))
            for site in group:
                conv = original.get_submodule(site.name)
                goals = targets(
                    grouped(conv.weight.detach(), conv.groups),
                    moments.pop(site.name, None),
                    information.get(site.name),
                    own=True,
                )
                for share, group_of_share in _options(site, goals, forms, shares).items():
                    options[share][site.name] = group_of_share
                bar.update()
    return {share: Candidates(sites, found, reasons) for share, found in options.items()}


def _stays(model: nn.Module, site: Site, skip: tuple[str, ...], traced: bool) -> str:
    """Why a layer stays dense, or nothing."""
    parts = [name.split(".") for name in site.names]
    around = {".".join(each[: i + 1]) for each in parts for i in range(len(each))}
    if any(fnmatchcase(name, pattern) for name in around for pattern in skip):
        return "skipped by name"
    if site.shape is None:
        return "transposed"
    if traced and not site.calls:
        return "never runs on the calibration inputs"
    if site.tied:
        return f"shares a parameter with {site.tied}"
    conv: Any = model.get_submodule(site.name)
    if conv.weight.is_complex():
        return "its weight is complex"
    if reason := attached(conv):
        return reason
    if not site.plain:
        return "its class computes more than a convolution"
    if site.shape.inputs == 1 and site.shape.groups > 1:
        return "already depthwise"
    return ""


def _split_by_memory(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Split layers into runs whose moments fit in memory together."""
    group: list[Site] = []
    size = 0.0
    for site in sites:
        assert site.shape is not None
        need = 8.0 * site.shape.groups * (site.shape.inputs * site.shape.taps) ** 2
        if group and size + need > SURVEY_BYTES:
            yield group
            group, size = [], 0.0
        group.append(site)
        size += need
    if group:
        yield group


def cost(site: Site, form: Form | None, rank: int) -> tuple[float, int]:
    """Multiply-adds per network input, and weights, of a layer in a form; None is dense."""
    if site.shape is None:  # transposed: each input position meets all weights
        return site.weights * site.before, site.weights
    if form is None:
        weights = math.prod(site.shape)
        return weights * site.after, weights
    lead, rest = weights_per_position(form, site.shape, rank)
    return lead * site.before + rest * site.after, lead + rest


def _options(
    site: Site, goals: list[Target], forms: tuple[Form, ...], shares: Collection[float]
) -> dict[float, list[Option]]:
    assert site.shape is not None

    # without an example input there are no positions, and the weights stand for the cost
    def price(form: Form | None, rank: int) -> float:
        macs, weights = cost(site, form, rank)
        return macs if site.calls else float(weights)

    dense = Option(None, 0, 0.0, cost(site, None, 0)[0], site.params)
    found = {share: [dense] for share in shares}
    for form in forms:
        if (form == "low-rank") != (site.shape.taps == 1):
            continue  # without taps, the separable forms have nothing to separate
        ratio = price(None, 0) / price(form, 1)
        most = min(exact_rank(form, site.shape), math.floor(WORTH * ratio))
        if most < 1 or (
            form == "pointwise-depthwise"
            and len(forms) > 1
            and _work(goals[0], form, 1) > ANCHOR_WORK
        ):
            continue  # fitting every output channel's own filters is slow, and seldom best
        anchors = {share: max(1, min(most, round(share * ratio))) for share in shares}
        curves = [_levelled(goal, form, most, set(anchors.values())) for goal in goals]
        for share, anchor in anchors.items():
            errors = torch.stack([levelled[anchor] for levelled in curves]).sum(0).tolist()
            found[share] += [
                Option(form, rank, errors[rank - 1], *_with_bias(site, form, rank))
                for rank in range(1, most + 1)
            ]
    return found


def _with_bias(site: Site, form: Form, rank: int) -> tuple[float, int]:
    """Multiply-adds and parameters of a converted layer, which has a bias."""
    assert site.shape is not None
    macs, weights = cost(site, form, rank)
    return macs, weights + site.shape.groups * site.shape.outputs


def _levelled(goal: Target, form: Form, most: int, anchors: Collection[int]) -> dict[int, Tensor]:
    """The predicted error at each rank: the closed-form curve, brought to the level of a fit.

    Returns:
        `[most]` for each anchor, the rank of the fit.
    """
    scale = goal.scale if goal.gram is not None else 1 / max(goal.norm(goal.weight), 1e-300)
    errors = curve(goal, form, most)

    def level(anchor: int) -> float:
        if _work(goal, form, anchor) > ANCHOR_WORK:
            return USUAL_LEVEL.get(form, 1.0)
        if form == "low-rank":
            return 1.0
        reached = fit(goal, form, anchor, ANCHOR_STEPS).dense()[0]
        return min(goal.norm(reached - goal.weight) / max(float(errors[anchor - 1]), 1e-300), 1.0)

    return {anchor: errors * level(anchor) * scale for anchor in anchors}


def _work(goal: Target, form: Form, rank: int) -> float:
    """Multiply-adds of an optimiser's step, about."""
    outputs, inputs, taps = goal.weight.shape
    terms = {"depthwise-pointwise": 16 * rank, "pointwise-depthwise": outputs}.get(form, rank)
    return float(terms * (inputs * taps) ** 2)


def choose(
    options: dict[str, list[Option]], price: Callable[[str, Option], float], limit: float
) -> dict[str, Option] | None:
    """Pick an option per layer: the least summed error whose summed price is within a limit.

    Minimises error + λ price for each layer and bisects λ (Everett 1963).

    Returns:
        The options, or None if even the cheapest ones exceed the limit.
    """
    priced = {
        name: [(option, price(name, option)) for option in group] for name, group in options.items()
    }

    def best(weight: float) -> dict[str, tuple[Option, float]]:
        return {
            name: min(group, key=lambda pair: (pair[0].error + weight * pair[1], pair[1]))
            for name, group in priced.items()
        }

    cheapest = {name: min(group, key=lambda pair: pair[1]) for name, group in priced.items()}

    def total(picked: dict[str, tuple[Option, float]]) -> float:
        return sum(price for _, price in picked.values())

    if total(cheapest) > limit * (1 + 1e-12):
        return None
    low, high, picked = -80.0, 80.0, cheapest
    for _ in range(60):
        middle = (low + high) / 2
        found = best(math.exp(middle))
        if total(found) <= limit * (1 + 1e-12):
            high, picked = middle, found
        else:
            low = middle
    return {name: option for name, (option, _) in _filled(priced, picked, limit).items()}


def _filled(
    priced: dict[str, list[tuple[Option, float]]],
    picked: dict[str, tuple[Option, float]],
    limit: float,
) -> dict[str, tuple[Option, float]]:
    """Spend what is left of the limit, on the step that lowers the error most per price."""
    picked = dict(picked)
    left = limit - sum(price for _, price in picked.values())
    while True:
        steps = [
            ((now[0].error - option.error) / max(price - now[1], 1e-300), name, (option, price))
            for name, now in picked.items()
            for option, price in priced[name]
            if option.error < now[0].error and price - now[1] <= left
        ]
        if not steps:
            return picked
        _, name, step = max(steps, key=lambda step: step[0])
        left -= step[1] - picked[name][1]
        picked[name] = step


def rows(found: Candidates, picked: dict[str, Option]) -> tuple[Row, ...]:
    """The rows of a plan, in the order in which the layers run."""
    result = []
    for site in found.sites:
        before = cost(site, None, 0)[0], site.params
        option = picked.get(site.name)
        reason = found.reasons.get(site.name, "")
        if option is None or option.form is None:
            reason = reason or "no form is worth its error here"
            option = Option(None, 0, 0.0, *before)
        result.append(
            Row(
                name=site.name,
                form=option.form,
                rank=option.rank,
                macs_before=before[0],
                macs_after=option.macs,
                params_before=before[1],
                params_after=option.params,
                error=option.error,
                reason="" if option.form else reason,
                positions=(site.before, site.after),
                shape=site.shape,
                geometry=site.geometry,
            )
        )
    return tuple(result)
