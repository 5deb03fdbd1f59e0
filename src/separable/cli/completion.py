"""The command that prints a shell's completion script."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_SEPARABLE_COMPLETE"
"""of the environment, by which a script asks for words"""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that completes `separable` and its options in a shell.

    \b
    eval "$(separable completion bash)"      in ~/.bashrc
    eval "$(separable completion zsh)"       in ~/.zshrc
    separable completion fish | source       in ~/.config/fish/config.fish
    """
    root = click.get_current_context().find_root()
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(root.command, {}, "separable", VARIABLE)
    click.echo(script.source())
