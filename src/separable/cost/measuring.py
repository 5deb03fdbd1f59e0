"""Latency and peak memory, measured: one callable alone, or several in turn for honest ratios."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
import platform
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..limits import check_threads, whole_number
from ..progress import progress, timed
from .inputs import Inputs, Sizes, make_inputs
from .measurement import LayerTime, Measurement
from .preserving import train_flags, untouched


def measure(
    model: Callable[..., Any],
    inputs: Any = None,
    *,
    input_size: Sizes | None = None,
    kwargs: Mapping[str, Any] | None = None,
    repeats: int = 20,
    min_seconds: float = 1.0,
    warmup: int = 3,
    threads: int | None = None,
    per_layer: bool = False,
) -> Measurement:
    """Measure latency and peak memory of a forward pass.

    The pass runs in eval mode, without gradients; see also `keep_freed_memory`. Afterwards the
    model and the random state are as before, also when the model raises.

    Args:
        model: any callable: an `nn.Module`, a compiled one, a function.
        inputs: its input tensor, or a tuple or list of its positional arguments.
        input_size: in place of `inputs`, the shape of the input with its batch, or a list of shapes
            for several; normal noise in the dtype and on the device of the model's parameters.
        kwargs: keyword arguments of the call.
        repeats: number of times to take.
        min_seconds: least time to spend on the repeats together, in seconds. Each repeat is the
            mean of as many calls as it takes.
        warmup: calls in advance, untimed; at least 1.
        threads: threads that an operator of PyTorch may use; None leaves the present number.
        per_layer: whether to time every module too, in passes of their own. Hooks cost a few
            microseconds per module, and keep PyTorch from fusing transformer layers.

    Returns:
        The measurement. Printing it draws a table.

    Raises:
        TypeError: `model` is not callable, neither or both of `inputs` and `input_size` are given,
            or an argument is no number of its kind.
        ValueError: an argument is out of its range, the tensors are on the meta device, or
            `per_layer` is asked of a callable whose modules do not run one by one.
    """
    (measurement,) = measure_interleaved(
        [model],
        inputs,
        input_size=input_size,
        kwargs=kwargs,
        repeats=repeats,
        min_seconds=min_seconds,
        warmup=warmup,
        threads=threads,
        per_layer=per_layer,
    )
    return measurement


def measure_interleaved(
    models: Sequence[Callable[..., Any]],
    inputs: Any = None,
    *,
    input_size: Sizes | None = None,
    kwargs: Mapping[str, Any] | None = None,
    repeats: int = 20,
    min_seconds: float = 1.0,
    warmup: int = 3,
    threads: int | None = None,
    per_layer: bool = False,
) -> tuple[Measurement, ...]:
    """Measure several callables on the same inputs in turn: A B, B A, A B ...

    What slows the machine down for a while slows all of them down, so that `times[i]` of one over
    `times[i]` of another, `Measurement.ratio_to`, is an honest ratio.

    Args:
        models: the callables.
        inputs: as in `measure`, like the other arguments.
        input_size: noise for all is made as the first model needs it.
        kwargs: keyword arguments of the calls.
        repeats: number of times to take of each.
        min_seconds: least time to spend on the repeats of each together, in seconds.
        warmup: calls of each in advance, untimed; at least 1.
        threads: threads that an operator of PyTorch may use; None leaves the present number.
        per_layer: whether to time every module too.

    Returns:
        One measurement per callable, in their order.

    Raises:
        TypeError: as for `measure`, like the next.
        ValueError: an argument is out of its range.
    """
    for model in models:
        if not callable(model):
            raise TypeError(f"`model` (a {type(model).__name__}) must be callable")
        if per_layer:
            _check_runs_module_by_module(model)
    check_timing(repeats=repeats, warmup=warmup, min_seconds=min_seconds, threads=threads)
    benchmark = _benchmark()

    modules = [model for model in models if isinstance(model, nn.Module)]
    given = make_inputs(modules[0] if modules else None, input_size, inputs=inputs, kwargs=kwargs)
    tensors = [_tensors(model, given) for model in models]
    devices = [_device(each) for each in tensors]

    with ExitStack() as stack:
        for module in modules:
            # a forward in eval mode may write to buffers, hardly to parameters
            stack.enter_context(
                untouched(module, written=lambda tensor: not isinstance(tensor, nn.Parameter))
            )
            stack.enter_context(train_flags(module, False))
        # inference_mode would leave inference tensors in the caches that models keep, which a
        # later backward pass refuses, and makes torch.compile compile anew
        stack.enter_context(torch.no_grad())
        threads = torch.get_num_threads() if threads is None else threads
        stack.enter_context(benchmark.set_torch_threads(threads))
        # a model that writes to its input writes to a copy
        given = given.map(torch.clone)
        calls = [partial(model, *given.args, **given.kwargs) for model in models]
        with progress("warming up", warmup * len(calls), "call") as bar:
            for call in calls:
                for _ in range(warmup):
                    call()
                    bar.update()
        memory = [_peak_memory(call, device) for call, device in zip(calls, devices, strict=True)]
        times = _interleaved_times(calls, repeats, min_seconds)
        layers = [
            _layer_times(model, call, repeats) if per_layer else ()
            for model, call in zip(models, calls, strict=True)
        ]

    return tuple(
        Measurement(
            times=tuple(times[i]),
            peak_memory_bytes=memory[i],
            threads=threads,
            device=device_name(devices[i]),
            dtype=_dtype_names(tensors[i]),
            versions=versions_of(devices[i]),
            layers=layers[i],
        )
        for i in range(len(models))
    )


def check_timing(
    *, repeats: int, warmup: int = 1, min_seconds: Any = 0.0, threads: int | None = None
) -> None:
    """Refuse what `measure` can't time with.

    Raises:
        TypeError: an argument is no number of its kind.
        ValueError: an argument is out of its range.
    """
    whole_number("repeats", repeats, least=1)
    whole_number("warmup", warmup, least=1)
    check_threads(threads)
    if isinstance(min_seconds, bool) or not isinstance(min_seconds, Real):
        raise TypeError(f"`min_seconds` (={min_seconds!r}) must be a number of seconds")
    if not 0 <= float(min_seconds) < math.inf:
        raise ValueError(f"`min_seconds` (={min_seconds}) must be a number of seconds, 0 or more")


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory, so that page faults are not measured as arithmetic.

    PyTorch allocates every activation on the CPU anew. glibc may give a large one back to the
    system when it is freed, and then a forward pass takes a page fault per 4 KiB of output, by
    the chance of what else was allocated, which can outweigh the arithmetic. Call this first in a
    process of its own, such as a benchmark; it holds until the process ends. The command line does.

    Returns:
        Whether the C library took it; False where it is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def _benchmark() -> ModuleType:
    """`torch.utils.benchmark`; its import is slow, for it looks for compilers, and logs of them."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # CUDA's compiler without a GPU is no fault here
    try:
        return import_module("torch.utils.benchmark")
    finally:
        logger.setLevel(level)


def _interleaved_times(
    calls: Sequence[Callable[[], Any]], repeats: int, min_seconds: float
) -> list[list[float]]:
    """Return `repeats` times in seconds per call, for each of `calls`."""
    # as many calls per repeat as fill its share of the time, by the faster of two
    guesses = [max(1e-9, min(_seconds(call, 1) for _ in range(2))) for call in calls]
    numbers = [max(1, math.ceil(min_seconds / repeats / guess)) for guess in guesses]
    times: list[list[float]] = [[] for _ in calls]
    for repeat in timed(range(repeats), "measuring"):
        # to and fro, so that a steady drift favours none
        order = range(len(calls)) if repeat % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            if len(calls) > 1:
                calls[i]()  # the other one has emptied the caches
            times[i].append(_seconds(calls[i], numbers[i]))
    return times


def _seconds(call: Callable[[], Any], number: int) -> float:
    """Return the mean seconds of a call; the timer waits for what runs on an accelerator."""
    benchmark = _benchmark()

    return timeit.timeit(call, timer=benchmark.timer, number=number) / number


def _peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most bytes that a call holds at once beyond those allocated before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with _quiet_kineto(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.kineto_results is not None
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = np.cumsum([0, *(event.nbytes() for event in events)])
    return int(held.max())


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keep the profiler's log off stderr; it reads its level from the environment, once."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]


def _check_runs_module_by_module(model: Any) -> None:
    compiled = isinstance(model, nn.Module) and (
        hasattr(model, "_orig_mod")
        or isinstance(model, torch.jit.ScriptModule)
        or any(module._compiled_call_impl is not None for module in model.modules())
    )
    if compiled or not isinstance(model, nn.Module):
        kind = "compiled " * compiled + type(model).__name__
        raise ValueError(
            f"`per_layer` (=True) needs an nn.Module whose modules run one by one, got a {kind}"
        )


def _layer_times(
    model: Callable[..., Any], call: Callable[[], Any], repeats: int
) -> tuple[LayerTime, ...]:
    """Time every module by hooks, which are removed again."""
    benchmark = _benchmark()

    assert isinstance(model, nn.Module)
    running: list[list[float]] = []  # of each module being run: start, seconds in its children
    passes: list[dict[nn.Module, list[float]]] = []  # calls, inclusive and own seconds

    def enter(module: nn.Module, args: Any) -> None:
        passes[-1].setdefault(module, [0, 0.0, 0.0])
        running.append([benchmark.timer(), 0.0])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        start, below = running.pop()
        inclusive = benchmark.timer() - start
        if running:
            running[-1][1] += inclusive
        figures = passes[-1][module]
        for i, figure in enumerate((1, inclusive, inclusive - below)):
            figures[i] += figure

    names = {module: name for name, module in model.named_modules()}
    with ExitStack() as hooks:
        for module in names:
            # outside of the model's own hooks, whose time belongs to the module
            hooks.enter_context(module.register_forward_pre_hook(enter, prepend=True))
            hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        for _ in timed(range(repeats + 1), "timing modules"):
            passes.append({})
            call()
    measured = passes[1:]  # the first is a warm-up
    return tuple(
        LayerTime(
            name=names[module],
            kind=type(module).__name__,
            calls=int(calls),
            inclusive=float(np.median([each[module][1] for each in measured if module in each])),
            own=float(np.median([each[module][2] for each in measured if module in each])),
        )
        for module, (calls, _, _) in measured[0].items()
    )


def _tensors(model: Any, given: Inputs) -> list[Tensor]:
    """Return the tensors of the model, then those of the inputs."""
    own = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    leaves = tree_leaves((given.args, dict(given.kwargs)))
    return own + [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _device(tensors: Sequence[Tensor]) -> torch.device:
    devices = {tensor.device for tensor in tensors}
    if any(device.type == "meta" for device in devices):
        raise ValueError("tensors on the meta device do not compute; `count` takes them")
    # a model on an accelerator may keep a buffer or take an input on the CPU
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def device_name(device: torch.device) -> str:
    """Name a device; a CPU with its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(named, name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _dtype_names(tensors: Sequence[Tensor]) -> str:
    dtypes = {tensor.dtype for tensor in tensors if isinstance(tensor, nn.Parameter)}
    dtypes = dtypes or {tensor.dtype for tensor in tensors}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def versions_of(device: torch.device) -> dict[str, str]:
    """Versions of Python, PyTorch and this package, and of CUDA on such a device."""
    from separable import __version__

    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "separable": __version__,
    }
    if device.type == "cuda" and torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions
