"""Progress bars: on stderr of a terminal, for work that takes more than two seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm

DELAY = 2.0
"""seconds before a bar appears"""
TICK = 0.5
"""seconds between its redraws, in steps that last"""

WITHOUT_TOTAL = "{desc}: {elapsed}"
SHARE = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
Step = TypeVar("Step")
_is_hidden = ContextVar("_is_hidden", default=False)
_measuring = threading.Event()  # while it is set, nothing is drawn beside what is measured


@contextmanager
def progress(
    what: str, total: float | None = None, unit: str | None = "it", shown: bool = True
) -> Iterator[Any]:
    """Show how far the body is, with the time left; it calls `update()` after each step.

    A thread redraws the bar, so that it appears and its clock goes on while a step lasts; it rests
    while a loop of `timed` runs.

    Args:
        what: the work.
        total: its steps; None where they are not known, and the time so far is shown.
        unit: what a step is; None for steps of unlike sizes, of whose sum the share is shown.
        shown: whether to show it, and what is below it.

    Yields:
        tqdm's bar.
    """
    with (
        hidden(not shown),
        tqdm(
            desc=what,
            total=total,
            unit=unit or "",
            delay=DELAY,
            leave=False,
            smoothing=0,  # the mean rate, as redraws are no steps
            bar_format=WITHOUT_TOTAL if not total else SHARE if unit is None else None,
            disable=_is_hidden.get() or None,
        ) as bar,
    ):
        if bar.disable:
            yield bar
            return
        done = threading.Event()
        ticker = threading.Thread(target=_redraw, args=(bar, done), daemon=True)
        ticker.start()
        try:
            yield bar
        finally:
            done.set()
            ticker.join()


@contextmanager
def hidden(is_hidden: bool = True) -> Iterator[None]:
    """Show no bars in the body."""
    token = _is_hidden.set(is_hidden or _is_hidden.get())
    try:
        yield
    finally:
        _is_hidden.reset(token)


def timed(steps: Iterable[Step], what: str) -> Iterator[Step]:
    """Go through the steps of a measurement with a bar of which nothing runs beside them."""
    outer = _measuring.is_set()
    _measuring.set()
    try:
        yield from tqdm(steps, what, leave=False, delay=DELAY, disable=_is_hidden.get() or None)
    finally:
        if not outer:
            _measuring.clear()


def _redraw(bar: Any, done: threading.Event) -> None:
    if done.wait(DELAY):
        return
    while True:
        if not _measuring.is_set():
            bar.refresh()
            bar.last_print_t = time.time()  # so that `close` knows there is a line to clear
        if done.wait(TICK):
            return
