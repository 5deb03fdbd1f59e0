"""The conversion in one call, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cost.preserving import copied
from ..outputs import Outputs
from .applying import Report, apply, finished, fitted, with_report
from .forms import FORMS, Form, SeparatedConv, merged
from .planning import plan, survey
from .plans import Budget
from .sites import replaced


def convert(
    model: nn.Module,
    calibration: Any,
    budget: str,
    *,
    skip: Sequence[str] = (),
    forms: Sequence[Form] = FORMS,
    seed: int = 0,
    compile: Callable[..., Callable[..., Any]] | None = None,
    example: Tensor | None = None,
    outputs: Outputs = "auto",
    progress: bool = True,
) -> nn.Module:
    """Turn a trained network of regular convolutions into one of separable ones.

    `plan` followed by `apply`; see there for the arguments and the errors.

    Returns:
        A new model with the attribute `report`; the given one is left as it was.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU()).eval()
        >>> inputs = torch.randn(64, 8, 12, 12)
        >>> slim = convert(model, inputs, budget="macs=0.5", progress=False)
        >>> slim.report.plan.macs <= 0.5
        True
    """
    if isinstance(calibration, Iterator):
        calibration = list(calibration)  # a stream runs once only, and both steps need it
    chosen = plan(
        model,
        calibration,
        budget,
        skip=skip,
        forms=forms,
        seed=seed,
        compile=compile,
        example=example,
        outputs=outputs,
        progress=progress,
    )
    return apply(model, chosen, calibration, progress=progress)


@torch.inference_mode(False)
def frontier(
    model: nn.Module,
    calibration: Any,
    budget: str | None,
    further: Sequence[str],
    *,
    seed: int = 0,
    example: Tensor | None = None,
    outputs: Outputs = "auto",
    progress: bool = True,
) -> dict[str, nn.Module]:
    """Convert a network within a budget and within further ones, which share one survey.

    Within the budget it is converted as `convert` does. The further ones go without the last pass
    over all layers, which takes about half of the time, and the first is returned as it was
    before that pass too, to compare like with like. Budgets of errors are all met with the pass.

    Args:
        model: the network, in eval mode; it is left as it was.
        calibration: as for `convert`, and so are all others.
        budget: the one to convert within; None for the further ones alone.
        further: the further ones.

    Returns:
        The networks in eval mode, each with the attribute `report`, by budget, in order;
        ", fitted once" follows a budget where there was no last pass.
    """
    budgets = [*([] if budget is None else [budget]), *further]
    surveyed = survey(
        model,
        calibration,
        budgets,
        seed=seed,
        example=example,
        outputs=outputs,
        progress=progress,
    )
    original, inputs = surveyed.original, surveyed.inputs
    found: dict[str, nn.Module] = {}
    for each, chosen in {each: surveyed.choose(each) for each in budgets}.items():
        network, report = fitted(original, chosen, surveyed.sites, inputs, progress)
        with_report(network, report, model)
        is_error = Budget.parse(each).quantity == "error"
        if each != budget and not is_error:
            found[f"{each}, fitted once"] = network
            continue
        found[each] = network
        if inputs is not None:
            found[each], report = finished(network, report, original, inputs, progress)
            with_report(found[each], report, model)
        if report.refined and further and not is_error:
            found[f"{each}, fitted once"] = network
    return found


def merge(model: nn.Module) -> nn.Module:
    """Turn every separable form of a converted network back into its dense convolution.

    Args:
        model: a converted network; it is left as it was.

    Returns:
        A new model that computes the same, up to rounding.
    """
    result = copied(model)
    found: dict[nn.Module, list[str]] = {}
    for name, module in result.named_modules(remove_duplicate=False):
        if isinstance(module, SeparatedConv):
            found.setdefault(module, []).append(name)
    for module, names in found.items():
        assert isinstance(module, SeparatedConv)
        result = replaced(result, names, merged(module))
    if isinstance(getattr(result, "report", None), Report):
        del result.report  # it is of a converted network, which this one is no more
    return result
