"""The command group: every error is one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from ..failures import first_line
from .completion import VARIABLE

_PACKAGE = Path(__file__).parents[1]
FAILED = 2
INTERRUPTED = 130  # 128 + SIGINT, as in a shell
TERMINATED = 143  # 128 + SIGTERM


class Group(click.Group):
    """A click group that reports whatever a command raises in one line.

    Commands find what was typed under "command" in the root context's `meta`.
    """

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Note what was typed."""
        typed = shlex.join([self.name or "separable", *args])
        context = super().make_context(info_name, args, parent, **extra)
        context.meta["command"] = typed
        return context

    def invoke(self, context: click.Context) -> Any:
        """Run the command that was typed; errors name its options, not arguments."""
        try:
            return super().invoke(context)
        except Exception as error:
            command = self.commands.get(context.invoked_subcommand or "")
            _rename(error, {} if command is None else _typed_names(command))
            raise

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; exits with 0, 2 after an error, or 130 after Ctrl-C."""
        if VARIABLE in os.environ:  # a shell asks; click answers and leaves
            return super().main(args, prog_name, VARIABLE)
        try:
            # without its standalone mode click raises, and returns the exit code of `--help`
            with warnings.catch_warnings():
                warnings.showwarning = _warn  # type: ignore[assignment]
                code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            _fail(error.format_message())
        except (Exception, SystemExit) as error:  # code of the user's may leave, too
            if isinstance(error, SystemExit) and (error.code == TERMINATED or _is_of_click(error)):
                raise  # a training that SIGTERM ended; the answer to `... | head`
            _fail(describe(error))
        sys.exit(code if isinstance(code, int) else 0)


def _typed_names(command: click.Command) -> dict[str, str]:
    """What is typed for each parameter of a command: its option, or MODEL."""
    names: dict[str, str] = {}
    for parameter in command.params:
        typed = parameter.opts[0]
        if isinstance(parameter, click.Option):
            names[typed.removeprefix("--").replace("-", "_")] = typed
        else:
            typed = parameter.human_readable_name
        names.setdefault(parameter.name or "", typed)
    return names


@contextmanager
def named(**options: str) -> Iterator[None]:
    """Name options in the errors of a function that takes their values under other names."""
    try:
        yield
    except Exception as error:
        _rename(error, options)
        raise


def _rename(error: Exception, names: Mapping[str, str]) -> None:
    """Say what was typed in place of the arguments in an error of this package.

    One of `--config` is left: it speaks of keys of a file.
    """
    if not _is_ours(error) or str(error).startswith("--config"):
        return
    error.args = tuple(
        re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), each)
        if isinstance(each, str)
        else each
        for each in error.args
    )


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised in this package, and not in somebody else's code."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _PACKAGE in Path(frames[-1].filename).parents


def _is_of_click(error: BaseException) -> bool:
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised).parent == Path(click.__file__).parent


def _warn(message: Warning | str, *_: Any) -> None:
    """A warning in one line, without the place in the source that gave it."""
    click.echo(f"Warning: {' '.join(str(message).split())}", err=True)


def _fail(message: str) -> NoReturn:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(FAILED)


def describe(error: BaseException) -> str:
    """Say in one line what went wrong, and where if it was in somebody else's code.

    An error that this package raises names the argument and the remedy, so its message is enough.
    """
    message = first_line(error)
    if _is_ours(error):
        return message or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    # the innermost line that the user may have written, before torch's own
    theirs = [
        frame
        for frame in frames
        if _PACKAGE not in Path(frame.filename).parents
        and "site-packages" not in frame.filename
        and Path(frame.filename).is_file()
        and not frame.filename.startswith(sys.base_prefix)
    ]
    place = f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""
    return ": ".join(filter(None, [type(error).__name__, message])) + place
