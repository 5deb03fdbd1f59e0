"""Print the tables of docs/convert.md: `python -m benchmarks.convert.tables [RESULTS.json]`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

OURS, ONCE = "separable", "separable, without the last pass"
EQUAL = 1.15  # a rival's rank is a whole number, so its multiply-adds are only about the budget's
KEPT = "network decoupling, batch norm kept"


def cell(row: Row) -> tuple[Any, ...]:
    """What a row's method is compared within."""
    return tuple(row[key] for key in ("network", "data", "seed", "calibration", "fold"))


def lost(row: Row) -> float:
    """Points of accuracy below the original."""
    return float(row["original"] - row["accuracy"])


def grid(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def by_network(rows: list[Row]) -> str:
    """Points lost on each network, each seed its own figure, and the mean KL divergence."""
    mine = [row for row in rows if row["method"] == OURS]
    folds = sorted({row["fold"] for row in mine})
    lines = []
    for dataset, network in sorted({(row["data"], row["network"]) for row in mine}):
        line = [f"{network}, {dataset}"]
        for fold in folds:
            here = [
                r for r in mine if (r["data"], r["network"], r["fold"]) == (dataset, network, fold)
            ]
            here.sort(key=lambda row: row["seed"])
            points = ", ".join(f"{row['seed']}: {lost(row):.2f}" for row in here)
            line.append(f"{points}; {_mean(here, lambda row: row['kl']):.4f}" if here else "")
        lines.append(line)
    return grid(["network", *(f"{fold:g}x" for fold in folds)], lines)


def by_method(rows: list[Row]) -> str:
    """Each method over the cells of ours in which it was measured, beside ours in those."""
    best = {cell(row): row for row in rows if row["method"] == OURS}
    lines = []
    for dataset, fold in sorted({(row["data"], row["fold"]) for row in rows}):
        here = [r for r in rows if (r["data"], r["fold"]) == (dataset, fold) and cell(r) in best]
        for method in dict.fromkeys(row["method"] for row in here):
            those = [row for row in here if row["method"] == method]
            ahead = sum(row["kl"] > best[cell(row)]["kl"] for row in those)
            lines.append(
                [
                    f"{dataset}, {fold:g}x",
                    method,
                    f"{_mean(those, lambda row: 1 / row['macs']):.1f}x",
                    f"{_mean(those, lost):.2f}",
                    f"{max(map(lost, those)):.2f}",
                    f"{_mean(those, lambda row: row['kl']):.4f}",
                    f"{_mean(those, lambda row: best[cell(row)]['kl']):.4f}",
                    f"{len(those)}" if method == OURS else f"{ahead} of {len(those)}",
                ]
            )
    head = ["", "method", "cut", "points lost", "worst", "KL", "separable's there", "ahead"]
    return grid(head, lines)


def standing(rows: list[Row], method: str, within: float = float("inf")) -> str:
    """How often no rival is ahead of a method, and its mean KL against the best rival's.

    Args:
        rows: of all methods.
        method: that is compared.
        within: only rivals count that have at most so many times the method's multiply-adds.
    """
    best = {cell(row): row for row in rows if row["method"] == method}
    against: dict[Any, float] = {}
    for row in rows:
        if row["method"] in (OURS, ONCE) or cell(row) not in best:
            continue
        if row["macs"] <= within * best[cell(row)]["macs"]:
            against[cell(row)] = min(row["kl"], against.get(cell(row), float("inf")))
    if not against:
        return "no rival measured"
    won = sum(best[key]["kl"] < kl for key, kl in against.items())
    ours = statistics.fmean(best[key]["kl"] for key in against)
    theirs = statistics.fmean(against.values())
    return (
        f"{method}: ahead of every rival in {won} of {len(against)} cells (network, data, budget, "
        f"seed); mean KL {ours:.4f}, of the best rival in each cell {theirs:.4f}: "
        f"{ours / theirs:.2f} of it"
    )


def _mean(rows: list[Row], value: Callable[[Row], float]) -> float:
    return statistics.fmean(map(value, rows))


def main() -> None:
    """Print the tables of the results, by number of calibration inputs."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/convert.json")
    found = json.loads(path.read_text())
    print({key: value for key, value in found.items() if key != "rows"})
    for count in sorted({row["calibration"] for row in found["rows"]}, reverse=True):
        rows = [row for row in found["rows"] if row["calibration"] == count]
        print(f"\n{count} calibration inputs\n")
        for method in (OURS, ONCE):
            print(standing(rows, method))
            print(f"at equal multiply-adds (up to {EQUAL}x): {standing(rows, method, EQUAL)}")
        print()
        print(by_network(rows), by_method(rows), sep="\n\n")


if __name__ == "__main__":
    main()
