"""The plan of a conversion: a frozen value that prints, saves as JSON and may be edited."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from prettytable import PrettyTable

from ..limits import whole_number
from ..outputs import Outputs, check_outputs
from .forms import FORMS, Form, Shape, exact_rank, weights_per_position

Quantity = Literal["macs", "params", "latency", "error"]
STAYING = 4
"""layers that stay dense which an error names"""


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
    """weights and biases, less what a layer before it holds too; a converted layer has a bias"""
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
    geometry: str = ""
    """kernel size, stride, padding, dilation and padding mode; empty where not known"""

    def __post_init__(self) -> None:
        where = f" of layer `{self.name}`"
        for key in ("name", "reason", "geometry"):
            _check_kind(f"`{key}`{where}", getattr(self, key), str)
        for key in ("rank", "params_before", "params_after"):
            number = whole_number(key, getattr(self, key), least=0, where=where)
            object.__setattr__(self, key, number)  # of Python, for JSON
        for key in ("macs_before", "macs_after"):
            _check_kind(f"`{key}`{where}", getattr(self, key), float)
        if self.error is not None:  # rounding may take it below 0
            size = abs(self.error) if isinstance(self.error, float) else self.error
            _check_kind(f"`error`{where}", size, float)
        for key in ("seconds_before", "seconds_after"):
            if getattr(self, key) is not None:
                _check_kind(f"`{key}`{where}", getattr(self, key), float)
        for positions in self.positions:
            _check_kind(f"`positions`{where}", positions, float)
        for size in self.shape or ():
            whole_number("shape", size, least=1, where=where)
        if self.form is None:
            return
        if self.shape is None:
            raise ValueError(f"layer `{self.name}` is transposed and cannot be converted")
        if self.form not in FORMS:
            raise ValueError(f"`form` (={self.form!r}) must be one of {', '.join(FORMS)}")
        if not 1 <= self.rank <= exact_rank(self.form, self.shape):
            raise ValueError(
                f"`rank` (={self.rank}){where} must lie in 1 to "
                f"{exact_rank(self.form, self.shape)}, where the form is exact"
            )


@dataclass(frozen=True)
class Plan:
    """What becomes of each convolution of a network, in the order in which they run."""

    rows: tuple[Row, ...]
    budget: str
    seed: int = 0
    seconds_before: float | None = None
    seconds_after: float | None = None
    """of the whole network, measured, where the budget is a latency"""
    outputs: Outputs = "auto"
    """what the network's outputs are taken for: logits, values, or what their shape says"""

    def __post_init__(self) -> None:
        _check_kind("`budget`", self.budget, str)
        object.__setattr__(self, "seed", check_seed(self.seed))
        check_outputs(self.outputs)
        for key in ("seconds_before", "seconds_after"):
            if getattr(self, key) is not None:
                _check_kind(f"`{key}`", getattr(self, key), float)
        names = [row.name for row in self.rows]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"layer `{name}` has {names.count(name)} rows; leave one")

    @property
    def macs(self) -> float:
        """Share of the convolutions' multiply-adds that is left."""
        return _share(sum(r.macs_after for r in self.rows), sum(r.macs_before for r in self.rows))

    @property
    def params(self) -> float:
        """Share of the convolutions' weights and biases that is left."""
        after, before = (r.params_after for r in self.rows), (r.params_before for r in self.rows)
        return _share(sum(after), sum(before))

    @property
    def error(self) -> float | None:
        """Predicted divergence of the outputs; None where that of a layer is unknown."""
        known = [row.error for row in self.rows if row.error is not None]
        return sum(known) if len(known) == len(self.rows) else None

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

        A dense layer causes no error and takes the time that it took; those of another form
        are unknown (None), and so is the time of the whole network.

        Raises:
            KeyError: there is no such layer.
            TypeError: the rank is no whole number.
            ValueError: the layer cannot have that form or rank.
        """
        old = self.row(name)
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
            changed = dataclasses.replace(
                old, form=form, rank=rank, error=None, reason="", seconds_after=None
            )
            new = _priced(changed)
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
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
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
            f"predicted output error {'unknown' if self.error is None else f'{self.error:.2g}'}"
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
    shape, (before, after) = fields.pop("shape"), fields.pop("positions")
    shape = None if shape is None else Shape(*shape)
    return _priced(Row(**fields, positions=(before, after), shape=shape))


def _priced(row: Row) -> Row:
    """The row with the costs that follow from its form, rank and positions."""
    before, after, params = row.macs_before, row.macs_before, row.params_before
    if row.shape is not None:
        before = after = math.prod(row.shape) * row.positions[1]
    if row.form is not None and row.shape is not None:
        lead, rest = weights_per_position(row.form, row.shape, row.rank)
        after = lead * row.positions[0] + rest * row.positions[1]
        params = lead + rest + row.shape.groups * row.shape.outputs
    return dataclasses.replace(row, macs_before=before, macs_after=after, params_after=params)


def _check_kind(what: str, value: Any, kind: type) -> None:
    """See that a value is a string, or a finite number from 0."""
    given = f"{what} (={value!r})"
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise TypeError(f"{given} must be {'a string' if kind is str else 'a number'}")
    if isinstance(value, (int, float)) and not 0 <= value < math.inf:
        raise ValueError(f"{given} must be finite and not negative")


def unmet(goal: Budget, nearest: str, reasons: Mapping[str, str]) -> ValueError:
    """The error of a budget, with the nearest that can be met and why layers stay dense."""
    stay = ", ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:STAYING])
    more = ", ..." if len(reasons) > STAYING else ""
    return ValueError(
        f"`budget` (='{goal}') cannot be met; the nearest one that can be is '{nearest}'"
        + (f", as some layers stay dense ({stay}{more})" if stay else "")
    )


def check_seed(seed: Any) -> int:
    """See that a seed is one that torch takes, and return it as an int.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of range.
    """
    return whole_number("seed", seed, -(2**63), 2**64 - 1)
