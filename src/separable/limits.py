"""Bounds of arguments that several rooms take."""

from __future__ import annotations

MOST_THREADS = 1024
"""far more than pays anywhere; torch crashes where the system refuses them"""


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that no call can use; None is left to the caller.

    Raises:
        ValueError: it is no whole number from 1 to `MOST_THREADS`.
    """
    if threads is None:
        return
    if (
        isinstance(threads, bool)
        or not isinstance(threads, int)
        or not 1 <= threads <= MOST_THREADS
    ):
        raise ValueError(
            f"`threads` (={threads!r}) must be a whole number from 1 to {MOST_THREADS}"
        )
