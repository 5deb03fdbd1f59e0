"""How much of the promise arrives, layer by layer: eager PyTorch, regular against separable.

    python benchmarks/layers.py --threads 1 --out benchmarks/results/layers.json

Each row is one convolution with bias and its separable pair on the same input. Both are measured
in turn in one process, after their output shapes were checked to agree.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from prettytable import PrettyTable, TableStyle
from torch import nn
from tqdm import tqdm

import separable
from separable.cost import keep_freed_memory
from separable.nn import SeparableConv2d

# in_channels, out_channels, kernel, stride, side of the square input, depth multiplier
LAYERS = [
    (3, 64, 5, 2, 228, 1),
    (3, 16, 3, 2, 224, 1),
    (3, 32, 3, 2, 224, 1),
    (32, 64, 3, 1, 112, 1),
    (64, 64, 3, 1, 56, 1),
    (128, 128, 3, 1, 28, 1),
    (256, 256, 3, 1, 14, 1),
    (512, 512, 3, 1, 14, 1),
    (512, 512, 3, 1, 7, 1),
    (128, 128, 5, 1, 28, 1),
    (256, 512, 3, 2, 28, 1),
    (64, 64, 3, 1, 56, 2),
    (256, 256, 3, 1, 14, 2),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=2.0, help="per side and layer")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    keep_freed_memory()

    table = PrettyTable(
        [
            "Layer",
            "Input",
            "MACs",
            "Traffic",
            "Latency (ms)",
            "Speed-up (quartiles)",
            "Promise kept",
        ]
    )
    table.align = "r"
    table.align["Layer"] = "l"
    rows = []
    for channels, filters, kernel, stride, side, multiplier in tqdm(LAYERS, disable=None):
        options = {"stride": stride, "padding": 0 if side == 228 else kernel // 2}
        comparison = separable.compare(
            nn.Conv2d(channels, filters, kernel, **options),
            SeparableConv2d(channels, filters, kernel, **options, depth_multiplier=multiplier),
            (args.batch, channels, side, side),
            threads=args.threads,
            repeats=args.repeats,
            min_seconds=args.seconds,
        )
        assert comparison.measured is not None
        one, other = comparison.measured
        speed_up = one.ratio_to(other)
        layer = f"{channels} → {filters}, {kernel}×{kernel}" + (f", stride {stride}" * (stride > 1))
        layer += f", {multiplier} filters per channel" * (multiplier > 1)
        table.add_row(
            [
                layer,
                f"{args.batch}×{channels}×{side}×{side}",
                f"{comparison.ratio['macs']:.1f}x fewer",
                f"{1 / comparison.ratio['traffic_bytes'] - 1:+.0%}",
                f"{1e3 * one.median:.3f} / {1e3 * other.median:.3f}",
                f"{speed_up.median:.2f}x ({speed_up.low:.2f} to {speed_up.high:.2f})",
                f"{comparison.promise_kept:.0%}",
            ]
        )
        figures = comparison.to_dict()
        kept = ("metrics", "promise_kept", "measured")
        rows.append({"layer": layer, **{name: figures[name] for name in kept}})
    table.set_style(TableStyle.MARKDOWN)
    print(table)
    versions = ", ".join(f"{name} {version}" for name, version in one.versions.items())
    date = datetime.date.today().isoformat()
    conditions = f"{one.device}; threads: {args.threads}; float32; {versions}"
    print(f"\n{conditions}; {args.repeats} repeats; {date}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"date": date, "arguments": vars(args), "rows": rows}
        args.out.write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
