"""Words for what is printed."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number and what it counts, as in 1 epoch and 2 epochs."""
    return f"{number:,} {noun}" + "s" * (number != 1)
