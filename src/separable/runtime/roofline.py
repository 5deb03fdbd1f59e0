"""What this core can do at most: multiply-adds and bytes per second, measured."""

from __future__ import annotations

import ctypes
import time

import torch

from . import jit
from .emit.builder import Builder
from .machine import Machine

_CHAINS = 12  # independent sums: two multiply-adds a cycle, four to five cycles each
_TURNS = 40_000
_BURSTS = 4  # of some 80 µs: long beside the call, short enough to escape a busy neighbour
_BYTES = 8 << 20


class Peak:
    """Repeated measurements of the peak, to be taken between those it is compared with.

    Attributes:
        flops: the best FLOP per second of one core so far; a multiply-add counts as two.
        bandwidth: the best bytes per second of one core so far, read plus written.
    """

    def __init__(self, machine: Machine) -> None:
        self.flops = self.bandwidth = 0.0
        self._per_turn = _CHAINS * machine.width
        self._code = jit.compile_ir(_multiply_adds(machine), machine)
        self._call = jit.foreign(self._code, "kernel", 3)
        self._operand = torch.full((machine.width,), 0.5, dtype=torch.float32, device="cpu")
        self._source, self._target = (
            torch.zeros(_BYTES // 8, dtype=torch.float32, device="cpu") for _ in range(2)
        )

    def multiply_adds(self, count: int) -> None:
        """Do about so many multiply-adds in registers."""
        array = (ctypes.c_void_p * 1)(self._operand.data_ptr())
        self._call(ctypes.addressof(array), 0, max(1, count // self._per_turn))

    def measure(self) -> None:
        """Measure once more; takes about a millisecond."""
        count = _TURNS * self._per_turn
        for _ in range(_BURSTS):
            start = time.perf_counter()
            self.multiply_adds(count)
            self.flops = max(self.flops, 2 * count / (time.perf_counter() - start))
        start = time.perf_counter()
        self._target.copy_(self._source)
        self.bandwidth = max(self.bandwidth, _BYTES / (time.perf_counter() - start))


def _multiply_adds(machine: Machine) -> str:
    b = Builder(machine, 1)
    factor = b.broadcast(b.load_scalar(b.pointers[0]))
    sums = b.loop(
        b.begin,
        b.end,
        lambda _, *sums: [b.fma(each, factor, factor) for each in sums],
        [b.constant(float(i)) for i in range(_CHAINS)],
    )
    total = sums[0]
    for each in sums[1:]:
        total = b.ir.fadd(total, each)
    b.store(total, b.pointers[0])
    return b.finish()
