"""The command of the conversion."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from .options import (
    MODEL_HELP,
    input_size,
    load,
    load_weights,
    numbers,
    output_format,
    table_or_json,
)

FORMS = (
    "depthwise-pointwise",
    "pointwise-depthwise",
    "pointwise-depthwise-pointwise",
    "low-rank",
)
IMAGENET = ("0.485,0.456,0.406", "0.229,0.224,0.225")


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@click.option(
    "--budget", required=True, help="As in macs=0.25, params=0.2, latency=0.4, error=0.01."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File for the converted network, safetensors.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Trained weights, safetensors; random if left out.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of images, searched with its subfolders. Without it the weights alone are fitted.",
)
@click.option(
    "--images",
    "most",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Most images to take from the folder, at random.",
)
@click.option(
    "--mean", type=numbers, default=IMAGENET[0], show_default=True, help="Of the channels, 0 to 1."
)
@click.option(
    "--std", type=numbers, default=IMAGENET[1], show_default=True, help="What to divide them by."
)
@input_size
@click.option("--skip", multiple=True, help="Layer to keep dense, or a pattern; may be repeated.")
@click.option("--form", "forms", type=click.Choice(FORMS), multiple=True, help="Only these forms.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of every draw.")
@output_format
def convert(
    model: str,
    budget: str,
    out: Path,
    weights: Path | None,
    calibration: Path | None,
    most: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    input_size: tuple[int, ...],
    skip: tuple[str, ...],
    forms: tuple[str, ...],
    seed: int,
    style: Any,
) -> str:
    """Convert a trained network to separable convolutions, without labels.

    \b
    separable convert torchvision:resnet18 --weights in.safetensors \\
        --calibration photos --budget macs=0.25 --out slim.safetensors
    """
    table_or_json(style)
    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"--out: there is no folder {str(out.absolute().parent)!r}")
    import torch

    from .. import conversion, cost
    from ..images import read_images

    cost.keep_freed_memory()
    network = load(model)
    if weights is not None:
        load_weights(network, weights)
    inputs = None
    if calibration is not None:
        channels, *side = input_size[1:]
        inputs = read_images(
            calibration,
            channels,
            tuple(side),
            mean,
            std,
            most,
            seed,
            warn=partial(click.echo, err=True),
        )
    options = {"forms": forms} if forms else {}
    converted = conversion.convert(
        network,
        inputs,
        budget,
        skip=skip,
        seed=seed,
        example=torch.zeros(1, *input_size[1:]),
        **options,  # type: ignore[arg-type]
    )
    conversion.save(converted, out)
    report = converted.report
    assert isinstance(report, conversion.Report)
    click.echo(f"The converted network is {out}.", err=True)
    return json.dumps(report.to_dict(), indent=2) if style == "json" else str(report)
