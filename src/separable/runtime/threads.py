"""Worker threads shared by all compiled models of this process."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from functools import cache

import numpy as np

from . import jit
from .emit import driver
from .machine import Machine, host

_LIBC = ctypes.CDLL(None)


def address_of(name: str) -> int:
    """The address of a function of the C library."""
    return ctypes.cast(getattr(_LIBC, name), ctypes.c_void_p).value or 0


@cache
def driver_code(machine: Machine) -> jit.Code:
    """The driver's machine code."""
    return jit.compile_ir(driver.emit(machine), machine)


class Workers:
    """Threads that wait in native code, asleep unless a job came within the last microseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mailboxes: list[np.ndarray] = []
        self._address = 0
        self._arrays: list[np.ndarray] = []

    def addresses(self, count: int) -> int:
        """The address of an array of `count` workers, started if need be."""
        if len(self._mailboxes) < count:
            with self._lock:
                while len(self._mailboxes) < count:
                    self._start()
        return self._address

    def _start(self) -> None:
        # Two cache lines: a mailbox is polled, and its neighbours must not be written to.
        fields = np.zeros(driver.LINE_WORDS * 2, dtype=np.int64)
        reader, writer = os.pipe()
        values = {
            "slot": len(self._mailboxes) + 1,
            "reader": reader,
            "writer": writer,
            "read": address_of("read"),
            "write": address_of("write"),
            **self._affinity(),
        }
        for name, value in values.items():
            fields[driver.WORKER.index(name)] = value
        code = driver_code(host())
        work = jit.foreign(code, "work", 1)
        started = threading.Event()

        def run() -> None:
            fields[driver.WORKER.index("thread")] = threading.get_native_id()
            started.set()
            work(int(fields.ctypes.data))

        name = f"separable-{len(self._mailboxes) + 1}"
        threading.Thread(target=run, name=name, daemon=True).start()
        started.wait()
        # A new array, the old ones kept: a running launch may still read them.
        addresses = [mine.ctypes.data for mine in (*self._mailboxes, fields)]
        self._arrays.append(np.array(addresses, dtype=np.int64))
        self._address = int(self._arrays[-1].ctypes.data)
        self._mailboxes.append(fields)  # last: who sees as many as it needs takes the address

    def _affinity(self) -> dict[str, int]:
        """What a worker's fields say of the CPUs it may run on; nothing if there is no choice."""
        if not hasattr(os, "sched_getaffinity"):
            return {}
        cpus = os.sched_getaffinity(0)
        if len(cpus) < 2 or max(cpus) >= 64 * driver.MASK_WORDS:
            return {}
        mask = sum(1 << cpu for cpu in cpus).to_bytes(8 * driver.MASK_WORDS, "little")
        self._arrays.append(np.frombuffer(bytearray(mask), dtype=np.int64))
        return {
            "allowed": int(self._arrays[-1].ctypes.data),
            "avoided": -1,
            "getcpu": address_of("sched_getcpu"),
            "setaffinity": address_of("sched_setaffinity"),
        }

    def stop(self) -> None:
        """Send every worker home; one that is still at work gets a moment to finish."""
        deadline = time.monotonic() + 1
        for fields in self._mailboxes:
            mailbox = driver.WORKER.index("mailbox")
            while fields[mailbox] and time.monotonic() < deadline:
                time.sleep(0.001)
            fields[mailbox] = driver.STOP
            os.write(int(fields[driver.WORKER.index("writer")]), bytes(8))


_WORKERS = Workers()


def workers() -> Workers:
    """The workers of this process."""
    return _WORKERS


def _after_fork() -> None:
    # Threads do not survive a fork: the child starts its own when it needs them.
    global _WORKERS
    _WORKERS = Workers()


def _at_exit() -> None:
    _WORKERS.stop()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
