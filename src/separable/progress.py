"""Progress bars: on stderr of a terminal, for work that takes more than two seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

DELAY = 2.0
"""seconds before a bar appears"""
TICK = 0.5
"""seconds between its redraws, in steps that last"""

WITHOUT_TOTAL = "{desc}: {elapsed}"


@contextmanager
def progress(
    what: str, total: int | None = None, unit: str = "it", shown: bool = True
) -> Iterator[Any]:
    """Show how far the body is, with the time left; it calls `update()` after each step.

    A thread redraws the bar, so that it appears and its clock goes on while a step lasts. For a
    loop that is timed, tqdm itself is better: nothing runs beside it.

    Args:
        what: the work.
        total: its steps; None where they are not known, and the time so far is shown.
        unit: what a step is.
        shown: whether to show it at all.

    Yields:
        tqdm's bar.
    """
    with tqdm(
        desc=what,
        total=total,
        unit=unit,
        delay=DELAY,
        leave=False,
        smoothing=0,  # the mean rate, as redraws are no steps
        bar_format=None if total else WITHOUT_TOTAL,
        disable=None if shown else True,
    ) as bar:
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


def _redraw(bar: Any, done: threading.Event) -> None:
    if done.wait(DELAY):
        return
    while True:
        bar.refresh()
        bar.last_print_t = time.time()  # so that `close` knows there is a line to clear
        if done.wait(TICK):
            return
