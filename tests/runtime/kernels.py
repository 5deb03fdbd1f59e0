"""Running one kernel between guard bands, and the measure its error is held to."""

from __future__ import annotations

import ctypes

import torch

from separable.runtime import jit
from separable.runtime.emit.kernel import Kernel

GUARD = 64  # floats on both sides of the output


def run(kernel: Kernel, operands: list[torch.Tensor], size: int) -> torch.Tensor:
    """Run a kernel on flat operands; returns its `size` floats of output.

    The output is NaN before, and what lies around it must not change.
    """
    code = jit.compile_ir(kernel.ir, kernel.machine)
    memory = torch.full((size + 2 * GUARD,), float("nan"))
    memory[:GUARD] = memory[-GUARD:] = 123.0
    output = memory[GUARD : GUARD + size]
    tensors = [*operands, output]
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
    addresses = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    call = jit.foreign(code, "kernel", ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    half = kernel.tasks // 2
    call(ctypes.addressof(addresses), half, kernel.tasks)
    call(ctypes.addressof(addresses), 0, half)
    assert bool((memory[:GUARD] == 123.0).all()), "wrote before its output"
    assert bool((memory[-GUARD:] == 123.0).all()), "wrote behind its output"
    return output


def assert_as_exact_as_eager(
    actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, times: float = 4.0
) -> None:
    """The error against float64 is at most `times` eager float32's own, or two roundings."""
    assert actual.shape == exact.shape
    assert bool(torch.equal(actual.isnan(), exact.isnan()))
    scale = exact.nan_to_num().abs().max().item() or 1.0
    own = (eager.double() - exact).nan_to_num().abs().max().item()
    error = (actual.double() - exact).nan_to_num().abs().max().item()
    assert error <= max(times * own, 2.4e-7 * scale), (error, own, scale)
