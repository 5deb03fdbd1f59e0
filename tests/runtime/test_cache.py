"""The cache of object code: kept, checked, rebuilt, switched off, and shared by many processes."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from separable.runtime import jit
from separable.runtime.emit.elementwise import Map
from separable.runtime.emit.kernel import Kernel
from separable.runtime.machine import host

from .kernels import run


def double(x: torch.Tensor) -> torch.Tensor:
    kernel = Kernel(Map((37,), ((1,),), (1,), ("mul", ("x", 0), 2.0)), host())
    return run(kernel, [x], 37)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEPARABLE_CACHE_DIR", str(tmp_path))
    jit._LOADED.clear()
    return tmp_path / "kernels"


def test_kept_and_rebuilt(cache: Path) -> None:
    x = torch.randn(37)
    assert torch.equal(double(x), 2 * x)
    (entry,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    good = entry.read_bytes()
    for bad in (good[:-1], b"", good[:40] + bytes([good[40] ^ 1]) + good[41:]):
        entry.write_bytes(bad)
        jit._LOADED.clear()
        assert torch.equal(double(x), 2 * x)
        assert entry.read_bytes() == good
    assert [file.name for file in cache.iterdir()] == [entry.name]


def test_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(37)
    double(x)
    jit._LOADED.clear()
    monkeypatch.setattr(jit, "emit_object", lambda *_: pytest.fail("compiled again"))
    assert torch.equal(double(x), 2 * x)


def test_an_entry_of_another_kernel_is_not_taken(cache: Path) -> None:
    x = torch.randn(37)
    double(x)
    (entry,) = cache.iterdir()
    other = Kernel(Map((37,), ((1,),), (1,), ("mul", ("x", 0), 3.0)), host())
    run(other, [x], 37)
    (second,) = set(cache.iterdir()) - {entry}
    entry.write_bytes(second.read_bytes())
    jit._LOADED.clear()
    assert torch.equal(double(x), 2 * x)


def test_an_interrupted_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        double(torch.randn(37))
    assert not list(cache.iterdir())


def test_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPARABLE_CACHE", "0")
    double(torch.randn(37))
    assert not cache.exists()


def test_a_folder_open_to_others_is_closed(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    double(torch.randn(37))
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_folder_that_is_a_link_is_not_used(cache: Path) -> None:
    elsewhere = cache.parent / "elsewhere"
    elsewhere.mkdir()
    cache.symlink_to(elsewhere)
    x = torch.randn(37)
    assert torch.equal(double(x), 2 * x)
    assert not list(elsewhere.iterdir())


_COMPILES = """
import sys, torch
from torch import nn
from separable.runtime import jit
from separable.runtime.emit.elementwise import Map
from separable.runtime.emit.kernel import Kernel
from separable.runtime.machine import host
import ctypes
x, y = torch.arange(37.), torch.zeros(37)
addresses = (ctypes.c_void_p * 2)(x.data_ptr(), y.data_ptr())
for again in range(2):
    print("ready", flush=True)
    sys.stdin.readline()
    for factor in range(60):
        jit._LOADED.clear()
        kernel = Kernel(Map((37,), ((1,),), (1,), ("mul", ("x", 0), float(factor % 20))), host())
        code = jit.compile_ir(kernel.ir, host())
        call = jit.foreign(code, "kernel", 3)
        call(ctypes.addressof(addresses), 0, kernel.tasks)
        assert torch.equal(y, x * (factor % 20)), factor
"""


def start(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def test_many_processes_share_it(cache: Path) -> None:
    """Three compile the same 20 kernels at once, and again while their entries are damaged."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _COMPILES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(3)
    ]
    try:
        start(processes)
        start(processes)  # comes through when all have finished the first round
        assert len(list(cache.iterdir())) == 20
        draws, deadline = random.Random(0), time.monotonic() + 60
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < deadline
            entries = list(cache.iterdir())
            if entries:
                damage(draws, draws.choice(entries))
            time.sleep(0.001)
        for process in processes:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def damage(draws: random.Random, entry: Path) -> None:
    """Cut an entry short, flip a bit of it, or take it away."""
    try:
        data = entry.read_bytes()
        kind = draws.choice(["cut", "flip", "remove"])
        if kind == "remove" or not data:
            entry.unlink()
        elif kind == "cut":
            entry.write_bytes(data[: draws.randrange(len(data))])
        else:
            at = draws.randrange(len(data))
            entry.write_bytes(
                data[:at] + bytes([data[at] ^ 1 << draws.randrange(8)]) + data[at + 1 :]
            )
    except OSError:
        pass
