"""Running one kernel in guarded memory, and the measure its error is held to."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch

from separable.runtime import jit
from separable.runtime.emit.kernel import Kernel
from separable.runtime.validation import footprints

GUARD = 64  # floats on both sides of the output


class Memory:
    """Floats between two pages that cannot be touched: who leaves them crashes the process.

    They end where the second page begins, so that it is hit by the first float behind them.
    """

    def __init__(self, values: torch.Tensor) -> None:
        page, size = mmap.PAGESIZE, 4 * values.numel()
        pages = -(-size // page)
        self._map = mmap.mmap(-1, (pages + 2) * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.floats = torch.frombuffer(self._map, dtype=torch.float32)
        begin = ((pages + 1) * page - size) // 4
        self.floats = self.floats[begin : begin + values.numel()]
        self.floats.copy_(values)
        for border in (start, start + (pages + 1) * page):
            if ctypes.CDLL(None).mprotect(ctypes.c_void_p(border), page, 0):
                raise OSError("mprotect failed")


def run(kernel: Kernel, operands: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Run a kernel on flat operands; returns its `size` floats of output.

    The output is NaN before, and what lies around it must not change. Of the operands, only those
    floats exist that the kernel's description says it may touch.
    """
    code = jit.compile_ir(kernel.ir, kernel.machine)
    band = torch.full((GUARD,), 123.0)
    lengths = footprints(kernel)
    assert len(lengths) == len(operands) + 1
    assert all(length <= x.numel() for length, x in zip(lengths, operands, strict=False))
    assert lengths[-1] <= size
    pieces = [x.view(-1)[:length] for x, length in zip(operands, lengths, strict=False)]
    assert all(x.is_contiguous() and x.dtype == torch.float32 for x in pieces)
    nan = torch.full((size,), float("nan"))
    *given, result = [Memory(x) for x in (*pieces, torch.cat([band, nan, band]))]
    output = result.floats[GUARD : GUARD + size]
    pointers = [*(memory.floats.data_ptr() for memory in given), output.data_ptr()]
    addresses = (ctypes.c_void_p * len(pointers))(*pointers)
    call = jit.foreign(code, "kernel", 3)
    half = kernel.tasks // 2
    call(ctypes.addressof(addresses), half, kernel.tasks)
    call(ctypes.addressof(addresses), 0, half)
    assert torch.equal(result.floats[:GUARD], band), "wrote before its output"
    assert torch.equal(result.floats[-GUARD:], band), "wrote behind its output"
    return output.clone()


def assert_as_exact_as_eager(
    actual: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    times: float = 4.0,
    least: float = 0.0,
) -> None:
    """The error against float64 is at most `times` eager float32's own, or two roundings.

    Of few outputs, eager's may by chance be next to none, and all be far smaller than what they are
    sums of: `least` is the error that is allowed whatever they are.
    """
    assert actual.shape == exact.shape
    assert bool(torch.equal(actual.isnan(), exact.isnan()))
    scale = exact.nan_to_num().abs().max().item() or 1.0
    own = (eager.double() - exact).nan_to_num().abs().max().item()
    error = (actual.double() - exact).nan_to_num().abs().max().item()
    assert error <= max(times * own, 2.4e-7 * scale, least), (error, own, scale)
