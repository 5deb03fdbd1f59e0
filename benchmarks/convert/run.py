"""Compare conversions at equal multiply-adds: `python -m benchmarks.convert.run --help`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import click
import torch
from prettytable import PrettyTable
from torch import nn

import separable
from separable.conversion.sites import divergence

from . import data, networks, rivals

OURS = "separable"


def cells(
    name: str, dataset: str, seed: int, folds: tuple[float, ...], count: int
) -> list[dict[str, Any]]:
    """One row per budget and method of one trained network."""
    train, _, inputs, labels = data.load(dataset)
    model = networks.trained(name, dataset, seed)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(100 + seed))
    calibration = train[chosen[:count]]
    original = networks.accuracy(model, inputs, labels)
    rows = []

    def row(method: str, fold: float, result: nn.Module, macs: float) -> None:
        score = networks.accuracy(result, inputs, labels)
        error = divergence(result, model, inputs.split(256))
        rows.append(
            {
                "network": name,
                "data": dataset,
                "seed": seed,
                "calibration": count,
                "fold": fold,
                "method": method,
                "macs": macs,
                "original": original,
                "accuracy": score,
                "kl": error,
            }
        )
        cell = f"{name} {dataset} {seed} {fold:g}x {method} ({1 / macs:.1f}x)"
        print(f"{cell}: {score:.2f} of {original:.2f} %, KL {error:.4f}", flush=True)

    for fold in folds:
        slim = separable.convert(model, calibration, f"macs={1 / fold}", progress=False)
        row(OURS, fold, slim, slim.report.plan.macs)
        for method, layer in rivals.RIVALS.items():
            result, renewed, macs = rivals.convert(model, calibration, 1 / fold, layer)
            if method == "network decoupling":
                row(f"{method}, batch norm kept", fold, result, macs)
            row(method, fold, renewed, macs)
    return rows


def table(rows: list[dict[str, Any]]) -> PrettyTable:
    """Mean accuracy and KL of each method, per data set and budget, and how often it is beaten."""
    result = PrettyTable(
        ["data", "budget", "method", "MACs", "points lost", "worst", "KL", "behind"]
    )
    keys = sorted({(r["data"], r["fold"]) for r in rows}, key=str)
    for dataset, fold in keys:
        here = [r for r in rows if (r["data"], r["fold"]) == (dataset, fold)]
        ours = {(r["network"], r["seed"]): r for r in here if r["method"] == OURS}
        for method in dict.fromkeys(r["method"] for r in here):
            mine = [r for r in here if r["method"] == method]
            lost = [r["original"] - r["accuracy"] for r in mine]
            behind = sum(r["kl"] > ours[r["network"], r["seed"]]["kl"] for r in mine)
            kl = sum(r["kl"] for r in mine) / len(mine)
            mean = sum(lost) / len(lost)
            result.add_row(
                [
                    *(
                        dataset,
                        f"1/{fold:g}",
                        method,
                        f"{sum(r['macs'] for r in mine) / len(mine):.3f}",
                    ),
                    *(f"{mean:.2f}", f"{max(lost):.2f}", f"{kl:.4f}"),
                    "" if method == OURS else f"{behind} of {len(mine)}",
                ]
            )
    return result


@click.command()
@click.option("--network", "names", multiple=True, default=networks.NETWORKS)
@click.option("--data", "datasets", multiple=True, default=data.SETS)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2))
@click.option("--fold", "folds", multiple=True, type=float, default=(4.0, 7.0, 14.0))
@click.option("--inputs", "count", default=512, help="calibration inputs")
@click.option("--threads", default=1)
@click.option("--out", type=Path, default=Path("runs/convert/results.json"))
def main(
    names: tuple[str, ...],
    datasets: tuple[str, ...],
    seeds: tuple[int, ...],
    folds: tuple[float, ...],
    count: int,
    threads: int,
    out: Path,
) -> None:
    """Train the networks where they are not cached, convert them, print a table, write JSON."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message=".*positions; more calibration")
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for dataset in datasets:
            for name in names:
                rows += cells(name, dataset, seed, folds, count)
                out.parent.mkdir(parents=True, exist_ok=True)
                versions = {"torch": torch.__version__, "separable": separable.__version__}
                out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
