"""Neighbouring convolutions apart and as a chain: the cost model's estimates and measurements.

python benchmarks/runtime/chains.py torchvision:mobilenet_v2 --threads 1

Prints, for each run of two or three steps that can be joined and for its best few band heights,
both times and both ratios. Every measured call starts with the L2 cache full of other data.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from networks import network
from prettytable import PrettyTable, TableStyle
from tqdm import tqdm

import separable
from separable.runtime.emit.chain import Chain
from separable.runtime.execute import Program
from separable.runtime.machine import Machine
from separable.runtime.memory import Buffer
from separable.runtime.scheduling import fusing
from separable.runtime.steps import Schedule, Step


def program(steps: Sequence[Step], machine: Machine, threads: int) -> Program:
    """Steps on their own, all operands in the arena and random."""
    buffers: dict[Buffer, Buffer] = {}
    copies = []
    for step in steps:
        arguments = []
        for buffer, offset in step.arguments:
            kind = "scratch" if buffer.kind == "scratch" else "arena"
            arguments.append((buffers.setdefault(buffer, Buffer(kind, buffer.size)), offset))
        copies.append(Step(step.node, arguments, step.kernel))
    result = Program(Schedule(copies, [], [], [], [], [], []), machine, threads)
    result.adopt(torch.zeros(1))
    frame = result._new_frame()
    frame.arena.normal_()
    result._frames.append(frame)
    return result


def measure(programs: Sequence[Program], machine: Machine, repeats: int) -> list[float]:
    """Seconds of each, in turns, the second best of all calls."""
    other = torch.zeros(machine.l2 // 2)
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(repeats):
        for mine, run in zip(times, programs, strict=True):
            other.add_(1)
            start = time.perf_counter()
            run([], [])
            mine.append(time.perf_counter() - start)
    return [sorted(mine)[1] for mine in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--heights", type=int, default=3, help="band heights per chain")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--layer", default="", help="only chains that begin with such a layer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    threads = arguments.threads
    x = torch.randn(1, 3, arguments.size, arguments.size)
    compiled = separable.compile(network(arguments.network), x, threads=threads, fuse=False)
    machine = compiled.program.machine
    paths = fusing.paths(compiled.program.schedule.steps)
    runs = [
        p[a:b] for p in paths for a in range(len(p)) for b in range(a + 2, min(a + 3, len(p)) + 1)
    ]
    table = PrettyTable(
        ["first layer", "stages", "rows", "apart µs", "chain µs", "measured", "predicted"]
    )
    table.set_style(TableStyle.MARKDOWN)
    table.align = "r"
    seen: set[Chain] = set()
    for steps in tqdm(runs, disable=None):
        chain = fusing.chain_of(steps)
        name = steps[0].node.name if steps[0].node else ""
        if not chain or chain in seen or arguments.layer not in name:
            continue
        seen.add(chain)
        apart = sum(fusing.cycles_alone(s.kernel, threads) for s in steps if s.kernel)
        tiles = {}
        for tile in fusing.chain_tiles(chain, steps, machine, threads):
            cycles = fusing.chained_cycles(chain, tile, machine, threads)
            if tile.rows not in tiles or cycles < tiles[tile.rows][0]:
                tiles[tile.rows] = cycles, tile
        best = sorted(tiles.values(), key=lambda each: each[0])[: arguments.heights]
        joined = [[fusing.join(steps, chain, tile, machine)] for _, tile in best]
        programs = [program(each, machine, threads) for each in (steps, *joined)]
        alone, *times = measure(programs, machine, arguments.repeats)
        stages = " ".join(
            f"{type(s).__name__}{'×'.join(map(str, (*s.kernel, *s.size)))}" for s in chain.stages
        )
        for (cycles, tile), seconds in zip(best, times, strict=True):
            figures = [f"{1e6 * alone:.1f}", f"{1e6 * seconds:.1f}", f"{alone / seconds:.2f}"]
            table.add_row([name, stages, tile.rows, *figures, f"{apart / cycles:.2f}"])
            name = stages = ""
    print(table)


if __name__ == "__main__":
    main()
