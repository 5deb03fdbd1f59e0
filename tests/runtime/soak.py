"""Many calls over mixed shapes and threads: right results, and memory that stays flat.

python -m tests.runtime.soak --calls 100000
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import separable

_CALLERS = 3
_RELOAD = 500  # calls of one caller between two loadings of a saved model
_SAMPLES = 100  # of the resident memory
GROWTH = 8 << 20  # bytes that fragmentation may take between the first and the last samples

Case = tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, torch.Tensor]


def _network(channels: int) -> nn.Module:
    layers = [
        separable.nn.SeparableConv2d(3, channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.SiLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 10),
    ]
    return nn.Sequential(*layers).eval()


def _cases(draws: random.Random, file: Path) -> list[Case]:
    """Compiled models and their inputs and results: fixed and changing batches, torch inside."""
    cases: list[Case] = []

    def add(compiled: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        cases.append((compiled, x, compiled(x).clone()))

    for threads, channels in itertools.product((1, 2), (8, 19)):
        shape = (draws.randint(1, 3), 3, draws.randint(9, 40), draws.randint(9, 40))
        x = torch.randn(shape)
        compiled = separable.compile(_network(channels), x, threads=threads)
        compiled.save(file)
        add(compiled, x)
    mixed = separable.compile(_network(8), torch.randn(1, 3, 20, 20), threads=2, dynamic_batch=True)
    for batch in (1, 2, 5):
        add(mixed, torch.randn(batch, 3, 20, 20))
    partly = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    x = torch.randn(1, 3, 12, 12)
    add(separable.compile(partly, x, threads=2), x)
    return cases


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(calls: int, seed: int = 0) -> int:
    """Make that many calls from several threads; raises `AssertionError` at a wrong result.

    Returns:
        Bytes by which the resident memory grew: the median of the last tenth of its samples less
        that of the second tenth, when everything has been used once.
    """
    torch.manual_seed(seed)
    draws = random.Random(seed)
    samples: list[int] = []
    failures: list[BaseException] = []
    counter = itertools.count()
    with tempfile.TemporaryDirectory() as folder, tqdm(total=calls, desc="calls") as progress:
        file = Path(folder) / "model"
        cases = _cases(draws, file)
        _, x, expected = cases[3]  # the one saved last

        def caller(seed: int) -> None:
            mine = random.Random(seed)
            loaded = separable.load_compiled(file)
            try:
                for turn in itertools.count():
                    number = next(counter)
                    if number >= calls or failures:
                        return
                    if turn % _RELOAD == _RELOAD - 1:
                        loaded = separable.load_compiled(file)
                    compiled, given, result = mine.choice([*cases, (loaded, x, expected)])
                    assert torch.equal(compiled(given), result), f"call {number} differs"
                    if number % max(1, calls // _SAMPLES) == 0:
                        samples.append(resident())
                    progress.update()
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=caller, args=(seed + 1 + i,), daemon=True)
            for i in range(_CALLERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    tenth = max(1, len(samples) // 10)
    return int(statistics.median(samples[-tenth:]) - statistics.median(samples[tenth : 2 * tenth]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    growth = soak(arguments.calls, arguments.seed)
    print(
        f"{arguments.calls} calls from {_CALLERS} threads, seed {arguments.seed}: all right; "
        f"resident memory {resident() / 2**20:.0f} MiB, grew by {growth / 2**20:.2f} MiB "
        f"(at most {GROWTH / 2**20:.0f})"
    )
    sys.exit(growth > GROWTH)


if __name__ == "__main__":
    main()
