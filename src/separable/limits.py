"""Bounds of arguments that several rooms take."""

from __future__ import annotations

from numbers import Integral
from typing import Any

MOST_THREADS = 1024
"""far more than pays anywhere; torch crashes where the system refuses them"""


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or of numpy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(
    name: str, value: Any, least: int | None = None, most: int | None = None, where: str = ""
) -> int:
    """Check an argument that must be a whole number, and return it as an int.

    Args:
        name: of the argument, for errors.
        value: what was given.
        least: the smallest that will do; None for no bound.
        most: the largest.
        where: what follows the name in errors, as in " of layer `conv`".

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of its range.
    """
    if not is_whole(value):
        raise TypeError(f"`{name}`{where} (={value!r}) must be an int")
    if (least is not None and value < least) or (most is not None and value > most):
        span = f"at most {most}" if least is None else f"at least {least}"
        if None not in (least, most):
            span = f"from {least} to {most}"
        raise ValueError(f"`{name}`{where} (={value}) must be {span}")
    return int(value)


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that no call can use; None is left to the caller.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is not from 1 to `MOST_THREADS`.
    """
    if threads is not None:
        whole_number("threads", threads, 1, MOST_THREADS)
