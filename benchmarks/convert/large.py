"""How long torchvision networks take to convert: `python -m benchmarks.convert.large --help`."""

from __future__ import annotations

import datetime
import json
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import separable
from separable.cost import keep_freed_memory, measure_interleaved
from separable.cost.measuring import device_name
from separable.models import create_model

BATCH = 16


def images(count: int, size: int) -> Tensor:
    """Smooth noise with some detail, `[count, 3, size, size]`: neighbours agree, as in photos."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, size // 16, size // 16, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear")
    return smooth + 0.3 * torch.randn(count, 3, size, size, generator=generator)


def settled(name: str, inputs: Tensor) -> nn.Module:
    """A network with random weights, its batch norms with the statistics of the inputs."""
    torch.manual_seed(0)
    model = create_model(f"torchvision:{name}").train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for batch in inputs[:64].split(BATCH):
            model(batch)
    return model.eval()


@click.command()
@click.argument("names", nargs=-1)
@click.option("--images", "count", default=256, show_default=True, help="Calibration inputs.")
@click.option("--size", default=224, show_default=True, help="Their height and width.")
@click.option("--budget", default="macs=0.25", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=Path, help="JSON file to add the rows to.")
def main(
    names: tuple[str, ...], count: int, size: int, budget: str, threads: int, out: Path | None
) -> None:
    """Convert networks with random weights; print what it took, and how much faster they are."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    warnings.simplefilter("ignore")  # random weights, few inputs
    inputs = images(count, size)
    for name in names or ("resnet18",):
        model = settled(name, inputs)
        start = time.perf_counter()
        plan = separable.plan(model, inputs.split(BATCH), budget)
        planned = time.perf_counter()
        slim: Any = separable.apply(model, plan, inputs.split(BATCH))
        done = time.perf_counter()
        before, after = measure_interleaved([model, slim], inputs[:1], repeats=15)
        row = {
            "network": name,
            "images": count,
            "size": size,
            "budget": budget,
            "macs": plan.macs,
            "plan_seconds": planned - start,
            "apply_seconds": done - planned,
            "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "error": slim.report.error,
            "promised_share": plan.seconds_after / plan.seconds_before
            if plan.seconds_after and plan.seconds_before
            else None,
            "measured_share": after.median / before.median,
            "threads": threads,
            "device": device_name(torch.device("cpu")),
            "torch": torch.__version__,
            "separable": separable.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        print(
            f"{name}, {count} inputs of {size}×{size}, {budget}: plan {row['plan_seconds']:.0f} s, "
            f"apply {row['apply_seconds']:.0f} s, peak {row['peak_bytes'] / 1e9:.1f} GB, {threads} "
            f"threads; {row['measured_share']:.3f} of the time of one image in eager, promised: "
            f"{row['promised_share'] or 'nothing'}",
            flush=True,
        )
        if out is not None:
            rows = json.loads(out.read_text()) if out.exists() else []
            out.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
