"""The command of the demo."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from .options import SEED, output_format, torch_threads


@click.command()
@output_format
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="demo",
    show_default=True,
    help="Folder for demo.png, demo.json and report.html.",
)
@click.option(
    "--epochs", type=click.IntRange(1), default=10, show_default=True, help="Of each training."
)
@partial(
    torch_threads, help="Of the conversion; torch's own number if left out. All else is on one."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of every draw.")
def demo(style: Any, out: Path, epochs: int, seed: int) -> str:
    """Train both forms on real data, convert one into the other, and compare, in four minutes.

    On the handwritten digits bundled with scikit-learn: the same small MobileNetV1 with regular
    convolutions, converted from them without labels, and trained with separable ones.

    \b
    separable demo --out demo
    """
    from ..cost import keep_freed_memory
    from ..demo import tell

    keep_freed_memory()
    story = tell(out, epochs=epochs, seed=seed)
    click.echo(
        f"The picture is {out / 'demo.png'}, the figures are in {out / 'demo.json'}, "
        f"the report is {out / 'report.html'}.",
        err=True,
    )
    return story.to_string(style)
