"""Commands of the account: count, compare, measure and crosscheck."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import (
    MODEL_HELP,
    device,
    dtype,
    example,
    input_size,
    load,
    output_format,
    padding,
    size,
    threads,
)

if TYPE_CHECKING:
    from torch import nn


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@input_size
@dtype
@output_format
@click.option("--depth", type=click.IntRange(0), help="Levels of modules to show; all if left out.")
@click.option("--strict", is_flag=True, help="Fail where an operator has no formula.")
def count(
    model: str,
    input_size: tuple[int, ...],
    dtype: str | None,
    style: Any,
    depth: int | None,
    strict: bool,
) -> str:
    """Count a network's parameters, multiply-adds, memory and traffic.

    \b
    separable count torchvision:resnet18 --input-size 1x3x224x224 --depth 1
    separable count path/to/file.py:build_network --json
    """
    from .. import cost

    network = load(model)
    account = cost.count(network, **example(network, input_size, dtype), strict=strict)
    return account.to_string(style, depth=depth)


@click.command(epilog=MODEL_HELP)
@click.argument("models", nargs=-1, metavar="[MODEL_A MODEL_B]")
@input_size
@dtype
@output_format
@click.option("--in-channels", type=click.IntRange(1), help="Channels of a layer's input.")
@click.option("--out-channels", type=click.IntRange(1), help="Channels of its output.")
@click.option("--kernel-size", type=size, help="Its taps, as in 5 or 3x5.")
@click.option("--stride", type=size, help="Its step; 1 if left out.")
@click.option("--padding", type=padding, help="Samples on each side, same or valid.")
@click.option("--dilation", type=size, help="Distance between its taps; 1 if left out.")
@click.option("--latency/--no-latency", default=True, help="Whether to time both.")
@threads
def compare(
    models: tuple[str, ...],
    input_size: tuple[int, ...],
    dtype: str | None,
    style: Any,
    latency: bool,
    threads: int | None,
    **layer: Any,
) -> str:
    """Compare two networks, or a layer's two forms, and time both.

    The first network is the regular one. Without networks the layer's options are needed.

    \b
    separable compare separable:mobilenet_v1,conv=regular separable:mobilenet_v1
    separable compare --in-channels 3 --out-channels 64 --kernel-size 5 \\
        --stride 2 --input-size 1x3x228x228
    """
    given = {name: value for name, value in layer.items() if value is not None}
    if models and given:
        raise click.UsageError(
            f"{_flag(next(iter(given)))} describes a layer: leave it or the networks out"
        )
    if not models:
        regular, separable_form = _layers(given, input_size)
    elif len(models) == 2:
        regular, separable_form = map(load, models)
    else:
        raise click.UsageError(f"compare needs two networks, got {len(models)}")
    from .. import cost

    cost.keep_freed_memory()
    comparison = cost.compare(
        regular,
        separable_form,
        **example(regular, input_size, dtype),
        latency=latency,
        threads=threads,
    )
    return comparison.to_string(style)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _layers(options: dict[str, Any], input_size: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Build a layer in its regular and in its separable form."""
    for name in ("in_channels", "out_channels", "kernel_size"):
        if name not in options:
            raise click.UsageError(f"give two networks, or a layer: {_flag(name)} is missing")
    dims = len(input_size) - 2
    if dims not in (1, 2, 3):
        raise click.UsageError(
            f"--input-size must have 3 to 5 numbers for a layer, batch and channels first, "
            f"got {dims + 2}"
        )
    if input_size[1] != options["in_channels"]:
        raise click.UsageError(
            f"--in-channels ({options['in_channels']}) must be the channels of --input-size "
            f"({'x'.join(map(str, input_size))}), {input_size[1]}"
        )
    from torch import nn

    from .. import nn as separable_nn

    # one number stands for every dimension
    arguments = {
        name: value[0] if isinstance(value, tuple) and len(value) == 1 else value
        for name, value in options.items()
    }
    # the separable form first, for it checks its arguments
    separable_form = getattr(separable_nn, f"SeparableConv{dims}d")(**arguments)
    return getattr(nn, f"Conv{dims}d")(**arguments), separable_form


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@input_size
@dtype
@output_format
@click.option(
    "--device", type=device, default="cpu", show_default=True, help="Where to run, as in cuda:0."
)
@click.option("--per-layer", is_flag=True, help="Time every module too.")
@threads
def measure(
    model: str,
    input_size: tuple[int, ...],
    dtype: str | None,
    style: Any,
    device: str,
    per_layer: bool,
    threads: int | None,
) -> str:
    """Measure a network's latency and peak memory.

    \b
    separable measure timm:mobilenetv4_conv_small --threads 1 --per-layer
    """
    from .. import cost

    cost.keep_freed_memory()
    network = load(model).to(device)
    measurement = cost.measure(
        network, **example(network, input_size, dtype), threads=threads, per_layer=per_layer
    )
    return measurement.to_string(style)


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@input_size
@dtype
@output_format
def crosscheck(model: str, input_size: tuple[int, ...], dtype: str | None, style: Any) -> str:
    """Show what other counters say of a network, and why.

    \b
    separable crosscheck timm:convnext_atto
    """
    from .. import cost

    network = load(model)
    return cost.crosscheck(network, **example(network, input_size, dtype)).to_string(style)
