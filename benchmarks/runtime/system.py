"""The runtime beyond single networks: kept promise, memory, compile times, a busy neighbour.

python benchmarks/runtime/system.py promise memory compile busy --output results.json

What a part gave before is kept, with its date, under `earlier` of the file: what a busy machine
does to figures shows in several runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import separable
from separable.cost import keep_freed_memory, measure, measure_interleaved
from separable.runtime.benchmarking import _RUNTIMES, benchmark, conditions
from separable.runtime.machine import host

from networks import network  # isort: skip

_COMPILE = """
import time, torch, separable
from separable.models import create_model
model, x = create_model("torchvision:mobilenet_v2").eval(), torch.zeros(1, 3, 224, 224)
start = time.perf_counter()
fast = separable.compile(model, x)
print(time.perf_counter() - start)
fast.save({file!r})
"""
_LOAD = """
import time, torch, separable.runtime
start = time.perf_counter()
fast = separable.load_compiled({file!r})
print(time.perf_counter() - start)
"""
_IMPORT = """
import time
start = time.perf_counter()
import separable
print(time.perf_counter() - start)
"""


def promise() -> list[dict[str, Any]]:
    """Speed-up over MAC ratio of 3×3 layers, both forms compiled; the regular one beside peers.

    Images come and go channels last, as within a network, or contiguous, as peers take them.
    """
    rows = []
    layers = [(64, 56), (128, 28), (256, 14), (512, 7)]
    for last, (channels, size) in itertools.product((True, False), layers):
        x = torch.randn(1, channels, size, size)
        if last:
            x = x.to(memory_format=torch.channels_last)
        regular = nn.Conv2d(channels, channels, 3, padding=1).eval()
        pair = separable.nn.SeparableConv2d(channels, channels, 3, padding=1).eval()
        both = [separable.compile(model, x, threads=1) for model in (regular, pair)]
        dense, cut = measure_interleaved(both, x, threads=1, repeats=60, min_seconds=3.0)
        macs = separable.count(regular, x.shape).macs / separable.count(pair, x.shape).macs
        speedup = dense.ratio_to(cut).median
        against = () if last else ("onnxruntime", "openvino")
        peers = benchmark(regular, tuple(x.shape), against=against, turns=40) if against else None
        rows.append(
            {
                "channels_last": last,
                "channels": channels,
                "size": size,
                "mac_ratio": macs,
                "speedup": speedup,
                "kept": speedup / macs,
                "regular_against_best_peer": peers and peers.advantage,
            }
        )
        print(rows[-1], flush=True)
    return rows


def memory() -> dict[str, Any]:
    """The arena of MobileNetV2 beside eager's measured peak."""
    model, x = network("torchvision:mobilenet_v2"), torch.randn(1, 3, 224, 224)
    arena = separable.compile(model, x, threads=1).program.arena_bytes
    eager = measure(model, x, threads=1).peak_memory_bytes
    row = {"arena": arena, "eager_peak": eager, "share": arena / eager if eager else None}
    print(row, flush=True)
    return row


def compile_times() -> dict[str, float]:
    """Seconds in processes of their own: cold, with the cache, loaded, and the bare import."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"SEPARABLE_CACHE_DIR": folder, "SEPARABLE_CACHE": "1"}

        def seconds(script: str) -> float:
            text = script.format(file=str(Path(folder) / "model"))
            command = [sys.executable, "-c", text]
            return float(subprocess.check_output(command, env=environment, text=True))

        row = {"cold": seconds(_COMPILE), "cached": seconds(_COMPILE), "load": seconds(_LOAD)}
        row["import"] = statistics.median(seconds(_IMPORT) for _ in range(3))
    print(row, flush=True)
    return row


def _spin(stop: Any) -> None:
    while not stop.is_set():
        sum(range(10_000))


def busy(seconds: float = 0.6, turns: int = 8) -> dict[str, dict[str, float]]:
    """Slowdown of MobileNetV1 on all cores while another process keeps each of them busy."""
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    model, x = network("separable:mobilenet_v1"), torch.randn(1, 3, 224, 224)
    fast = separable.compile(model, x, threads=threads)
    runners: dict[str, Callable[[], Any]] = {"separable": lambda: fast(x)}
    with torch.inference_mode():
        for name in ("eager", "onnxruntime", "openvino"):
            runners[name] = _RUNTIMES[name](model, x, threads)

        def times() -> dict[str, float]:
            taken: dict[str, list[float]] = {name: [] for name in runners}
            for name, run in turns * list(runners.items()):
                time.sleep(0.1)  # threads of the one before stop spinning
                run()
                end = time.perf_counter() + seconds
                while (start := time.perf_counter()) < end:
                    run()
                    taken[name].append(1e3 * (time.perf_counter() - start))
            return {name: statistics.median(each) for name, each in taken.items()}

        alone = times()
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        neighbours = [context.Process(target=_spin, args=(stop,)) for _ in range(threads)]
        for neighbour in neighbours:
            neighbour.start()
        time.sleep(3)
        try:
            beside = times()
        finally:
            stop.set()
            for neighbour in neighbours:
                neighbour.join()
    rows = {
        name: {"alone": alone[name], "beside": beside[name], "slowdown": beside[name] / alone[name]}
        for name in runners
    }
    for name, row in rows.items():
        print(name, row, flush=True)
    return rows


PARTS = {"promise": promise, "memory": memory, "compile": compile_times, "busy": busy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}; there is no {', '.join(sorted(unknown))}")
    keep_freed_memory()
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    if arguments.output and arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    before = results.get("conditions", {}).get("date")
    results["conditions"] = conditions(host())
    for part in arguments.parts or PARTS:
        if part in results:
            run = {"date": before, "result": results[part]}
            results.setdefault("earlier", {}).setdefault(part, []).append(run)
        results[part] = PARTS[part]()
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
