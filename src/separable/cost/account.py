"""The values of the account: the cost of an operator, of a module and of a network."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from prettytable import PrettyTable, TableStyle

from ..limits import whole_number

Format = Literal["table", "json", "csv", "markdown", "html"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one or several operators cost; costs add up.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products, by their definition:
            output elements × (in_channels / groups) × kernel volume. Padding zeros count.
        macs_without_padding: the same without the products with a padding zero and, for a
            transposed convolution, without the products that its padding crops.
        backward_macs: multiply-accumulates of the backward pass. The gradient of a bilinear
            operator in either operand sums over the index set of the operator itself, so each
            operand that needs a gradient costs `macs` once more.
        bias_adds: additions of a bias.
        elementwise: results of pointwise operators, one per element and operator; 3 per element
            for a softmax; one per input element for a reduction.
        norm: operations of normalisations: 2 per element where the statistics are fixed (they fold
            into one multiply and one add), else 5, and 2 more for scale and shift.
        pool: window taps of poolings and of interpolations; one per input element for a mean.
        traffic_bytes: compulsory traffic: each input, weight and output of each operator once, in
            its dtype. Views are free.
    """

    macs: int = 0
    macs_without_padding: int = 0
    backward_macs: int = 0
    bias_adds: int = 0
    elementwise: int = 0
    norm: int = 0
    pool: int = 0
    traffic_bytes: int = 0

    @property
    def flops(self) -> int:
        """Floating point operations: 2 × `macs` and one for each of the other operations."""
        return 2 * self.macs + self.bias_adds + self.elementwise + self.norm + self.pool

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: MACs per byte of compulsory traffic."""
        return self.macs / self.traffic_bytes if self.traffic_bytes else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost))
        )


@dataclass(frozen=True, kw_only=True)
class Row(Cost):
    """The cost of one module with all that is below it.

    Attributes:
        name: dotted name of the module, "" for the network itself.
        kind: name of its class.
        calls: how often it was called; 0 for a container that only holds others.
        output_shape: shape of its first output tensor at its first call, None where it was not
            called or returned none.
        params: learnable and frozen parameters of the module and of those below it, shared once.
        own: cost of the operators that the module calls itself, outside of its children.
    """

    name: str
    kind: str
    calls: int
    output_shape: tuple[int, ...] | None
    params: int
    own: Cost

    @property
    def depth(self) -> int:
        """Containers around the module: 0 for the network itself."""
        return self.name.count(".") + 1 if self.name else 0


@dataclass(frozen=True, kw_only=True)
class Account(Cost):
    """The cost of a network at one input shape; printing it draws the table.

    All figures are exact integers under the conventions of `Cost`, for one forward pass over the
    given inputs, the whole batch.

    Attributes:
        rows: one `Row` per module, in execution order, each container before its children.
        params: parameters, shared ones once; packed weights of quantised modules are none.
        trainable_params: those with `requires_grad`.
        param_bytes: bytes of all parameters, each in its dtype.
        peak_activation_bytes: largest sum of activations alive at once in an inference pass, where
            an activation lives from the operator that makes it to the last one that reads it, the
            inputs from the start and the outputs to the end. Parameters and buffers are left out.
        saved_for_backward_bytes: bytes that autograd keeps from the forward for the backward pass,
            parameters and buffers left out; 0 where gradients were not recorded.
        unknown: names of the operators without a formula. Where there are any, every figure is a
            lower bound.
        input_shapes: shapes of the input tensors.
        output_shapes: shapes of the output tensors.
    """

    rows: tuple[Row, ...]
    params: int
    trainable_params: int
    param_bytes: int
    peak_activation_bytes: int
    saved_for_backward_bytes: int
    unknown: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]

    @property
    def is_lower_bound(self) -> bool:
        """Whether an operator had no formula, so that the true figures are larger."""
        return bool(self.unknown)

    def to_dict(self) -> dict[str, Any]:
        """All figures and rows as plain Python values, ready for JSON."""
        figures = asdict(self)
        rows = figures.pop("rows")
        derived = {
            "flops": self.flops,
            "intensity": self.intensity,
            "is_lower_bound": self.is_lower_bound,
        }
        return {**figures, **derived, "conventions": CONVENTIONS, "rows": rows}

    def to_string(self, format: Format = "table", *, depth: int | None = None) -> str:
        """Draw the account.

        Args:
            format: "table" (text), "json", "csv" (the rows, bare numbers), "markdown" or "html".
            depth: how many levels of modules to show; None shows all.

        Raises:
            TypeError: `depth` is no whole number.
            ValueError: `format` is not one of these, or `depth` is negative.
        """
        check_format(format)
        if depth is not None:
            whole_number("depth", depth, least=0)
        if format == "json":
            return json.dumps(self.to_dict(), indent=2)
        rows = [row for row in self.rows if depth is None or row.depth <= depth]
        if format == "csv":
            return draw(_plain_table(rows), format)
        tables = self._modules_table(rows), self._totals_table()
        return "\n\n".join([*(draw(table, format) for table in tables), *self._remarks()])

    def _modules_table(self, rows: list[Row]) -> PrettyTable:
        table = PrettyTable(
            ["Module", "Type", "Output", "Parameters", "MACs", "Share", "Other ops", "Traffic (B)"]
        )
        table.align = "r"
        table.align["Module"] = table.align["Type"] = table.align["Output"] = "l"
        for row in rows:
            leaf = row.name.rpartition(".")[2] or "(network)"
            kind = row.kind + (f" ×{row.calls}" if row.calls > 1 else "")
            table.add_row(
                [
                    "  " * row.depth + leaf,
                    kind,
                    "×".join(map(str, row.output_shape)) if row.output_shape else "",
                    f"{row.params:,}",
                    f"{row.macs:,}",
                    f"{row.macs / self.macs:.1%}" if self.macs else "",
                    f"{row.flops - 2 * row.macs:,}",
                    f"{row.traffic_bytes:,}",
                ]
            )
        return table

    def _totals_table(self) -> PrettyTable:
        bound = ">= " if self.is_lower_bound else ""
        table = PrettyTable(["Total", "Figure", "Convention"])
        table.align = "l"
        table.align["Figure"] = "r"
        for name, convention in CONVENTIONS.items():
            value = getattr(self, name)
            figure = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
            exact = name.endswith("params") or name == "param_bytes"
            table.add_row([name, figure if exact else bound + figure, convention])
        return table

    def _remarks(self) -> list[str]:
        if not self.unknown:
            return []
        names = ", ".join(self.unknown)
        return [f"Lower bound (>=): no formula for {names}; separable.cost.formula adds one."]

    def __str__(self) -> str:
        return self.to_string()

    def _repr_html_(self) -> str:
        return self.to_string("html")


def _plain_table(rows: list[Row]) -> PrettyTable:
    """Names and bare numbers, for programs to read."""
    columns = ["name", "kind", "calls", "params", *Cost.__dataclass_fields__, "flops"]
    table = PrettyTable([*columns, "output_shape"])
    for row in rows:
        shape = "x".join(map(str, row.output_shape or ()))
        table.add_row([*(getattr(row, column) for column in columns), shape])
    return table


CONVENTIONS = {
    "params": "parameters, shared ones once",
    "trainable_params": "those with requires_grad",
    "param_bytes": "parameters × bytes of their dtype",
    "macs": "multiply-adds of convolutions and matrix products, padding zeros included",
    "macs_without_padding": "the same without products with a padding zero",
    "backward_macs": "macs once more per operand that needs a gradient",
    "bias_adds": "one per element that a bias is added to",
    "elementwise": "one per result of a pointwise operator; softmax 3; reductions per input",
    "norm": "per element: 2 with fixed statistics, else 5, and 2 for scale and shift",
    "pool": "window taps of poolings and interpolations; means per input",
    "flops": "2 × macs + bias_adds + elementwise + norm + pool",
    "traffic_bytes": "each operator's inputs, weights and outputs once, in their dtype",
    "intensity": "macs / traffic_bytes",
    "peak_activation_bytes": "activations alive at once in an inference pass, by live ranges",
    "saved_for_backward_bytes": "activations that autograd keeps for the backward pass",
}


def check_format(format: str) -> None:
    """Raise a ValueError where `format` is not one that tables can be drawn in."""
    if format not in get_args(Format):
        raise ValueError(f"`format` (={format!r}) must be one of {', '.join(get_args(Format))}")


def _in_a_row(cell: Any, format: Format) -> Any:
    """A cell without line breaks, tabs and terminal codes, which names of modules may have."""
    if not isinstance(cell, str):
        return cell
    text = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in cell
    )
    return text.replace("|", r"\|") if format == "markdown" else text


def draw(table: PrettyTable, format: Format) -> str:
    """Draw a table as text, CSV, markdown or HTML; what would break a row is escaped."""
    rows = [[_in_a_row(cell, format) for cell in row] for row in table.rows]
    table = table.copy()
    table.clear_rows()
    table.add_rows(rows)
    if format == "csv":
        return str(table.get_csv_string(lineterminator="\n")).rstrip("\n")
    if format == "html":
        return str(table.get_html_string())
    table.set_style(TableStyle.MARKDOWN if format == "markdown" else TableStyle.DEFAULT)
    return str(table.get_string())
