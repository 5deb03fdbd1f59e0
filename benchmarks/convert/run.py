"""Compare conversions at equal multiply-adds: `python -m benchmarks.convert.run --help`."""

from __future__ import annotations

import datetime
import itertools
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import tensorly
import torch
from torch import Tensor, nn

import separable
from separable.conversion.applying import finished, fitted
from separable.conversion.calibration import Inputs
from separable.conversion.sensitivity import divergence
from separable.conversion.sites import trace
from separable.cost.measuring import device_name

from . import data, networks, rivals, tables

RESULTS = Path("benchmarks/results/convert.json")
KEYS = ("network", "data", "seed", "calibration", "fold")


def calibrated(dataset: str, seed: int, count: int) -> Tensor:
    """The unlabelled calibration inputs of a seed, drawn from the training part."""
    train = data.load(dataset)[0]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(100 + seed))
    return train[order[:count]]


def ours(model: nn.Module, given: Tensor, fold: float) -> Iterator[tuple[str, nn.Module, float]]:
    """The conversion without its last pass, and with it, as `separable.convert` gives it."""
    inputs = Inputs(given, model)
    plan = separable.plan(model, given, f"macs={1 / fold}", progress=False)
    sites = trace(model, inputs.first, inputs)
    once, report = fitted(model, plan, sites, inputs, progress=False)
    yield tables.ONCE, once, plan.macs
    yield tables.OURS, finished(once, report, model, inputs, progress=False)[0], plan.macs


def theirs(
    model: nn.Module, given: Tensor, fold: float, methods: list[str]
) -> Iterator[tuple[str, nn.Module, float]]:
    """Each rival, with batch-norm statistics re-estimated; one of them without that too."""
    inputs = Inputs(given, model)
    sites, moments = rivals.seen(model, inputs)
    for method in methods:
        result, renewed, macs = rivals.convert(
            model, inputs, sites, moments, 1 / fold, rivals.RIVALS[method]
        )
        if method == "network decoupling":
            yield tables.KEPT, result, macs
        yield method, renewed, macs


def measured(cell: tuple[Any, ...], have: set[str], methods: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each method that a cell has not yet."""
    name, dataset, seed, count, fold = cell
    _, _, inputs, labels = data.load(dataset)
    model = networks.trained(name, dataset, seed)
    given = calibrated(dataset, seed, count)
    original = networks.accuracy(model, inputs, labels)
    missing = [method for method in methods if method not in have]
    found = theirs(model, given, fold, missing) if missing else iter(())
    start = time.perf_counter()
    mine = iter(()) if tables.OURS in have else ours(model, given, fold)
    for method, result, macs in itertools.chain(mine, found):
        if method in have:
            continue  # the last run ended between ours
        yield {
            **dict(zip(KEYS, cell, strict=True)),
            "method": method,
            "macs": macs,
            "original": original,
            "accuracy": networks.accuracy(result, inputs, labels),
            "kl": divergence(result, model, inputs.split(256)),
            **made(),
        }
    print(f"{cell}: {time.perf_counter() - start:.0f} s", flush=True)


def made() -> dict[str, Any]:
    """Where and when a row is measured."""
    versions = {module.__name__: module.__version__ for module in (torch, tensorly, separable)}
    return {
        **versions,
        "threads": torch.get_num_threads(),
        "device": device_name(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    partial.replace(path)


@click.command()
@click.option("--network", "names", multiple=True, default=networks.NETWORKS)
@click.option("--data", "datasets", multiple=True, default=data.SETS)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2))
@click.option("--fold", "folds", multiple=True, type=float, default=(4.0, 7.0, 14.0))
@click.option("--inputs", "count", default=512, help="calibration inputs")
@click.option("--rival", "methods", multiple=True, default=tuple(rivals.RIVALS))
@click.option("--alone", is_flag=True, help="without the rivals")
@click.option("--threads", default=1)
@click.option("--out", type=Path, default=RESULTS)
def main(
    names: tuple[str, ...],
    datasets: tuple[str, ...],
    seeds: tuple[int, ...],
    folds: tuple[float, ...],
    count: int,
    methods: tuple[str, ...],
    alone: bool,
    threads: int,
    out: Path,
) -> None:
    """Convert the networks (trained first where they are not cached), and write JSON.

    Rows that the file has are not measured again; delete it to start afresh. Print its tables
    with `python -m benchmarks.convert.tables`.
    """
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message=".*positions; more calibration")
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    cells = [(n, d, s, count, f) for s in seeds for d in datasets for n in names for f in folds]
    for cell in cells:
        have = {row["method"] for row in rows if tuple(row[key] for key in KEYS) == cell}
        for row in measured(cell, have, [] if alone else list(methods)):
            rows.append(row)
            write(out, rows)


if __name__ == "__main__":
    main()
