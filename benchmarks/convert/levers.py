"""What each lever of the method does: `python -m benchmarks.convert.levers --help`."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor, nn

import separable
from separable.conversion import applying, fitting, following, refining, sensitivity, sites, varying
from separable.conversion.calibration import Inputs
from separable.conversion.sensitivity import divergence

from . import data, networks, tables
from .run import calibrated, made, write

RESULTS = Path("benchmarks/results/convert_levers.json")
Patch = tuple[Any, str, Any]


def _own_inputs(original: nn.Module, _: nn.Module, *rest: Any) -> Any:
    return sites.Runs(original, original, *rest)


def _tempered(surprise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda output, generator: surprise(output / 4, generator)


class _Unfollowed(following._Follower):
    """Follows nothing: what counts are the layers' own outputs."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def _plain(batch: Tensor, *_: Any) -> Tensor:
    return batch


FIT: dict[str, list[Patch]] = {
    "fitted once, as it is": [],
    "inputs from the original network": [(applying, "Runs", _own_inputs)],
    "outputs weighted alike (no Fisher)": [(fitting, "BLEND", 1.0)],
    "Fisher information of outputs over 4": [
        (sensitivity, "_surprise", _tempered(sensitivity._surprise))
    ],
    "ridge 10⁻²": [(fitting, "RIDGE", 1e-2)],
    "fit without variations": [(varying, "ENOUGH", 1)],
    "four variations of each": [(varying, "ENOUGH", 5 * 512)],
    "variations without boxes": [(varying, "_boxed", _plain)],
    "what follows unknown": [(following.Sequel, "matters", False), (applying, "ROUNDS", 0)],
    "outputs never free": [(applying, "ROUNDS", 0)],
    "outputs free in four rounds": [(applying, "ROUNDS", 4)],
}
"""levers of the fit, without the last pass"""
LAST: dict[str, list[Patch]] = {
    "last pass, as it is": [],
    "the inputs themselves": [(refining, "varied", _plain)],
    "errors of the layers' own outputs": [(following, "_Follower", _Unfollowed)],
    "without the layers' errors": [(refining, "LAYERS", 0.0)],
    "ten times the layers' errors": [(refining, "LAYERS", 3.0)],
    "temperature 1": [(refining, "TEMPERATURE", 1.0)],
    "rate 0.01": [(refining, "RATE", 0.01)],
    "rate 0.04": [(refining, "RATE", 0.04)],
    "300 steps": [(refining, "STEPS", 300)],
    "1200 steps": [(refining, "STEPS", 1200), (refining, "WORK", 2e12)],
}
"""levers of the last pass, each from the network that was fitted as it is"""
LEVERS = (*FIT, *LAST)


def _with(patches: list[Patch]) -> ExitStack:
    stack = ExitStack()
    for patch in patches:
        stack.enter_context(mock.patch.object(*patch))
    return stack


def tried(
    model: nn.Module, given: Tensor, fold: float, levers: Collection[str]
) -> Iterator[tuple[str, nn.Module]]:
    """The network that comes out with each of the named levers."""
    inputs = Inputs(given, model)
    plan = separable.plan(model, given, f"macs={1 / fold}", progress=False)
    start, _ = applying.fitted(model, plan, inputs, progress=False)
    for name, patches in FIT.items():
        if name in levers:
            with _with(patches):
                yield name, applying.fitted(model, plan, inputs, False)[0] if patches else start
    macs = sum(row.macs_before + 3 * row.macs_after for row in plan.rows)
    for name, patches in LAST.items():
        if name in levers:
            with _with(patches):
                better = refining.refined(start, model, inputs, macs, plan.seed, progress=False)
            yield name, start if better is None else better


def table(rows: list[dict[str, Any]]) -> str:
    """Points lost and KL divergence, a line per lever and a column per network and budget."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    found = {(row["lever"], row["cell"]): row for row in rows}
    lines = [
        [lever, *(_entry(found.get((lever, cell))) for cell in cells)]
        for lever in LEVERS
        if any((lever, cell) in found for cell in cells)
    ]
    return tables.grid(["lever", *cells], lines)


def _entry(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{tables.lost(row):.2f}, {row['kl']:.4f}"


@click.command()
@click.option("--network", "names", multiple=True, default=("vgg",))
@click.option("--data", "dataset", default="digits")
@click.option("--fold", "folds", multiple=True, type=float, default=(7.0, 14.0))
@click.option("--inputs", "count", default=512, help="calibration inputs")
@click.option("--lever", "levers", multiple=True, default=LEVERS)
@click.option("--out", type=Path, default=RESULTS)
def main(
    names: tuple[str, ...],
    dataset: str,
    folds: tuple[float, ...],
    count: int,
    levers: tuple[str, ...],
    out: Path,
) -> None:
    """Measure levers on the networks of seed 0, print a table and write JSON.

    Rows that the file has are not measured again; delete it to start afresh.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*positions; more calibration")
    _, _, inputs, labels = data.load(dataset)
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    for name, fold in itertools.product(names, folds):
        cell = f"{name}, {dataset}, {fold:g}x"
        here = [row for row in rows if (row["cell"], row["calibration"]) == (cell, count)]
        missing = set(levers) - {row["lever"] for row in here}
        if not missing:
            continue
        model = networks.trained(name, dataset, 0)
        original = networks.accuracy(model, inputs, labels)
        for lever, result in tried(model, calibrated(dataset, 0, count), fold, missing):
            rows.append(
                {
                    "cell": cell,
                    "calibration": count,
                    "lever": lever,
                    "original": original,
                    "accuracy": networks.accuracy(result, inputs, labels),
                    "kl": divergence(result, model, inputs.split(256)),
                    **made(),
                }
            )
            write(out, rows)
    for count in sorted({row["calibration"] for row in rows}, reverse=True):
        print(f"\n{count} calibration inputs\n")
        print(table([row for row in rows if row["calibration"] == count]))


if __name__ == "__main__":
    main()
