"""The plan of a conversion: a frozen value that prints, saves as JSON and may be edited."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from prettytable import PrettyTable

from .forms import FORMS, Form, Shape, exact_rank, weights_per_position

Quantity = Literal["macs", "params", "latency", "error"]


class NothingToConvert(ValueError):
    """A network has no convolution that can be converted.

    Attributes:
        why: what its convolutions are, if it has any.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        named = ", ".join(f"{name}: {reason}" for name, reason in reasons.items())
        self.why = f"no convolution can change ({named})" if named else "it has no convolution"
        super().__init__("`model` has no convolution to convert" + (f" ({named})" if named else ""))


class Budget(NamedTuple):
    """What a conversion may cost."""

    quantity: Quantity
    limit: float

    @classmethod
    def parse(cls, text: Any) -> Budget:
        """Read "macs=0.25" and the like.

        Raises:
            TypeError: it is no string.
            ValueError: it is not of that form, or the limit is out of range.
        """
        if not isinstance(text, str):
            raise TypeError(f"`budget` (={text!r}) must be a string like 'macs=0.25'")
        quantity, _, value = text.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if quantity not in get_args(Quantity) or not 0 < limit < math.inf:
            raise ValueError(
                f"`budget` (={text!r}) must be 'macs=', 'params=', 'latency=' or 'error=' and a "
                "positive number, like 'macs=0.25'"
            )
        if quantity != "error" and limit > 1:
            raise ValueError(f"`budget` (={text!r}) is a share of the original's, at most 1")
        return cls(quantity, limit)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.quantity}={self.limit:g}"


@dataclass(frozen=True)
class Row:
    """What becomes of one convolution. Multiply-adds are per network input."""

    name: str
    form: Form | None
    """None keeps it as it is"""
    rank: int
    macs_before: float
    macs_after: float
    params_before: int
    params_after: int
    """weights, biases left out"""
    error: float | None
    """predicted divergence of the network's outputs that this layer alone causes; None unknown"""
    reason: str = ""
    """why it stays, where it does"""
    seconds_before: float | None = None
    seconds_after: float | None = None
    """measured alone, where the budget is a latency"""
    positions: tuple[float, float] = (0.0, 0.0)
    """input and output positions per network input"""
    shape: Shape | None = None
    """sizes; None for a transposed convolution"""


@dataclass(frozen=True)
class Plan:
    """What becomes of each convolution of a network, in the order in which they run."""

    rows: tuple[Row, ...]
    budget: str
    seed: int = 0
    seconds_before: float | None = None
    seconds_after: float | None = None
    """of the whole network, measured, where the budget is a latency"""

    @property
    def macs(self) -> float:
        """Share of the convolutions' multiply-adds that is left."""
        return _share(sum(r.macs_after for r in self.rows), sum(r.macs_before for r in self.rows))

    @property
    def params(self) -> float:
        """Share of the convolutions' weights that is left."""
        after, before = (r.params_after for r in self.rows), (r.params_before for r in self.rows)
        return _share(sum(after), sum(before))

    @property
    def error(self) -> float:
        """Predicted divergence of the outputs."""
        return sum(row.error or 0.0 for row in self.rows)

    def row(self, name: str) -> Row:
        """The row of a layer.

        Raises:
            KeyError: there is no such layer.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"the plan has no layer {name!r}")

    def edited(self, name: str, form: Form | None, rank: int = 0) -> Plan:
        """The plan with another form and rank for one layer; None as the form keeps it dense.

        Its predicted error and times become unknown (None).

        Raises:
            KeyError: there is no such layer.
            ValueError: the layer cannot have that form or rank.
        """
        old = self.row(name)
        shape = old.shape
        if form is None:
            new = dataclasses.replace(
                old,
                form=None,
                rank=0,
                macs_after=old.macs_before,
                params_after=old.params_before,
                error=0.0,
                reason="kept by hand",
                seconds_after=old.seconds_before,
            )
        else:
            if shape is None:
                raise ValueError(f"layer `{name}` is transposed and cannot be converted")
            if form not in FORMS:
                raise ValueError(f"`form` (={form!r}) must be one of {', '.join(FORMS)}")
            if not 1 <= rank <= exact_rank(form, shape):
                raise ValueError(
                    f"`rank` (={rank}) of layer `{name}` must lie in 1 to "
                    f"{exact_rank(form, shape)}, where the form is exact"
                )
            lead, rest = weights_per_position(form, shape, rank)
            new = dataclasses.replace(
                old,
                form=form,
                rank=rank,
                macs_after=lead * old.positions[0] + rest * old.positions[1],
                params_after=lead + rest,
                error=None,
                reason="",
                seconds_after=None,
            )
        rows = tuple(new if row is old else row for row in self.rows)
        return dataclasses.replace(self, rows=rows, seconds_after=None)

    def to_json(self) -> str:
        """The plan as JSON; `from_json` reads it back to an equal value."""
        return json.dumps({"separable_plan": 1, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON.

        Raises:
            ValueError: the text is not a plan.
        """
        try:
            fields = json.loads(text)
            if fields.pop("separable_plan") != 1:
                raise ValueError("its version is not 1")
            fields["rows"] = tuple(_row(row) for row in fields["rows"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"`text` is not a conversion plan: {error!r}") from error

    def __str__(self) -> str:
        timed = any(row.seconds_before is not None for row in self.rows)
        table = PrettyTable(
            ["layer", "form", "rank", "MACs before", "after", "params before", "after ", "error"]
            + ["ms before", "after  "] * timed
        )
        table.align = "r"
        table.align["layer"] = table.align["form"] = "l"
        for row in self.rows:
            cells = [row.name, row.form or f"dense: {row.reason}", row.rank or ""]
            cells += [f"{row.macs_before:,.0f}", f"{row.macs_after:,.0f}"]
            cells += [f"{row.params_before:,}", f"{row.params_after:,}"]
            cells += ["?" if row.error is None else f"{row.error:.2g}"]
            if timed:
                cells += [_milliseconds(row.seconds_before), _milliseconds(row.seconds_after)]
            table.add_row(cells)
        total = (
            f"{self.macs:.3f} of the convolutions' MACs, {self.params:.3f} of their parameters, "
            f"predicted output error {self.error:.2g}"
        )
        if self.seconds_before is not None and self.seconds_after is not None:
            total += (
                f", {1e3 * self.seconds_after:.2f} ms of {1e3 * self.seconds_before:.2f} ms "
                "for the whole network"
            )
        return f"{table}\n{total} (budget {self.budget})"


def _share(after: float, before: float) -> float:
    return after / before if before else 1.0


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}"


def _row(fields: dict[str, Any]) -> Row:
    shape, positions = fields.pop("shape"), fields.pop("positions")
    if fields["form"] is not None and fields["form"] not in FORMS:
        raise ValueError(f"unknown form {fields['form']!r}")
    return Row(
        **fields,
        positions=tuple(positions),
        shape=None if shape is None else Shape(*shape),
    )
