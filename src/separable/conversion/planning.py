"""Planning: from a model, calibration inputs and a budget to a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..outputs import Outputs, check_outputs
from .applying import Report
from .calibration import Inputs
from .checking import check_compile, check_example, check_model, checked_forms, checked_skip
from .choosing import Candidates, candidates
from .forms import FORMS, Form
from .plans import Budget, NothingToConvert, Plan, check_seed
from .searching import Search, for_error
from .sites import Site, frozen_copy
from .timing import Timer, for_latency


def plan(
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
) -> Plan:
    """Choose a form and rank for each convolution of a trained network.

    Each layer's error at each rank comes from the moments of its own inputs and the Fisher
    information of its outputs, which makes errors of different layers comparable; the choice
    minimises their sum within the budget, by its Lagrangian.

    Args:
        model: the network; it is left as it was.
        calibration: an iterable of inputs, batches or (input, label) pairs, without use of the
            labels. None plans from the weights alone.
        budget: "macs=0.25" or "params=0.25", at most that share of the convolutions' multiply-adds
            or weights and biases; "latency=0.4", at most that share of the network's time;
            "error=0.01", the least multiply-adds at that mean KL divergence of the logits, or
            relative squared error of other outputs, on the calibration inputs.
        skip: layers to keep dense: names of them or of modules that hold them, or shell patterns
            of names.
        forms: the forms to choose from.
        seed: of every draw.
        compile: for "latency", turns a model and an example input into what is timed; None
            times it in eager mode.
        example: an input batch for shapes and timing, where `calibration` is None; the first
            calibration batch's first input where left out.
        outputs: what the network returns: "logits", one score per class, `[N, classes]`, which
            are compared by the KL divergence of their softmax and so up to an offset; "values",
            compared by relative squared error, as those of a regression; "auto" takes all
            `[N, k]`, k > 1, for logits.
        progress: whether to show a progress bar.

    Returns:
        The plan. Print it for a table.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: there is nothing to convert, the budget cannot be met, the model rejects the
            inputs or would not run what takes a layer's place, its outputs cannot be compared, or
            weights or activations are not finite.
    """
    return survey(
        model,
        calibration,
        [budget],
        skip=skip,
        forms=forms,
        seed=seed,
        compile=compile,
        example=example,
        outputs=outputs,
        progress=progress,
    ).choose(budget)


@dataclass(frozen=True)
class Survey:
    """What can be done with each layer of a network, to choose from within several budgets."""

    original: nn.Module
    inputs: Inputs | None
    timer: Timer
    found: Mapping[float, Candidates]
    """by the share of the cost near which the errors are most exact"""
    seed: int
    outputs: Outputs
    progress: bool

    @property
    def sites(self) -> list[Site]:
        """The network's layers, as the inputs reach them."""
        return next(iter(self.found.values())).sites

    @torch.inference_mode(False)
    def choose(self, budget: str) -> Plan:
        """The plan for one of the budgets that the survey was made for."""
        goal = Budget.parse(budget)
        found = self.found[_share(goal)]
        search = Search(self.original, found, goal, self.seed, self.outputs, self.progress)
        if goal.quantity == "error":
            assert self.inputs is not None
            return for_error(search, self.inputs)
        if goal.quantity == "latency":
            return for_latency(search, self.timer)
        return search.within(goal.limit)


@torch.inference_mode(False)
def survey(
    model: nn.Module,
    calibration: Any,
    budgets: Sequence[str],
    *,
    skip: Sequence[str] = (),
    forms: Sequence[Form] = FORMS,
    seed: int = 0,
    compile: Callable[..., Callable[..., Any]] | None = None,
    example: Tensor | None = None,
    outputs: Outputs = "auto",
    progress: bool = True,
) -> Survey:
    """Find out what can be done with each layer, which takes most of a plan's time.

    Args:
        model: the network; it is left as it was.
        calibration: as for `plan`.
        budgets: all that are to be chosen within, each as for `plan`.
        skip: as for `plan`, and so are all others.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: as for `plan`, but that a budget can be met is left to `choose`.
    """
    goals = [Budget.parse(budget) for budget in budgets]
    check_model(model, Report)
    check_seed(seed)
    check_outputs(outputs)
    check_compile(compile)
    forms = checked_forms(forms)
    original = frozen_copy(model)
    skip = checked_skip(original, skip)
    inputs = None if calibration is None else Inputs(calibration, original)
    if inputs is not None:
        inputs.measured(outputs)
    if example is not None:
        timed = any(goal.quantity == "latency" for goal in goals)
        check_example(original, example, timed or inputs is None)
        example = example.clone()  # some networks write into it
    elif inputs is not None:
        example = inputs.first if inputs.whole else inputs.first[:1]
    for goal, budget in zip(goals, budgets, strict=True):
        if inputs is None and goal.quantity == "error":
            raise ValueError(f"`budget` (={budget!r}) is measured and needs `calibration`")
        if example is None and goal.quantity != "params":
            raise ValueError(
                f"`budget` (={budget!r}) without `calibration` needs `example`, an input batch "
                "that tells the sizes of the layers; or use 'params='"
            )
    found = candidates(
        original,
        inputs,
        example,
        skip,
        forms,
        seed,
        {_share(goal) for goal in goals},
        outputs,
        progress,
    )
    for each in found.values():
        if not each.options:
            raise NothingToConvert(each.reasons)
    timer = Timer(compile or (lambda model, _: model), example, inputs)
    return Survey(original, inputs, timer, found, seed, outputs, progress)


def _share(goal: Budget) -> float:
    """The share of the dense cost where a plan for a budget is likely to end."""
    return 0.25 if goal.quantity == "error" else goal.limit
