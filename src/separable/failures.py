"""What went wrong, in a few words."""

from __future__ import annotations

import os
import sys
import warnings

_OWN = os.path.dirname(__file__) + os.sep


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, on any device: what failed may be right with more of it."""
    import torch  # not for the help of a command

    # the CPU's allocator raises no class of its own
    said = str(error) if isinstance(error, RuntimeError) else ""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in said
    )


def warn(message: str) -> None:
    """Warn at the line that called into this package, through however many of its functions."""
    import torch  # not for the help of a command

    # torch's decorators, as no_grad, stand between functions of the package
    passed = (_OWN, os.path.dirname(torch.__file__) + os.sep)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(passed):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
