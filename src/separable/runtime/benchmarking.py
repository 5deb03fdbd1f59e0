"""The same network in several runtimes, side by side in one process, in turns."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import io
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from prettytable import PrettyTable, TableStyle
from torch import nn
from torch.utils import _pytree as pytree

from ..cost.preserving import copied
from ..failures import in_a_line
from ..limits import check_threads
from ..progress import progress, timed
from ..wording import counted
from . import machine as machines
from .backend import compile as compile_model
from .checking import TOLERANCE, outputs_deviation
from .onnx_graph import onnx_program
from .roofline import Peak

Runner = Callable[[], Any]
Start = Callable[[nn.Module, torch.Tensor, int], Runner]
_CALLS = 3  # measured per turn
_WARM = 0.05  # seconds of calls before them, in which caches and clock come back from the rest
_REST = 0.1  # seconds before a turn, in which the threads of the one before stop spinning


@dataclass(frozen=True)
class Timing:
    """One runtime's time.

    Attributes:
        runtime: its name.
        version: of its package.
        median: milliseconds per call.
        low: first quartile.
        high: third quartile.
        best: the fastest call.
        error: largest difference to eager's output, relative to the largest output.
        note: why there is no time, if there is none.
    """

    runtime: str
    version: str
    median: float = 0.0
    low: float = 0.0
    high: float = 0.0
    best: float = 0.0
    error: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One network at one input size and thread count.

    Attributes:
        network: its name.
        input_size: of the input.
        threads: per call.
        macs: multiply-accumulates in the kernels of `separable`.
        peak_gflops: of one core, the best burst of 80 µs in the same run.
        at_peak: how long one core takes for `macs / threads` multiply-adds in registers and nothing
            else, measured behind each turn of `separable`, at the clock it leaves.
        timings: one per runtime.
        conditions: machine, versions and date.
    """

    network: str
    input_size: tuple[int, ...]
    threads: int
    macs: int
    peak_gflops: float
    at_peak: Timing
    timings: tuple[Timing, ...]
    conditions: dict[str, str]

    @property
    def advantage(self) -> float:
        """The best other median over that of `separable`; below 1 where it loses."""
        own, other = self._own, self._best_other
        return other.median / own.median if own and other else 0.0

    @property
    def _own(self) -> Timing | None:
        return next((t for t in self.timings if t.runtime == "separable" and t.median), None)

    @property
    def _best_other(self) -> Timing | None:
        others = (t for t in self.timings if t.median and t.runtime not in ("separable", "unfused"))
        return min(others, key=lambda timing: timing.median, default=None)

    @property
    def peak_share(self) -> float:
        """The median time at the multiply-add peak over that of `separable`; 0 if it failed."""
        return self.at_peak.median / self._own.median if self._own else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        shares = {"advantage": self.advantage, "peak_share": self.peak_share}
        return dataclasses.asdict(self) | shares

    def __str__(self) -> str:
        table = PrettyTable()
        table.set_style(TableStyle.MARKDOWN)
        table.field_names = ["runtime", "version", "median ms", "quartiles", "best", "error"]
        table.align = "r"
        table.align["runtime"] = "l"
        for t in self.timings:
            row = [
                f"{t.median:.2f}",
                f"{t.low:.2f}-{t.high:.2f}",
                f"{t.best:.2f}",
                f"{t.error:.0e}",
            ]
            table.add_row([t.runtime, t.version, *(row if t.median else [t.note, "", "", ""])])
        size = "×".join(map(str, self.input_size))
        other = self._best_other
        beside = (
            f"{self.advantage:.2f} times as fast as {other.runtime}, the best other; "
            if other
            else ""
        )
        verdict = (
            f"separable is {beside}at {self.peak_share:.0%} of the multiply-add peak: "
            f"{self.at_peak.median:.2f} ({self.at_peak.low:.2f}-{self.at_peak.high:.2f}) ms for "
            f"the multiply-adds alone, {self.peak_gflops:.0f} GFLOP/s in the best burst"
        )
        return f"{self.network}, {size}, {counted(self.threads, 'thread')}\n{table}\n" + (
            verdict if self._own else "separable has no time, so there is nothing to compare"
        )


def benchmark(
    model: nn.Module,
    input_size: Sequence[int],
    threads: int = 1,
    against: Sequence[str] = ("eager", "channels_last", "inductor", "onnxruntime", "openvino"),
    turns: int = 30,
    network: str = "",
    isa: str | None = None,
) -> Benchmark:
    """Time a network in `separable` and other runtimes, in turns, outputs checked first.

    Args:
        model: in eval mode; takes one float32 tensor.
        input_size: of its input.
        threads: that every runtime may use.
        against: any of `"eager"`, `"channels_last"`, `"inductor"`, `"onnxruntime"`, `"openvino"`,
            and `"unfused"`, which is `separable` with each convolution on its own.
        turns: how often each runtime's turn comes; each turn is three measured calls.
        network: its name in the result.
        isa: the instruction set of `separable`.

    Raises:
        ValueError: if a runtime is unknown, `threads` is out of its range, or the network's outputs
            are not finite.
    """
    unknown = set(against) - set(_RUNTIMES)
    if unknown:
        raise ValueError(f"`against` has {sorted(unknown)}; known are {', '.join(_RUNTIMES)}")
    check_threads(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return _benchmark(model, tuple(input_size), threads, against, turns, network, isa)
    finally:
        torch.set_num_threads(before)


def _benchmark(
    model: nn.Module,
    input_size: tuple[int, ...],
    threads: int,
    against: Sequence[str],
    turns: int,
    network: str,
    isa: str | None,
) -> Benchmark:
    x = torch.randn(input_size, generator=torch.Generator().manual_seed(0))
    expected = pytree.tree_leaves(model(x))
    if not all(output.isfinite().all() for output in expected):
        raise ValueError(
            f"`model` ({network or type(model).__name__}) gives NaN or infinity on random inputs, "
            "and no runtime can be held to that; check its weights"
        )
    compiled = compile_model(model, x, threads=threads, isa=isa)
    peers: dict[str, Start] = {**_RUNTIMES, "unfused": functools.partial(_unfused, isa=isa)}
    runners: dict[str, Runner] = {"separable": lambda: compiled(x)}
    notes: dict[str, str] = {}
    with progress("compiling", len(against), "runtime") as bar:
        for name in against:
            bar.set_description(f"compiling for {name}", refresh=False)
            try:
                runners[name] = peers[name](model, x, threads)
                runners[name]()
            except Exception as error:  # a runtime that is missing or fails is a row of the table
                runners.pop(name, None)
                notes[name] = in_a_line(error, 60)
            bar.update()
    errors: dict[str, float] = {}
    for name, run in list(runners.items()):
        result = [torch.as_tensor(np.asarray(output)) for output in pytree.tree_leaves(run())]
        errors[name] = outputs_deviation(result, expected)
        if not errors[name] < TOLERANCE:
            runners.pop(name)
            notes[name] = f"wrong output, error {errors[name]:.1e}"
    steps = compiled.program.schedule.steps
    macs = sum(step.kernel.does.macs for step in steps if step.kernel)
    peak = Peak(compiled.program.machine)
    at_peak: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in timed(range(turns), network or "measuring"):
        for name, run in runners.items():
            time.sleep(_REST)
            end = time.perf_counter() + _WARM
            run()
            while time.perf_counter() < end:
                run()
            times[name] += [_milliseconds(run) for _ in range(_CALLS)]
            if name == "separable":
                # At the clock it leaves: wide vectors and memory traffic lower it for a while.
                at_peak.append(_milliseconds(lambda: peak.multiply_adds(macs // threads)))
        peak.measure()
    timings = [
        _timing(name, times.get(name, []), errors.get(name, 0.0), notes.get(name, ""))
        for name in ("separable", *against)
    ]
    return Benchmark(
        network=network,
        input_size=input_size,
        threads=threads,
        macs=macs,
        peak_gflops=peak.flops / 1e9,
        at_peak=_timing("multiply-adds", at_peak),
        timings=tuple(timings),
        conditions=conditions(compiled.program.machine),
    )


def _milliseconds(run: Runner) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _timing(name: str, times: list[float], error: float = 0.0, note: str = "") -> Timing:
    if not times:
        return Timing(name, _version(name), note=note)
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else 3 * times
    return Timing(name, _version(name), median, low, high, min(times), error)


def conditions(machine: machines.Machine) -> dict[str, str]:
    """Where and when: what a figure is worth little without."""
    return {
        "cpu": machine.cpu,
        "isa": machine.isa,
        "cores": str(machines.cores()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _version(runtime: str) -> str:
    package = {"eager": "torch", "channels_last": "torch", "inductor": "torch"}
    package["unfused"] = "separable"
    try:
        return importlib.metadata.version(package.get(runtime, runtime)).split("-")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unfused(model: nn.Module, x: torch.Tensor, threads: int, isa: str | None = None) -> Runner:
    compiled = compile_model(model, x, threads=threads, isa=isa, fuse=False)
    return lambda: compiled(x)


def _eager(model: nn.Module, x: torch.Tensor, threads: int) -> Runner:
    return lambda: model(x)


def _channels_last(model: nn.Module, x: torch.Tensor, threads: int) -> Runner:
    clone = copied(model).to(memory_format=torch.channels_last)
    y = x.to(memory_format=torch.channels_last)
    return lambda: clone(y)


def _inductor(model: nn.Module, x: torch.Tensor, threads: int) -> Runner:
    import torch._inductor.config as config

    with config.patch(freezing=True):
        compiled = torch.compile(model)
        with torch.no_grad():
            compiled(x)

    def run() -> Any:
        with torch.no_grad():
            return compiled(x)

    return run


def _onnx(model: nn.Module, x: torch.Tensor) -> bytes:
    file: Any = io.BytesIO()
    onnx_program(model, (x,)).save(file)
    return bytes(file.getvalue())


def _onnxruntime(model: nn.Module, x: torch.Tensor, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        _onnx(model, x), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def _openvino(model: nn.Module, x: torch.Tensor, threads: int) -> Runner:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(_onnx(model, x)), "CPU", settings)
    request = compiled.create_infer_request()
    data = x.numpy()
    return lambda: list(request.infer([data]).values())


_RUNTIMES: dict[str, Start] = {
    "unfused": _unfused,
    "eager": _eager,
    "channels_last": _channels_last,
    "inductor": _inductor,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
