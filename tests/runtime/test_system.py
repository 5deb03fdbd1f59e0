"""Around the kernels: torch.compile, explain, benchmarks, fork, the arena."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import separable
from separable.runtime import benchmarking, dynamo, jit
from separable.runtime.benchmarking import Benchmark, Timing, benchmark
from separable.runtime.dynamo import GraphRunner, backend
from separable.runtime.machine import available_isas, host
from separable.runtime.memory import Buffer, plan_arena


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.Conv2d(8, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()


def test_broken_ir_raises() -> None:
    with pytest.raises(RuntimeError):
        jit.compile_ir("define void @kernel() { ret i32 0 }", host())


def test_torch_compile() -> None:
    made: list[object] = []

    def spy(*args: object, **named: object) -> object:
        made.append(backend(*args, **named))  # type: ignore[arg-type]
        return made[-1]

    model = network()
    fast = torch.compile(model, backend=spy)
    with torch.no_grad():
        for batch in (1, 2, 3):
            x = torch.randn(batch, 3, 20, 20)
            torch.testing.assert_close(fast(x), model(x))
        model[1].running_mean.add_(1.0)
        torch.testing.assert_close(fast(x), model(x))
    assert all(isinstance(runner, GraphRunner) for runner in made)
    x.requires_grad_()
    fast(x).sum().backward()
    assert x.grad is not None
    assert not isinstance(made[-1], GraphRunner)
    torch.compiler.reset()


def test_the_oldest_shape_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "SHAPES", 2)
    made: list[Any] = []
    fast = torch.compile(
        network(), backend=lambda *args: made.append(backend(*args)) or made[-1], dynamic=True
    )
    with torch.no_grad():
        for batch in (2, 3, 4, 2):
            x = torch.randn(batch, 3, 20, 20)
            torch.testing.assert_close(fast(x), network()(x))
    assert [len(runner._compiled) for runner in made] == [2]
    torch.compiler.reset()


def test_a_kernel_that_would_leave_its_buffers_is_no_reason_to_go_back_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("beyond its buffers")

    monkeypatch.setattr("separable.runtime.backend.check_footprint", broken)
    fast = torch.compile(network(), backend="separable")
    with torch.no_grad(), pytest.raises(ValueError, match="beyond its buffers"):
        fast(torch.randn(1, 3, 20, 20))
    torch.compiler.reset()


def test_entry_point() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    target = project["project"]["entry-points"]["torch_dynamo_backends"]["separable"]
    module, _, name = target.partition(":")
    assert getattr(importlib.import_module(module), name) is backend


def test_explain_and_assembly() -> None:
    model = nn.Sequential(network()[:5], nn.ConvTranspose2d(10, 4, 2, dilation=2)).eval()
    compiled = separable.compile(model, torch.randn(1, 3, 20, 20), fuse=False)
    explanation = compiled.explain(repeats=2)
    assert [row.operation for row in explanation.rows[:3]] == ["3×3", "depthwise", "pointwise"]
    assert explanation.rows[0].fused == ("0.1", "0.2")
    assert [row.layer for row in explanation.fallbacks] == ["1"]
    assert "torch: aten.conv_transpose2d" in str(explanation)
    macs = [8 * 27 * 100, 8 * 9 * 100, 8 * 10 * 100]
    assert [row.macs for row in explanation.rows[:3]] == macs
    assert "kernel:" in compiled.assembly("0.0")
    with pytest.raises(ValueError, match="`layer`"):
        compiled.assembly("nowhere")


def test_benchmark() -> None:
    result = benchmark(network(), (1, 3, 20, 20), against=["eager"], turns=2, network="small")
    assert [t.runtime for t in result.timings] == ["separable", "eager"]
    assert all(t.median > 0 and not t.note for t in result.timings)
    assert "small" in str(result)
    assert result.to_dict()["peak_share"] == result.peak_share > 0
    assert benchmark(network(), (1, 3, 20, 20), against=[], turns=1).peak_share > 0
    with pytest.raises(ValueError, match="known are"):
        benchmark(network(), (1, 3, 20, 20), against=["tensorflow"])


@pytest.mark.skipif("sse2" not in available_isas(), reason="a CPU without SSE2")
def test_all_of_ours_is_benchmarked_for_one_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, sets = benchmarking.compile_model, []

    def spy(*args: Any, **named: Any) -> object:
        sets.append(named.get("isa"))
        return compiled(*args, **named)

    monkeypatch.setattr(benchmarking, "compile_model", spy)
    benchmark(network(), (1, 3, 20, 20), against=["unfused"], turns=1, isa="sse2")
    assert sets == ["sse2", "sse2"]


def test_figures_of_a_benchmark() -> None:
    result = Benchmark(
        network="small",
        input_size=(1, 3, 20, 20),
        threads=2,
        macs=1000,
        peak_gflops=100.0,
        at_peak=Timing("multiply-adds", "", median=3.0),
        timings=(
            Timing("separable", "", median=4.0),
            Timing("unfused", "", median=1.0),
            Timing("eager", "", median=20.0),
            Timing("openvino", "", median=10.0),
            Timing("onnxruntime", "", note="not installed"),
        ),
        conditions={},
    )
    assert (result.peak_share, result.advantage) == (0.75, 2.5)
    assert "small, 1×3×20×20, 2 threads\n" in str(result)
    assert "separable is 2.50 times as fast as openvino, the best other; at 75%" in str(result)


def test_benchmark_says_whose_output_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("separable.runtime.benchmarking.TOLERANCE", 0.0)
    result = benchmark(network(), (1, 3, 20, 20), against=["eager"], turns=1)
    assert all("wrong output" in t.note for t in result.timings)
    assert result.peak_share == result.advantage == 0
    assert "wrong output" in str(result)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_arena_never_overlaps(lives: list[tuple[int, int, int]]) -> None:
    buffers = [Buffer("arena", size) for size, *_ in lives]
    spans = [(min(a, b), max(a, b)) for _, a, b in lives]
    steps = [
        [b for b, (first, last) in zip(buffers, spans, strict=True) if t in (first, last)]
        for t in range(10)
    ]
    total = plan_arena(steps)
    for i, (a, (a_first, a_last)) in enumerate(zip(buffers, spans, strict=True)):
        assert 0 <= a.offset <= total - a.size
        for b, (b_first, b_last) in zip(buffers[:i], spans[:i], strict=True):
            if a_first <= b_last and b_first <= a_last:
                assert a.offset + a.size <= b.offset or b.offset + b.size <= a.offset


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use() -> None:
    # In a process of its own: torch's threads make a fork of this one unsafe.
    script = (
        "import os, torch, separable\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3)).eval()\n"
        "x = torch.randn(1, 3, 64, 64)\n"
        "fast = separable.compile(model, x, threads=2)\n"
        "expected = fast(x)\n"
        "child = os.fork()\n"
        "same = all(torch.equal(fast(x), expected) for _ in range(20))\n"
        "if child == 0:\n"
        "    os._exit(0 if same else 3)\n"
        "assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="no choice of CPUs",
)
def test_sleeping_workers_are_woken_on_another_cpu() -> None:
    # In a process of its own, whose threads are these alone.
    script = (
        "import os, threading, time, torch, separable\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3)).eval()\n"
        "x = torch.randn(1, 3, 64, 64)\n"
        "fast = separable.compile(model, x, threads=2)\n"
        "fast(x)\n"
        "worker = next(t for t in threading.enumerate() if t.name == 'separable-1').native_id\n"
        "every = os.sched_getaffinity(0)\n"
        "for cpu in sorted(every)[:2] * 2:\n"
        "    os.sched_setaffinity(0, {cpu})\n"
        "    time.sleep(0.05)\n"
        "    fast(x)\n"
        "    assert os.sched_getaffinity(worker) == every - {cpu}\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_weights_that_change_all_the_time_hold_no_call_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), torch.randn(1, 3, 20, 20)
    fast = separable.compile(model, x, threads=2)
    monkeypatch.setattr(fast.program._watched, "changed", lambda: True)
    with torch.no_grad():
        model[0].weight.mul_(2)
    torch.testing.assert_close(fast(x), model(x).detach())


def test_instances_of_a_class_may_run_at_once() -> None:
    def instance(scale: float) -> nn.Module:
        model = network()
        with torch.no_grad():
            model[0].weight.mul_(scale)
        return model

    torch.compiler.reset()
    x = torch.randn(1, 3, 20, 20)
    models = [instance(1.0), instance(-1.0)]
    fast = [torch.compile(model, backend="separable") for model in models]
    wrong: list[float] = []

    def work(number: int) -> None:
        with torch.no_grad():
            expected = models[number](x)
            for _ in range(200):
                wrong.append(float((fast[number](x) - expected).abs().max()))

    with torch.no_grad():
        for each in fast:
            each(x)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 400
    assert max(wrong) < 1e-4


def test_a_call_that_finds_no_workers_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = network(), torch.randn(1, 3, 20, 20)
    fast = separable.compile(model, x, threads=2)
    fast(x)

    def none(count: int) -> int:
        raise OSError("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(fast.program._workers, "addresses", none)
        for _ in range(3):
            with pytest.raises(OSError, match="too many"):
                fast(x)
    end = time.monotonic() + 10  # a worker may still be about to leave the first call
    while not all(frame.idle for frame in fast.program._frames) and time.monotonic() < end:
        time.sleep(0.01)
    assert all(frame.idle for frame in fast.program._frames)
    torch.testing.assert_close(fast(x), model(x).detach())


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no figures of threads")
def test_idle_workers_sleep() -> None:
    """For a while the workers take no time and are not run at all, however busy all others are."""

    def activity() -> list[list[str]]:
        folders = [
            Path(f"/proc/self/task/{thread.native_id}")
            for thread in threading.enumerate()
            if thread.name.startswith("separable-")
        ]
        assert folders
        switches = [
            line
            for folder in folders
            for line in (folder / "status").read_text().splitlines()
            if "ctxt_switches" in line
        ]
        seconds = [
            (folder / "stat").read_text().rpartition(")")[2].split()[11:13] for folder in folders
        ]
        return [switches, *seconds]

    compiled = separable.compile(network(), torch.randn(1, 3, 20, 20), threads=2)
    compiled(torch.randn(1, 3, 20, 20))
    end = time.monotonic() + 60
    while True:
        before = activity()
        time.sleep(0.2)
        if activity() == before:
            break
        assert time.monotonic() < end, "the workers do not come to rest"
