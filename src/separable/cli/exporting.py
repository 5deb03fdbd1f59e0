"""The command of the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .errors import named
from .options import (
    MODEL_HELP,
    check_writable,
    input_size,
    json_flag,
    load,
    load_converted,
    photos,
    weights,
)

FORMATS = ("onnx", "torch-export", "safetensors")


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@click.option(
    "--format",
    "style",
    type=click.Choice(FORMATS),
    help="By the ending of --out if left out: .onnx, .pt2, .safetensors.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file."
)
@click.option(
    "--converted",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Export this conversion of MODEL, which `separable convert` wrote.",
)
@weights
@click.option(
    "--dynamic-batch/--fixed-batch",
    default=True,
    show_default=True,
    help="Whether the file takes any batch size.",
)
@click.option("--opset", type=click.IntRange(1), help="Of ONNX; torch's default if left out.")
@input_size
@photos("--check", "Folder of images to compare outputs on too, beside noise.")
@json_flag
def export(
    model: str,
    style: Any,
    out: Path,
    converted: Path | None,
    weights: Path | None,
    dynamic_batch: bool,
    opset: int | None,
    input_size: tuple[int, ...],
    check: Path | None,
    most: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    as_json: bool,
) -> str:
    """Write a network for other runtimes, checked by running it before it is kept.

    \b
    separable export torchvision:resnet18 --out resnet18.onnx
    separable export torchvision:resnet18 --converted slim.safetensors \\
        --format torch-export --out slim.pt2
    """
    check_writable(out)
    import torch

    from .. import exporting
    from ..images import BATCH, read_images

    network = load(model, weights)
    if converted is not None:
        network = load_converted(converted, network, "--converted")
    inputs = []
    if check is not None:
        images = read_images("--check", check, input_size, mean, std, most, seed=0)
        inputs = list(images.split(BATCH))
    with named(path="--out", example="an input of --input-size"):
        exported = exporting.export(
            network,
            out,
            format=style,
            example=torch.randn(input_size, generator=torch.Generator().manual_seed(0)),
            inputs=inputs,
            dynamic_batch=dynamic_batch,
            opset=opset,
        )
    return json.dumps(exported.to_dict(), indent=2) if as_json else str(exported)
