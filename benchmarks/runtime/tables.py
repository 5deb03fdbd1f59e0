"""Print the table of the README: `python benchmarks/runtime/tables.py [RESULTS.json]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from prettytable import PrettyTable, TableStyle

OWN = "separable"


def row(result: dict[str, Any]) -> list[str]:
    """A network, how it was run, and how `separable` stands against the others."""
    timings = {t["runtime"]: t for t in result["timings"] if t["median"]}
    own = timings.pop(OWN)
    best = min(timings.values(), key=lambda t: t["median"])
    eager = timings.get("eager")
    return [
        result["network"].partition(":")[2],
        str(result["input_size"][0]),
        str(result["threads"]),
        f"{own['median']:.2f} ({own['low']:.2f} to {own['high']:.2f})",
        f"{best['median']:.2f} ({best['low']:.2f} to {best['high']:.2f})",
        best["runtime"],
        f"{best['median'] / own['median']:.2f}x",
        f"{eager['median'] / own['median']:.1f}x" if eager else "",
        f"{peak_share(result, own):.0%}",
    ]


def peak_share(result: dict[str, Any], own: dict[str, Any]) -> float:
    """Of the multiply-add peak; in results of before 28 November 2026 of its best burst."""
    if "peak_share" in result:
        return float(result["peak_share"])
    return 2e-6 * result["macs"] / own["best"] / result["peak_gflops"] / result["threads"]


def main() -> None:
    """Print the results, losing rows included, and what they hold for."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/networks.json")
    results = json.loads(path.read_text())
    table = PrettyTable(
        [
            *("network", "batch", "threads", "separable (ms)", "best other (ms)", "which"),
            *("against it", "against eager", "of the peak"),
        ]
    )
    table.set_style(TableStyle.MARKDOWN)
    table.align = "r"
    table.align["network"] = table.align["which"] = "l"
    table.add_rows([row(result) for result in results])
    print(table)
    print(results[0]["conditions"])
    print({t["runtime"]: t["version"] for t in results[0]["timings"]})


if __name__ == "__main__":
    main()
