"""The search for a plan: within a budget that is counted, or within one of the measured error."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from ..outputs import Outputs
from .applying import finished, fitted
from .calibration import Inputs
from .choosing import Candidates, Option, choose, rows
from .plans import Budget, Plan, unmet

TRIALS = 6
"""whole networks that are converted or timed to meet a measured budget"""
HOPE = 10.0
"""how many times the limit an error may be for the last pass to be tried against it"""


class Search(NamedTuple):
    """One search for a plan."""

    original: nn.Module
    found: Candidates
    goal: Budget
    seed: int
    outputs: Outputs
    progress: bool

    def plan(self, picked: dict[str, Option]) -> Plan:
        """The plan that a choice makes."""
        return Plan(rows(self.found, picked), str(self.goal), self.seed, outputs=self.outputs)

    def within(self, share: float, quantity: str | None = None) -> Plan:
        """The plan of least error within a share of the convolutions' MACs or weights.

        Raises:
            ValueError: there is none.
        """
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


def for_error(search: Search, inputs: Inputs) -> Plan:
    """The cheapest plan whose measured error is within the limit.

    The predicted error of a plan falls with its share of MACs, and the measured one follows it
    closely enough to bisect on the share's logarithm. The last pass, which is slow and never
    raises the error, runs only where it decides.
    """
    kept, limit = search.plan({}), search.goal.limit
    best, low, high = kept, math.log(1e-3), 0.0
    for _ in range(TRIALS):
        middle = (low + high) / 2
        try:
            tried = search.within(math.exp(middle), "macs")
        except ValueError:
            low = middle
            continue
        found, report = fitted(search.original, tried, search.found.sites, inputs, search.progress)
        assert report.error is not None
        if limit < report.error <= HOPE * limit:
            _, report = finished(found, report, search.original, inputs, search.progress)
        if report.error is not None and report.error <= limit:
            best, high = tried, middle
        else:
            low = middle
    return best
