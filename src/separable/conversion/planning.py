"""Planning: from a model, calibration inputs and a budget to a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from tqdm import tqdm

from ..cost import measure, measure_interleaved
from ..cost.preserving import copied
from ..outputs import Outputs, check_outputs
from ..progress import hidden
from .applying import Report, finished, fitted
from .calibration import Inputs
from .checking import check_compile, check_example, check_model, checked_forms, checked_skip
from .choosing import Candidates, Option, candidates, choose, rows
from .forms import FORMS, Conv, Form, Shape, random_factors, separated
from .plans import Budget, NothingToConvert, Plan, check_seed, unmet
from .sites import Site, frozen_copy, replaced, trace

TRIALS = 6
"""whole networks that are converted or timed to meet a measured budget"""
HOPE = 10.0
"""how many times the limit an error may be for the last pass to be tried against it"""
RANK_STEPS = 8
"""ranks per form and layer that are timed"""


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
    example: Tensor | None
    found: Mapping[float, Candidates]
    """by the share of the cost near which the errors are most exact"""
    seed: int
    compile: Callable[..., Callable[..., Any]]
    outputs: Outputs
    progress: bool
    timed: dict[Any, float] = field(default_factory=dict)
    """seconds of the options that were timed so far"""

    @property
    def sites(self) -> list[Site]:
        """The network's layers, as the inputs reach them."""
        return next(iter(self.found.values())).sites

    @torch.inference_mode(False)
    def choose(self, budget: str) -> Plan:
        """The plan for one of the budgets that the survey was made for."""
        goal = Budget.parse(budget)
        found = self.found[_share(goal)]
        task = _Task(self.original, found, goal, self.seed, self.outputs, self.progress)
        if goal.quantity == "error":
            assert self.inputs is not None
            return _for_error(task, self.inputs)
        if goal.quantity == "latency":
            with hidden(not self.progress):
                return _found_by_first(lambda: _for_latency(task, self))
        return task.within(goal.limit)


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
    return Survey(
        original,
        inputs,
        example,
        found,
        seed,
        compile or (lambda model, _: model),
        outputs,
        progress,
    )


def _share(goal: Budget) -> float:
    """The share of the dense cost where a plan for a budget is likely to end."""
    return 0.25 if goal.quantity == "error" else goal.limit


class _Task(NamedTuple):
    """One search for a plan."""

    original: nn.Module
    found: Candidates
    goal: Budget
    seed: int
    outputs: Outputs
    progress: bool

    def plan(self, picked: dict[str, Option]) -> Plan:
        return Plan(rows(self.found, picked), str(self.goal), self.seed, outputs=self.outputs)

    def within(self, share: float, quantity: str | None = None) -> Plan:
        """The plan of least error within a share of the convolutions' MACs or weights."""
        by = quantity or self.goal.quantity
        dense = self.plan({})
        if by == "macs":
            whole = sum(row.macs_before for row in dense.rows)
        else:
            whole = float(sum(row.params_before for row in dense.rows))

        def price(_: str, option: Option) -> float:
            return option.macs if by == "macs" else float(option.params)

        free = {name: price(name, group[0]) for name, group in self.found.options.items()}
        fixed = whole - sum(free.values())
        picked = choose(self.found.options, price, share * whole - fixed)
        if picked is None:
            least = fixed + sum(
                min(price(name, option) for option in group)
                for name, group in self.found.options.items()
            )
            nearest = f"{by}={math.ceil(1e4 * least / whole) / 1e4:g}"
            raise unmet(self.goal, nearest, self.found.reasons)
        return self.plan(picked)


def _for_error(task: _Task, inputs: Inputs) -> Plan:
    """The cheapest plan whose measured error is within the limit.

    The predicted error of a plan falls with its share of MACs, and the measured one follows it
    closely enough to bisect on the share's logarithm. The last pass, which is slow and never
    raises the error, runs only where it decides.
    """
    kept, limit = task.plan({}), task.goal.limit
    best, low, high = kept, math.log(1e-3), 0.0
    for _ in range(TRIALS):
        middle = (low + high) / 2
        try:
            tried = task.within(math.exp(middle), "macs")
        except ValueError:
            low = middle
            continue
        found, report = fitted(task.original, tried, task.found.sites, inputs, task.progress)
        assert report.error is not None
        if limit < report.error <= HOPE * limit:
            _, report = finished(found, report, task.original, inputs, task.progress)
        if report.error is not None and report.error <= limit:
            best, high = tried, middle
        else:
            low = middle
    return best


def _for_latency(task: _Task, survey: Survey) -> Plan:
    """The plan of least error whose network, timed as a whole, is within the limit.

    Layers are timed alone to choose among their options; the sum misses what happens between
    them, so the network that comes out is timed against the original, and the limit that the
    layers must meet is corrected by what was off, for a few rounds.
    """
    example, compile = survey.example, survey.compile
    assert example is not None
    seconds = _timed(task, survey, example)
    offered = {
        name: [option for option in group if (name, option) in seconds]
        for name, group in task.found.options.items()
    }
    dense = {name: seconds[name, group[0]] for name, group in offered.items()}
    reference = compile(task.original, example)
    whole = float(measure(reference, example).median)
    fixed = max(whole - sum(dense.values()), 0.0)
    limit, best, least, nearest = task.goal.limit, None, math.inf, 1.0

    def price(name: str, option: Option) -> float:
        return seconds[name, option]

    for _ in range(TRIALS):
        picked = choose(offered, price, limit * whole - fixed)
        if picked is None:
            floor = {
                name: min(group, key=lambda o: price(name, o)) for name, group in offered.items()
            }
            picked = floor
        trial = compile(_mock(task, picked), example)
        before, after = measure_interleaved([reference, trial], example)
        reached = float(after.median / before.median)
        nearest = min(nearest, reached)
        if reached <= task.goal.limit:
            plan = dataclasses.replace(
                _with_times(task.plan(picked), picked, seconds, dense),
                seconds_before=float(before.median),
                seconds_after=float(after.median),
            )
            error = sum(option.error for option in picked.values())
            if best is None or error < least:
                best, least = plan, error
            if reached > 0.93 * task.goal.limit:
                break
        limit *= 0.97 * task.goal.limit / reached
    if best is None:
        nearest_one = f"latency={math.ceil(100 * nearest) / 100:g}"
        raise unmet(task.goal, nearest_one, task.found.reasons)
    return best


def _found_by_first(search: Callable[[], Plan]) -> Plan:
    """What process 0 finds, in all processes: they would not measure the same times."""
    if not (dist.is_available() and dist.is_initialized()):
        return search()
    told: list[str | None] = [None, "process 0 failed"]
    try:
        if dist.get_rank() == 0:
            told = [search().to_json(), None]
    except Exception as error:
        told[1] = str(error)
        raise
    finally:
        dist.broadcast_object_list(told)
    if told[0] is None:
        raise ValueError(told[1])
    return Plan.from_json(told[0])


def _timed(task: _Task, survey: Survey, example: Tensor) -> dict[tuple[str, Option], float]:
    """Seconds of each layer alone, for a ladder of ranks of each form."""
    known = survey.timed
    seconds: dict[tuple[str, Option], float] = {}
    sites = {site.name: site for site in trace(task.original, example, survey.inputs or ())}
    offered = {name: list(_ladder(group)) for name, group in task.found.options.items()}
    count = sum(map(len, offered.values()))
    with tqdm(total=count, desc="timing", unit="option", disable=not task.progress) as bar:
        for name, group in offered.items():
            site = sites[name]
            conv: Any = task.original.get_submodule(name)
            for option in group:
                geometry = (conv.extra_repr(), type(conv), site.input_size)
                key = (geometry, option.form, option.rank)
                if key not in known:
                    module = _stand_in(conv, option)
                    generator = torch.Generator().manual_seed(0)
                    input = torch.randn(
                        site.input_size, generator=generator, dtype=torch.float32
                    ).to(conv.weight)
                    timed = measure(
                        survey.compile(module, input), input, repeats=5, min_seconds=0.02
                    )
                    known[key] = float(timed.median)
                seconds[name, option] = known[key] * site.calls
                bar.update()
    return seconds


def _ladder(group: list[Option]) -> Iterator[Option]:
    """The dense option, and of each form a geometric ladder of ranks."""
    yield group[0]
    for form in FORMS:
        ranks = [option for option in group if option.form == form]
        steps = torch.logspace(0, math.log10(max(len(ranks), 1)), RANK_STEPS).round().int().tolist()
        for rank in sorted(set(steps)):
            if rank <= len(ranks):
                yield ranks[rank - 1]


def _stand_in(conv: Conv, option: Option) -> nn.Module:
    """A module of an option's form and rank, with noise for weights."""
    if option.form is None:
        return conv
    return separated(conv, random_factors(option.form, Shape.of(conv), option.rank), conv.bias)


def _mock(task: _Task, picked: dict[str, Option]) -> nn.Module:
    """The network that a choice leads to, with noise for weights: it takes the same time."""
    network = copied(task.original)
    sites = {site.name: site for site in task.found.sites}
    for name, option in picked.items():
        if option.form is not None:
            conv: Any = task.original.get_submodule(name)
            network = replaced(network, sites[name].names, _stand_in(conv, option))
    return network


def _with_times(
    plan: Plan,
    picked: dict[str, Option],
    seconds: dict[tuple[str, Option], float],
    dense: dict[str, float],
) -> Plan:
    timed = tuple(
        dataclasses.replace(
            row, seconds_before=dense[row.name], seconds_after=seconds[row.name, picked[row.name]]
        )
        if row.name in picked
        else row
        for row in plan.rows
    )
    return dataclasses.replace(plan, rows=timed)
