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
        self._addresses = np.zeros(0, dtype=np.int64)
        self._old: list[np.ndarray] = []

    def addresses(self, count: int) -> int:
        """The address of an array of `count` workers, started if need be."""
        with self._lock:
            while len(self._mailboxes) < count:
                self._start()
        return int(self._addresses.ctypes.data)

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
        }
        for name, value in values.items():
            fields[driver.WORKER.index(name)] = value
        code = driver_code(host())
        work = jit.foreign(code, "work", ctypes.c_int64)
        threading.Thread(
            target=work,
            args=(int(fields.ctypes.data),),
            name=f"separable-{len(self._mailboxes) + 1}",
            daemon=True,
        ).start()
        self._mailboxes.append(fields)
        # A new array, the old one kept: a running launch may still read it.
        self._old.append(self._addresses)
        self._addresses = np.array([f.ctypes.data for f in self._mailboxes], dtype=np.int64)

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
