"""What went wrong, in a few words."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty; nothing if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def whole_message(error: BaseException, most: int = 300) -> str:
    """An error's message in one line, cut to so many characters."""
    words = " ".join(str(error).split())
    return words if len(words) <= most else words[: most - 3] + "..."


def in_a_line(error: BaseException, most: int = 200) -> str:
    """An error's type and at most so many characters of the first line of its message."""
    return ": ".join(filter(None, [type(error).__name__, first_line(error)[:most]]))
