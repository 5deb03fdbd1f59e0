"""The values of a measurement: times, their spread and ratios, peak memory, and on what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from prettytable import PrettyTable

from .account import Format, check_format, draw


@dataclass(frozen=True)
class LayerTime:
    """The time of one module in one forward pass, in seconds, medians over the repeats.

    Attributes:
        name: dotted name of the module, "" for the network itself.
        kind: name of its class.
        calls: how often it is called in a pass; its times are those of all calls together.
        inclusive: time between entering and leaving it.
        own: the same without the time in the modules that it calls.
    """

    name: str
    kind: str
    calls: int
    inclusive: float
    own: float


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of pairwise ratios of two measurements taken in turn."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Measurement:
    """Latency and peak memory of a forward pass, and what they were measured on.

    Attributes:
        times: seconds per pass, one figure per repeat.
        peak_memory_bytes: most memory that a pass holds at once beyond what was there before it:
            activations, output and workspace, without parameters and inputs. As PyTorch's
            allocator reports it: what a library takes past the allocator is missing. None on
            devices other than CPU and CUDA.
        threads: threads that an operator of PyTorch may use.
        device: name of the processor.
        dtype: floating dtypes of the parameters, of the inputs where there are none.
        versions: of Python, PyTorch, `separable`, and CUDA where it was used.
        layers: one `LayerTime` per called module in execution order; empty unless asked for.
    """

    times: tuple[float, ...]
    peak_memory_bytes: int | None
    threads: int
    device: str
    dtype: str
    versions: Mapping[str, str]
    layers: tuple[LayerTime, ...] = ()

    @property
    def median(self) -> float:
        """Median seconds per pass."""
        return float(np.median(self.times))

    @property
    def iqr(self) -> float:
        """Interquartile range of the seconds per pass."""
        low, high = np.percentile(self.times, (25, 75))
        return float(high - low)

    def ratio_to(self, other: Measurement) -> Ratio:
        """Divide these times by those of `other`, repeat by repeat.

        Raises:
            ValueError: the two were not measured in turn, with the same number of repeats.
        """
        if len(self.times) != len(other.times):
            raise ValueError(
                f"`other` (={len(other.times)} repeats) must have as many repeats as this "
                f"measurement (={len(self.times)}); take both with measure_interleaved"
            )
        ratios = np.divide(self.times, other.times)
        return Ratio(*map(float, np.percentile(ratios, (50, 25, 75))))

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain Python values, ready for JSON; times in seconds."""
        return {"median": self.median, "iqr": self.iqr, **asdict(self)}

    def to_string(self, format: Format = "table") -> str:
        """Draw the measurement as "table" (text), "json", "csv", "markdown" or "html".

        CSV is the table of the layers where they were measured, else that of the totals.

        Raises:
            ValueError: `format` is none of these.
        """
        check_format(format)
        if format == "json":
            return json.dumps(self.to_dict(), indent=2)
        tables = [self._totals_table()]
        if self.layers:
            tables.insert(0, self._layers_table())
        if format == "csv":
            tables = tables[:1]
        return "\n\n".join(draw(table, format) for table in tables)

    def _totals_table(self) -> PrettyTable:
        table = PrettyTable(["Measured", "Figure"], align="l")
        spread = f"median of {len(self.times)}, IQR {_duration(self.iqr)}"
        table.add_row(["latency", f"{_duration(self.median)} ({spread})"])
        memory = self.peak_memory_bytes
        table.add_row(["peak memory", "unknown" if memory is None else f"{memory:,} B"])
        table.add_row(["threads", self.threads])
        table.add_row(["device", self.device])
        table.add_row(["dtype", self.dtype])
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        table.add_row(["versions", versions])
        return table

    def _layers_table(self) -> PrettyTable:
        table = PrettyTable(["Module", "Type", "Calls", "Inclusive (ms)", "Own (ms)", "Share"])
        for name in table.field_names:
            table.align[name] = "l" if name in ("Module", "Type") else "r"
        whole = sum(layer.own for layer in self.layers)
        for layer in self.layers:
            table.add_row(
                [
                    layer.name or "(network)",
                    layer.kind,
                    layer.calls,
                    f"{1e3 * layer.inclusive:.3f}",
                    f"{1e3 * layer.own:.3f}",
                    f"{layer.own / whole:.1%}",
                ]
            )
        return table

    def __str__(self) -> str:
        return self.to_string()

    def _repr_html_(self) -> str:
        return self.to_string("html")


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
