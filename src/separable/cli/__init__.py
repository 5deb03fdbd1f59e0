"""The command `separable`: one module per room, one command per thing to do.

A command imports torch inside its function, so that `separable --help` answers at once.
"""

from __future__ import annotations

import click

from .. import __version__
from . import (
    completion,
    conversion,
    cost,
    demo,
    doctor,
    exporting,
    reporting,
    runtime,
    training,
)
from .errors import Group

__all__ = ["main"]


@click.group("separable", cls=Group, invoke_without_command=True)
@click.version_option(__version__, package_name="separable")
@click.pass_context
def main(context: click.Context) -> None:
    """Depthwise separable convolutions that pay: count, convert, train and run them in PyTorch."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


COMMANDS = (
    cost.count,
    cost.compare,
    cost.measure,
    cost.crosscheck,
    conversion.convert,
    runtime.explain,
    runtime.bench,
    training.train,
    training.finetune,
    reporting.report,
    exporting.export,
    demo.demo,
    doctor.doctor,
    completion.completion,
)
for command in COMMANDS:
    main.add_command(command)
