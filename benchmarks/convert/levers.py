"""What each lever of the method does: `python -m benchmarks.convert.levers --help`."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor, nn

import separable
from separable.conversion import applying, fitting, forms, refining, sites, varying
from separable.conversion.calibration import Inputs
from separable.conversion.sensitivity import divergence
from separable.conversion.varying import blended

from . import data, networks, tables
from .run import calibrated, made, write

RESULTS = Path("benchmarks/results/convert_levers.json")
Patch = tuple[Any, str, Any]


def _own_inputs(original: nn.Module, _: nn.Module, *rest: Any) -> Any:
    return sites.collect(original, original, *rest)


def _tempered(surprise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda output, generator: surprise(output / 4, generator)


def activated(model: nn.Module, name: str) -> str:
    """The last of the batch norm and activation that follow a layer in its sequence."""
    parent, _, own = name.rpartition(".")
    sequence = list(model.get_submodule(parent).named_children())
    at = [key for key, _ in sequence].index(own)
    while at + 1 < len(sequence) and isinstance(sequence[at + 1][1], AFTER):
        at += 1
    return f"{parent}.{sequence[at][0]}".removeprefix(".")


def block(model: nn.Module, name: str) -> str:
    """The residual block that a layer is part of; the activation behind it if there is none."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(outer := ".".join(parts[:end])), networks.Residual):
            return outer
    return activated(model, name)


def _behind(place: Callable[[nn.Module, str], str]) -> Callable[..., Any]:
    """Gather what lies behind each of the named layers instead of its own output."""
    watched = refining._watched

    @contextmanager
    def gathered(model: nn.Module, names: Iterable[str]) -> Iterator[list[tuple[str, Tensor]]]:
        places = {name: place(model, name) for name in names}
        seen: list[tuple[str, Tensor]] = []
        with watched(model, dict.fromkeys(places.values())) as outputs:
            yield seen
            found = dict(outputs)
            seen += [(name, found[behind]) for name, behind in places.items()]

    return gathered


def _limits(model: nn.Module, name: str) -> Tensor | None:
    """Where each channel's activation begins, `[N]`, if a ReLU follows directly or a batch norm."""
    last = model.get_submodule(activated(model, name))
    if not isinstance(last, nn.ReLU):
        return None
    conv: Any = model.get_submodule(name)
    norms = [m for m in _between(model, name) if not isinstance(m, nn.ReLU)]
    limits = torch.zeros(conv.out_channels)
    for norm in norms:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        limits = norm.running_mean - norm.bias * (norm.running_var + norm.eps).sqrt() / norm.weight
        limits = limits.where(norm.weight > 0, -float("inf"))  # a falling channel is left as it is
    return limits


def _between(model: nn.Module, name: str) -> list[nn.Module]:
    parent, _, own = name.rpartition(".")
    last = activated(model, name).rpartition(".")[2]
    children = dict(model.get_submodule(parent).named_children())
    keys = list(children)
    return [children[key] for key in keys[keys.index(own) + 1 : keys.index(last) + 1]]


def _knowing() -> list[Patch]:
    """Fit, then fit again to outputs that are free where the activation cuts them off.

    Where the original's output is below the threshold t of its ReLU, any value below t will do, so
    the target becomes min(y', t) of the fit y' (Zhang et al. 2015, arXiv:1411.4229).
    """
    collect, fitted_module = applying.collect, applying.fitted_module
    latest: list[Any] = []

    def noted(*arguments: Any) -> Any:
        latest[:] = arguments
        return collect(*arguments)

    def twice(conv: Any, row: Any, moments: Any, slopes: Any) -> Any:
        form = fitted_module(conv, row, moments, slopes)
        original, converted, site, inputs, seed = latest
        limits = _limits(original, site.name)
        if limits is None:
            return form
        for _ in range(ROUNDS):
            shape = forms.Shape.of(conv)
            found = sites.Moments.zeros(shape)
            for batch in inputs:
                wanted = sites._record(original, site, batch, inputs=False)
                given = sites._record(converted, site, batch, inputs=True)
                for u, y in zip(given, wanted, strict=True):
                    t = limits.view(-1, *[1] * (y.dim() - 2))
                    free = torch.minimum(form(u), t)
                    y = torch.where(y < t, free, y)
                    found.add(*sites.samples(conv, u, y, sites.POSITIONS, seed))
            form = fitted_module(conv, row, found.reduced(), slopes)
        return form

    return [(applying, "collect", noted), (applying, "fitted_module", torch.no_grad()(twice))]


AFTER = (nn.modules.batchnorm._BatchNorm, nn.ReLU)
ROUNDS = 2
FIT: dict[str, list[Patch]] = {
    "fitted once, as it is": [],
    "inputs from the original network": [(applying, "collect", _own_inputs)],
    "outputs weighted alike (no Fisher)": [(fitting, "BLEND", 1.0)],
    "a tenth of identity in the Fisher metric": [(fitting, "BLEND", 0.1)],
    "Fisher information of outputs over 4": [(sites, "_surprise", _tempered(sites._surprise))],
    "ridge 10⁻⁴": [(fitting, "RIDGE", 1e-4)],
    "ridge 10⁻²": [(fitting, "RIDGE", 1e-2)],
    "fit without variations": [(varying, "ENOUGH", 1)],
}
"""levers of the fit, without the last pass"""
ACTIVATIONS = "targets that know the activation"
AUGMENTED = "calibration inputs and as many blends"
AGAIN = "a second sequential pass"
LAST: dict[str, list[Patch]] = {
    "last pass, as it is": [],
    "without variations": [(refining, "ENOUGH", 1)],
    "without blends": [(refining, "BLENDED", 10**9)],
    "blends in every step": [(refining, "BLENDED", 1)],
    "without the layers' own errors": [(refining, "LAYERS", 0.0)],
    "ten times the layers' own errors": [(refining, "LAYERS", 10.0)],
    "temperature 1": [(refining, "TEMPERATURE", 1.0)],
    "rate 0.01": [(refining, "RATE", 0.01)],
    "rate 0.04": [(refining, "RATE", 0.04)],
    "100 steps": [(refining, "STEPS", 100)],
    "600 steps": [(refining, "STEPS", 600)],
    "errors behind the activations": [(refining, "_watched", _behind(activated))],
    "errors of residual blocks": [(refining, "_watched", _behind(block))],
}
"""levers of the last pass, each from the network that was fitted as it is"""
LEVERS = (*FIT, ACTIVATIONS, AUGMENTED, AGAIN, *LAST)


def _with(patches: list[Patch]) -> ExitStack:
    stack = ExitStack()
    for patch in patches:
        stack.enter_context(mock.patch.object(*patch))
    return stack


def _again(start: nn.Module, model: nn.Module, plan: separable.Plan, inputs: Inputs) -> nn.Module:
    """Fit each layer once more, in the network that was fitted once and its new batch norms."""
    result = copy.deepcopy(start)
    shown = varying.Varied(inputs, sum(row.macs_before for row in plan.rows), plan.seed)
    found = {site.name: site for site in sites.trace(model, inputs.first)}
    changing = [row for row in plan.rows if row.form is not None]
    slopes = sites.fisher(model, [found[row.name] for row in changing], shown, plan.seed)
    for row in changing:
        moments = sites.collect(model, result, found[row.name], shown, plan.seed)
        conv: Any = model.get_submodule(row.name)
        form = applying.fitted_module(conv, row, moments, slopes.get(row.name))
        result = sites.replaced(result, found[row.name].names, form)
    return applying.with_batch_norm(result, inputs) or result


def tried(
    model: nn.Module, given: Tensor, fold: float, levers: Collection[str]
) -> Iterator[tuple[str, nn.Module]]:
    """The network that comes out with each of the named levers."""
    inputs = Inputs(given, model)

    def fitted(inputs: Tensor) -> tuple[nn.Module, separable.Plan]:
        plan = separable.plan(model, inputs, f"macs={1 / fold}", progress=False)
        found, _ = applying.fitted(model, plan, Inputs(inputs, model), False)
        return found, plan

    start, plan = fitted(given)
    for name, patches in FIT.items():
        if name in levers:
            with _with(patches):
                yield name, fitted(given)[0] if patches else start
    if ACTIVATIONS in levers:
        with _with(_knowing()):
            yield ACTIVATIONS, fitted(given)[0]
    if AUGMENTED in levers:
        generator = torch.Generator().manual_seed(0)
        blends = torch.cat(list(refining._draws(inputs, 1.0, generator, blended)))
        yield AUGMENTED, fitted(torch.cat([given, blends]))[0]
    if AGAIN in levers:
        yield AGAIN, _again(start, model, plan, inputs)
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
