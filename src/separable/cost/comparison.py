"""The comparison: a regular network and its separable form, metric by metric."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from prettytable import PrettyTable
from torch import nn

from ..wording import counted
from .account import CONVENTIONS, Account, Format, check_format, draw
from .counting import count, unwrap
from .inputs import DTypes, Sizes, make_inputs
from .measurement import Measurement
from .measuring import measure_interleaved

COUNTED = (
    "params",
    "macs",
    "macs_without_padding",
    "backward_macs",
    "flops",
    "traffic_bytes",
    "intensity",
    "peak_activation_bytes",
    "saved_for_backward_bytes",
)
MEASURED = {
    "latency": "measured, median seconds of a forward pass, both in turn",
    "peak_memory_bytes": "measured, most bytes held beyond parameters and inputs",
}


@dataclass(frozen=True)
class Comparison:
    """What a regular network and its separable form cost at the same inputs.

    Printing it draws a table with both figures, their ratio and the convention of each metric.

    Attributes:
        regular: account of the regular network.
        separable: account of the separable one.
        measured: the measurements of both in turn, None where nothing was measured.
    """

    regular: Account
    separable: Account
    measured: tuple[Measurement, Measurement] | None = None

    @property
    def figures(self) -> dict[str, tuple[float, float]]:
        """Both figures by metric: those of `COUNTED`, and "latency" in seconds and
        "peak_memory_bytes" where they were measured."""
        both = {
            name: (getattr(self.regular, name), getattr(self.separable, name)) for name in COUNTED
        }
        if self.measured is not None:
            one, other = self.measured
            both["latency"] = (one.median, other.median)
            if one.peak_memory_bytes is not None and other.peak_memory_bytes is not None:
                both["peak_memory_bytes"] = (one.peak_memory_bytes, other.peak_memory_bytes)
        return both

    @property
    def ratio(self) -> dict[str, float]:
        """Regular over separable by metric: above 1, the separable network needs less.

        The ratio of the latencies is the median of the pairwise ratios. Where both figures are 0
        it is 1, where only the separable one is, infinity.
        """
        ratios = {name: _ratio(*both) for name, both in self.figures.items()}
        if self.measured is not None:
            ratios["latency"] = self.measured[0].ratio_to(self.measured[1]).median
        return ratios

    @property
    def promise_kept(self) -> float | None:
        """Share of the promised saving that arrives: measured speed-up / MAC ratio.

        None where nothing was measured, or one of the networks has no MACs.
        """
        if self.measured is None or not (self.regular.macs and self.separable.macs):
            return None
        return self.ratio["latency"] / self.ratio["macs"]

    def to_dict(self) -> dict[str, Any]:
        """All figures, ratios and both accounts as plain Python values, ready for JSON."""
        ratios = self.ratio
        return {
            "metrics": {
                name: {
                    "regular": regular,
                    "separable": separable,
                    "ratio": ratios[name] if math.isfinite(ratios[name]) else None,
                    "convention": _convention(name),
                }
                for name, (regular, separable) in self.figures.items()
            },
            "promise_kept": self.promise_kept,
            "regular": self.regular.to_dict(),
            "separable": self.separable.to_dict(),
            "measured": self.measured and [each.to_dict() for each in self.measured],
        }

    def to_string(self, format: Format = "table") -> str:
        """Draw the comparison as "table" (text), "json", "csv", "markdown" or "html".

        Raises:
            ValueError: `format` is none of these.
        """
        check_format(format)
        if format == "json":
            return json.dumps(self.to_dict(), indent=2)
        if format == "csv":
            return draw(self._plain_table(), format)
        table = PrettyTable(["Metric", "Regular", "Separable", "Ratio", "Change", "Convention"])
        table.align = "r"
        table.align["Metric"] = table.align["Convention"] = "l"
        lower = [account.is_lower_bound for account in (self.regular, self.separable)]
        for name, ratio in self.ratio.items():
            bounds = lower if name in COUNTED and name != "params" else [False, False]
            figures = [
                ">= " * bound + _figure(name, value)
                for bound, value in zip(bounds, self.figures[name], strict=True)
            ]
            table.add_row([name, *figures, *_changes(ratio, *bounds), _convention(name)])
        return "\n\n".join([draw(table, format), *self._remarks()])

    def _plain_table(self) -> PrettyTable:
        """Names and bare numbers, for programs to read."""
        table = PrettyTable(["metric", "regular", "separable", "ratio"])
        for name, both in self.figures.items():
            table.add_row([name, *both, self.ratio[name]])
        return table

    def _remarks(self) -> list[str]:
        remarks = [
            f"Lower bound (>=): no formula for {', '.join(account.unknown)} of the {name} network; "
            "separable.cost.formula adds one."
            for name, account in (("regular", self.regular), ("separable", self.separable))
            if account.unknown
        ]
        if self.measured is None:
            return remarks
        one, other = self.measured
        speed_up = one.ratio_to(other)
        versions = ", ".join(f"{name} {version}" for name, version in one.versions.items())
        measured = (
            f"measured speed-up {speed_up.median:.2f}x (quartiles {speed_up.low:.2f} to "
            f"{speed_up.high:.2f}, {len(one.times)} repeats)"
        )
        if self.promise_kept is None:
            promise = f"No MACs in one of the networks, so no promise; {measured}."
        else:
            promise = (
                f"Share of the promise: {self.promise_kept:.0%}, {measured} of "
                f"{self.ratio['macs']:.2f}x fewer MACs."
            )
        return [
            *remarks,
            f"{promise}\n{one.device}, {counted(one.threads, 'thread')}, {one.dtype}, {versions}.",
        ]

    def __str__(self) -> str:
        return self.to_string()

    def _repr_html_(self) -> str:
        return self.to_string("html")


def check_same_outputs(accounts: Mapping[str, Account]) -> None:
    """See that networks return outputs of the same shapes for the same inputs.

    Args:
        accounts: of each, by the argument that it came from.

    Raises:
        ValueError: they do not.
    """
    shapes = {name: account.output_shapes for name, account in accounts.items()}
    if len(set(shapes.values())) > 1:
        told = " and ".join(f"`{name}` (output shapes {each})" for name, each in shapes.items())
        raise ValueError(f"{told} must map the same inputs to the same output shapes")


def compare(
    regular: nn.Module,
    separable: nn.Module,
    input_size: Sizes | None = None,
    *,
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    dtypes: DTypes | None = None,
    device: torch.device | str | None = None,
    latency: bool = True,
    repeats: int = 20,
    min_seconds: float = 1.0,
    threads: int | None = None,
) -> Comparison:
    """Compare a regular network with its separable form on the same inputs.

    Args:
        regular: the network of regular convolutions.
        separable: its separable form.
        input_size: shape of the input with its batch, such as `(1, 3, 224, 224)`, or a list of
            shapes for several inputs.
        inputs: instead of `input_size`, a tensor, or a tuple or list of positional arguments.
        kwargs: keyword arguments of the forward.
        dtypes: data type of what is made from `input_size`, as in `count`.
        device: device of what is made from `input_size`; that of `regular` by default.
        latency: whether to measure latency and peak memory, both networks in turn.
        repeats: number of times to take of each.
        min_seconds: least time to spend on the repeats of each together, in seconds.
        threads: threads that an operator of PyTorch may use; None leaves the present number.

    Returns:
        The comparison; printing it draws a table.

    Raises:
        TypeError: a network is not an `nn.Module` that runs in Python, or the inputs are missing.
        ValueError: the output shapes differ, or `latency` is asked for on the meta device.
        Exception: what a network itself raises on these inputs.
    """
    unwrap(regular, "regular")
    unwrap(separable, "separable")
    given = make_inputs(
        regular, input_size, inputs=inputs, kwargs=kwargs, dtypes=dtypes, device=device
    )
    accounts = [
        count(model, input_size, inputs=inputs, kwargs=kwargs, dtypes=dtypes, device=device)
        for model in (regular, separable)
    ]
    check_same_outputs({"regular": accounts[0], "separable": accounts[1]})
    measured = None
    if latency:
        one, other = measure_interleaved(
            [regular, separable],
            given.args,
            kwargs=given.kwargs,
            repeats=repeats,
            min_seconds=min_seconds,
            threads=threads,
        )
        measured = (one, other)
    return Comparison(accounts[0], accounts[1], measured)


def _ratio(regular: float, separable: float) -> float:
    if separable:
        return regular / separable
    return math.inf if regular else 1.0


def _changes(ratio: float, regular_bound: bool, separable_bound: bool) -> tuple[str, str]:
    """Ratio and relative change as shown, where a figure may be a lower bound."""
    if regular_bound and separable_bound:
        return "unknown", "unknown"
    mark, change = ">= " * regular_bound + "<= " * separable_bound, ""
    if ratio:
        change = "<= " * regular_bound + ">= " * separable_bound + f"{1 / ratio - 1:+.2%}"
    return mark + (f"{ratio:.2f}x" if math.isfinite(ratio) else "∞"), change


def _figure(name: str, value: float) -> str:
    if name == "latency":
        return f"{1e3 * value:.3f} ms"
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


def _convention(name: str) -> str:
    return {**CONVENTIONS, **MEASURED}[name]
