"""What each lever of the method does: `python -m benchmarks.convert.levers --help`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor, nn

import separable
from separable.conversion import applying, fitting, refining, sites
from separable.conversion.sites import Inputs, divergence

from . import data, networks, tables
from .run import calibrated, write

RESULTS = Path("benchmarks/results/convert_levers.json")
Patch = tuple[Any, str, Any]


def _own_inputs(original: nn.Module, _: nn.Module, *rest: Any) -> Any:
    return sites.collect(original, original, *rest)


def _tempered(surprise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda output, generator: surprise(output / 4, generator)


FIT: dict[str, list[Patch]] = {
    "fitted once, as it is": [],
    "inputs from the original network": [(applying, "collect", _own_inputs)],
    "outputs weighted alike (no Fisher)": [(fitting, "BLEND", 1.0)],
    "a tenth of identity in the Fisher metric": [(fitting, "BLEND", 0.1)],
    "Fisher information of outputs over 4": [(sites, "_surprise", _tempered(sites._surprise))],
    "ridge 10⁻⁴": [(fitting, "RIDGE", 1e-4)],
    "ridge 10⁻²": [(fitting, "RIDGE", 1e-2)],
}
"""levers of the fit, without the last pass"""
AUGMENTED = "calibration inputs and as many blends"
LAST: dict[str, list[Patch]] = {
    "last pass, as it is": [],
    "without blends": [(refining, "BLENDED", 10**9)],
    "blends in every step": [(refining, "BLENDED", 1)],
    "without the layers' own errors": [(refining, "LAYERS", 0.0)],
    "ten times the layers' own errors": [(refining, "LAYERS", 10.0)],
    "temperature 1": [(refining, "TEMPERATURE", 1.0)],
    "rate 0.01": [(refining, "RATE", 0.01)],
    "rate 0.04": [(refining, "RATE", 0.04)],
    "100 steps": [(refining, "STEPS", 100)],
    "600 steps": [(refining, "STEPS", 600)],
}
"""levers of the last pass, each from the network that was fitted as it is"""


def _with(patches: list[Patch]) -> ExitStack:
    stack = ExitStack()
    for patch in patches:
        stack.enter_context(mock.patch.object(*patch))
    return stack


def tried(model: nn.Module, given: Tensor, fold: float) -> Iterator[tuple[str, nn.Module]]:
    """The network that comes out with each lever."""
    inputs = Inputs(given, model)

    def fitted(inputs: Tensor) -> tuple[nn.Module, separable.Plan]:
        plan = separable.plan(model, inputs, f"macs={1 / fold}", progress=False)
        found, _ = applying.run(model, plan, Inputs(inputs, model), None, False, refine=False)
        return found, plan

    generator = torch.Generator().manual_seed(0)
    blends = torch.cat(list(refining._draws(inputs, 1.0, generator, blend=True)))
    start, plan = fitted(given)
    yield next(iter(FIT)), start
    for name, patches in list(FIT.items())[1:]:
        with _with(patches):
            yield name, fitted(given)[0]
    yield AUGMENTED, fitted(torch.cat([given, blends]))[0]
    macs = sum(row.macs_before + 3 * row.macs_after for row in plan.rows)
    for name, patches in LAST.items():
        with _with(patches):
            better = refining.refined(start, model, inputs, macs, plan.seed, progress=False)
        yield name, start if better is None else better


def table(rows: list[dict[str, Any]]) -> str:
    """Points lost and KL divergence, a line per lever and a column per network and budget."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    found = {(row["lever"], row["cell"]): row for row in rows}
    lines = [
        [lever, *(_entry(found.get((lever, cell))) for cell in cells)]
        for lever in dict.fromkeys(row["lever"] for row in rows)
    ]
    return tables.grid(["lever", *cells], lines)


def _entry(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{tables.lost(row):.2f}, {row['kl']:.4f}"


@click.command()
@click.option("--network", "names", multiple=True, default=("vgg",))
@click.option("--data", "dataset", default="digits")
@click.option("--fold", "folds", multiple=True, type=float, default=(7.0, 14.0))
@click.option("--out", type=Path, default=RESULTS)
def main(names: tuple[str, ...], dataset: str, folds: tuple[float, ...], out: Path) -> None:
    """Measure each lever on the networks of seed 0, print a table and write JSON."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*positions; more calibration")
    _, _, inputs, labels = data.load(dataset)
    rows: list[dict[str, Any]] = []
    for name in names:
        model = networks.trained(name, dataset, 0)
        original = networks.accuracy(model, inputs, labels)
        for fold in folds:
            for lever, result in tried(model, calibrated(dataset, 0, 512), fold):
                rows.append(
                    {
                        "cell": f"{name}, {dataset}, {fold:g}x",
                        "lever": lever,
                        "original": original,
                        "accuracy": networks.accuracy(result, inputs, labels),
                        "kl": divergence(result, model, inputs.split(256)),
                    }
                )
                write(out, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
