"""The command of the conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..outputs import Outputs
from .options import (
    MODEL_HELP,
    SEED,
    check_writable,
    input_size,
    load,
    outputs,
    photos,
    table_or_json,
    torch_threads,
    weights,
)

FORMS = (
    "depthwise-pointwise",
    "pointwise-depthwise",
    "pointwise-depthwise-pointwise",
    "low-rank",
)


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@click.option(
    "--budget",
    required=True,
    help="As in macs=0.25, params=0.2, latency=0.4, error=0.01. Shares of the original's, but for "
    "the error; latency is the time of eager PyTorch, measured here with --threads.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File for the converted network, safetensors.",
)
@weights
@photos(
    "--calibration",
    "Folder of images, searched with its subfolders. Without it the weights alone are fitted.",
)
@input_size
@click.option("--skip", multiple=True, help="Layer to keep dense, or a pattern; may be repeated.")
@click.option("--form", "forms", type=click.Choice(FORMS), multiple=True, help="Only these forms.")
@outputs
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of every draw.")
@torch_threads
@table_or_json
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
    outputs: Outputs,
    seed: int,
    style: Any,
) -> str:
    """Convert a trained network to separable convolutions, without labels.

    \b
    separable convert torchvision:resnet18 --weights in.safetensors \\
        --calibration photos --budget macs=0.25 --out slim.safetensors
    """
    check_writable(out)
    import torch

    from .. import conversion, cost
    from ..images import read_images
    from ..progress import progress

    cost.keep_freed_memory()
    network = load(model, weights)
    inputs = None
    if calibration is not None:
        inputs = read_images("--calibration", calibration, input_size, mean, std, most, seed)
    options = {"forms": forms} if forms else {}
    with progress(f"converting at {budget}"):
        converted = conversion.convert(
            network,
            inputs,
            budget,
            skip=skip,
            seed=seed,
            example=torch.zeros(1, *input_size[1:]),
            outputs=outputs,
            **options,  # type: ignore[arg-type]
        )
    conversion.save(converted, out)
    report = converted.report
    assert isinstance(report, conversion.Report)
    click.echo(f"The converted network is {out}.", err=True)
    return json.dumps(report.to_dict(), indent=2) if style == "json" else str(report)
