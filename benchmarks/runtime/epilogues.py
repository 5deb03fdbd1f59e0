"""What each activation costs in the epilogue of a short pointwise convolution.

python benchmarks/runtime/epilogues.py --output results.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

import separable
from separable.runtime.benchmarking import conditions

ACTIVATIONS: dict[str, nn.Module] = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "hardswish": nn.Hardswish(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
    "gelu": nn.GELU(),
    "gelu-tanh": nn.GELU("tanh"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x, conv = torch.randn(1, 32, 56, 56), nn.Conv2d(32, 96, 1)
    models = {
        name: separable.compile(nn.Sequential(conv, activation).eval(), x, threads=1)
        for name, activation in ACTIVATIONS.items()
    }
    best = dict.fromkeys(models, float("inf"))
    hertz = 0.0
    for _ in range(arguments.turns):
        for name, model in models.items():
            explanation = model.explain(repeats=50)
            row = max(explanation.rows, key=lambda row: row.macs)
            best[name] = min(best[name], row.seconds or 0.0)
            # The peak is two multiply-adds of a vector per cycle.
            hertz = max(hertz, explanation.peak_flops / (4 * model.program.machine.width))
    elements = 96 * 56 * 56
    rows = {
        name: {
            "microseconds": 1e6 * seconds,
            "added": seconds / best["none"] - 1,
            "cycles_per_element": (seconds - best["none"]) * hertz / elements,
        }
        for name, seconds in best.items()
    }
    for name, row in rows.items():
        print(
            f"{name:10} {row['microseconds']:7.1f} µs  {row['added']:+6.0%}  "
            f"{row['cycles_per_element']:5.2f} cycles per element"
        )
    if arguments.output:
        machine = next(iter(models.values())).program.machine
        result = {"conditions": conditions(machine), "input": list(x.shape), "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
