"""The command of the report."""

from __future__ import annotations

from pathlib import Path

import click

from ..outputs import Outputs
from .errors import named
from .options import (
    MODEL_HELP,
    SEED,
    check_writable,
    input_size,
    json_flag,
    load,
    load_converted,
    numbers,
    outputs,
    photos,
    torch_threads,
    weights,
)

FORMATS = ("html", "json", "csv", "png", "svg")


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@click.option(
    "--convert",
    "budget",
    help="Convert it within a budget, as in macs=0.25, and report both beside each other.",
)
@click.option(
    "--converted",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Report it beside this converted network, which `separable convert` wrote.",
)
@click.option(
    "--frontier",
    type=numbers,
    help="Further shares to convert at, as in 0.5,0.25,0.14, for error against cost.",
)
@click.option(
    "--labelled",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder with one subfolder of images per class, in the order of the classes: accuracy.",
)
@weights
@photos(
    "--calibration",
    "Folder of images, searched with its subfolders. Without it the weights alone are fitted.",
)
@input_size
@outputs
@torch_threads
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Measurements of each network and layer.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the conversions.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="report.html",
    show_default=True,
    help="The file; png and svg write one per plot, OUT-roofline.png and so on.",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(FORMATS),
    help="What to write; by the ending of --out if left out.",
)
@json_flag
@click.pass_context
def report(
    context: click.Context,
    model: str,
    budget: str | None,
    converted: Path | None,
    frontier: tuple[float, ...] | None,
    labelled: Path | None,
    weights: Path | None,
    calibration: Path | None,
    most: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    input_size: tuple[int, ...],
    outputs: Outputs,
    repeats: int,
    seed: int,
    out: Path,
    style: str | None,
    as_json: bool,
) -> str:
    """Write what separable would give a network: one page, its plots, or the figures.

    \b
    separable report torchvision:resnet18 --threads 1
    separable report torchvision:resnet18 --weights in.safetensors --convert macs=0.25 \\
        --calibration photos --frontier 0.5,0.14 --threads 1 --out report.html
    """
    if budget is not None and converted is not None:
        raise click.UsageError("--convert and --converted exclude each other; give one of them")
    if frontier and budget is None and converted is None:
        raise click.UsageError("--frontier belongs to a conversion: give --convert too")
    check_writable(out)
    from .. import cost, reporting
    from ..conversion.plans import Budget
    from ..images import read_images, read_labelled
    from ..reporting.writing import check, to_json

    with named(path="--out"):
        check(out, style)
    goal = None if budget is None else Budget.parse(budget)
    points = [f"{goal.quantity if goal else 'macs'}={share:g}" for share in frontier or ()]
    with named(budget="--frontier"):
        for point in points:
            Budget.parse(point)
    cost.keep_freed_memory()
    network = load(model, weights)
    inputs = data = None
    if calibration is not None:
        inputs = read_images("--calibration", calibration, input_size, mean, std, most, seed)
    if labelled is not None:
        data = read_labelled("--labelled", labelled, input_size, mean, std)
    findings = reporting.report(
        network,
        input_size,
        budget=budget,
        converted=None if converted is None else load_converted(converted, network, "--converted"),
        calibration=inputs,
        outputs=outputs,
        frontier=points,
        data=data,
        repeats=repeats,
        seed=seed,
        title=model.rpartition(":")[2],
        command=context.find_root().meta.get("command"),
    )
    written = findings.write(out, style)
    click.echo(f"The report is {', '.join(map(str, written))}.", err=True)
    return to_json(findings, indent=2) if as_json else findings.answer
