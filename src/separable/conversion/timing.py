"""The search for a plan within a share of a network's time, which is measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..cost import measure, measure_interleaved
from ..cost.preserving import copied
from ..progress import hidden
from ..progress import progress as progress_bar
from .calibration import Inputs
from .choosing import Option, choose
from .forms import FORMS, Conv, Shape, random_factors, separated
from .plans import Plan, unmet
from .searching import TRIALS, Search
from .sites import replaced, trace

RANK_STEPS = 8
"""ranks per form and layer that are timed"""
CLOSE = 0.93
"""share of the limit from which on a plan is good enough: what is left is within the spread of
times, and another trial takes as long as this one"""
AIM = 0.97
"""share of the limit that the next trial aims at, or half of those that meet it in the mean would
be measured above it"""


@dataclass(frozen=True)
class Timer:
    """How networks and layers are timed."""

    compile: Callable[..., Callable[..., Any]]
    """turns a model and an example input into what is timed"""
    example: Tensor | None
    inputs: Inputs | None
    """of layers that do not run on the example"""
    known: dict[Any, float] = field(default_factory=dict)
    """seconds of the options that were timed so far"""


def for_latency(search: Search, timer: Timer) -> Plan:
    """The plan of least error within a share of the network's time; the same in all processes."""
    with hidden(not search.progress):
        return _found_by_first(lambda: _for_latency(search, timer))


def _for_latency(search: Search, timer: Timer) -> Plan:
    """The plan of least error whose network, timed as a whole, is within the limit.

    Layers are timed alone to choose among their options; the sum misses what happens between
    them, so the network that comes out is timed against the original, and the limit that the
    layers must meet is corrected by what was off, for a few rounds.
    """
    example, compile = timer.example, timer.compile
    assert example is not None
    seconds = _timed(search, timer, example)
    offered = {
        name: [option for option in group if (name, option) in seconds]
        for name, group in search.found.options.items()
    }
    dense = {name: seconds[name, group[0]] for name, group in offered.items()}
    reference = compile(search.original, example)
    whole = float(measure(reference, example).median)
    fixed = max(whole - sum(dense.values()), 0.0)
    limit, best, least, nearest = search.goal.limit, None, math.inf, 1.0

    def price(name: str, option: Option) -> float:
        return seconds[name, option]

    for _ in range(TRIALS):
        picked = choose(offered, price, limit * whole - fixed)
        if picked is None:
            floor = {
                name: min(group, key=lambda o: price(name, o)) for name, group in offered.items()
            }
            picked = floor
        trial = compile(_mock(search, picked), example)
        before, after = measure_interleaved([reference, trial], example)
        reached = float(after.median / before.median)
        nearest = min(nearest, reached)
        if reached <= search.goal.limit:
            plan = dataclasses.replace(
                _with_times(search.plan(picked), picked, seconds, dense),
                seconds_before=float(before.median),
                seconds_after=float(after.median),
            )
            error = sum(option.error for option in picked.values())
            if best is None or error < least:
                best, least = plan, error
            if reached > CLOSE * search.goal.limit:
                break
        limit *= AIM * search.goal.limit / reached
    if best is None:
        nearest_one = f"latency={math.ceil(100 * nearest) / 100:g}"
        raise unmet(search.goal, nearest_one, search.found.reasons)
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


def _timed(search: Search, timer: Timer, example: Tensor) -> dict[tuple[str, Option], float]:
    """Seconds of each layer alone, for a ladder of ranks of each form."""
    known = timer.known
    seconds: dict[tuple[str, Option], float] = {}
    sites = {site.name: site for site in trace(search.original, example, timer.inputs or ())}
    offered = {name: list(_ladder(group)) for name, group in search.found.options.items()}
    count = sum(map(len, offered.values()))
    with progress_bar("timing", count, "option", shown=search.progress) as bar:
        for name, group in offered.items():
            site = sites[name]
            conv: Any = search.original.get_submodule(name)
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
                        timer.compile(module, input), input, repeats=5, min_seconds=0.02
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


def _mock(search: Search, picked: dict[str, Option]) -> nn.Module:
    """The network that a choice leads to, with noise for weights: it takes the same time."""
    network = copied(search.original)
    sites = {site.name: site for site in search.found.sites}
    for name, option in picked.items():
        if option.form is not None:
            conv: Any = search.original.get_submodule(name)
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
