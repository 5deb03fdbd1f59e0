"""Commands of the runtime: explain and bench."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click

from ..limits import MOST_THREADS
from .options import (
    MODEL_HELP,
    input_size,
    load,
    names,
    table_or_json,
    threads,
)

RUNTIMES = ("eager", "channels_last", "inductor", "onnxruntime", "openvino")


def _thread_counts(text: str) -> tuple[int, ...]:
    """Read 1 or 1,2."""
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= MOST_THREADS for part in parts):
        raise click.BadParameter(
            f"{text!r} must be whole numbers of at least 1 and at most {MOST_THREADS}, as in 1,2"
        )
    return tuple(map(int, parts))


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@input_size
@partial(threads, help="Of a call; as many as there are cores for this process if left out.")
@click.option("--isa", help="Instruction set, as in avx2; the best one if left out.")
@click.option("--asm", "layer", help="Print the assembly of this layer instead.")
@table_or_json
def explain(
    model: str,
    input_size: tuple[int, ...],
    threads: int | None,
    isa: str | None,
    layer: str | None,
    style: Any,
) -> str:
    """Compile a network, and say what runs in which kernel and how fast.

    \b
    separable explain torchvision:mobilenet_v2 --threads 1
    separable explain torchvision:mobilenet_v2 --asm features.1.conv.0.0
    """
    if layer is not None and style == "json":
        raise click.UsageError("--asm prints assembly, which has no JSON; leave one of them out")
    import torch

    from .. import runtime

    compiled = runtime.compile(load(model), torch.zeros(input_size), threads=threads, isa=isa)
    if layer is not None:
        return compiled.assembly(layer)
    explanation = compiled.explain()
    return json.dumps(explanation.to_dict(), indent=2) if style == "json" else str(explanation)


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@input_size
@table_or_json
@click.option(
    "--threads",
    type=_thread_counts,
    default="1",
    metavar="COUNTS",
    show_default=True,
    help="As in 1,2.",
)
@click.option(
    "--against",
    type=names,
    default=",".join(RUNTIMES),
    show_default=True,
    help="Other runtimes; those that are not installed are named.",
)
@click.option(
    "--turns",
    type=click.IntRange(1),
    default=30,
    show_default=True,
    help="How often each is timed, one after the other.",
)
def bench(
    model: str,
    input_size: tuple[int, ...],
    style: Any,
    threads: tuple[int, ...],
    against: tuple[str, ...],
    turns: int,
) -> str:
    """Time a network in the runtime and in others, in turns, outputs checked first.

    \b
    separable bench torchvision:mobilenet_v2 --threads 1,2 --against eager,onnxruntime
    """
    from .. import cost
    from ..runtime.benchmarking import benchmark

    cost.keep_freed_memory()
    network = load(model)
    results = [
        benchmark(network, input_size, count, against, turns, network=model) for count in threads
    ]
    if style == "json":
        return json.dumps([result.to_dict() for result in results], indent=2)
    return "\n\n".join(map(str, results))
