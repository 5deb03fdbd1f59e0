"""Arguments and options that several commands share."""

from __future__ import annotations

import functools
import math
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..limits import MOST_THREADS
from ..outputs import OUTPUTS
from .errors import named

if TYPE_CHECKING:
    from torch import nn

Function = Callable[..., Any]

SEED = click.IntRange(0, 2**32 - 1)  # what torch and numpy both take

IMAGENET = ("0.485,0.456,0.406", "0.229,0.224,0.225")
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
FORMATS = ("table", "json", "csv", "markdown", "html")

MODEL_HELP = """\b
MODEL is one of
  separable:NAME         e.g. separable:mobilenet_v1,conv=regular,width=0.5
  torchvision:NAME       e.g. torchvision:resnet18,num_classes=10
  timm:NAME              e.g. timm:mobilenetv1_100
  path/to/file.py:NAME   a function that returns the network, or the network
Commas separate its options, KEY=VALUE. Weights are random; the network is in
eval mode."""


def size(text: str) -> tuple[int, ...]:
    """Read a shape such as 1x3x224x224."""
    return _numbers(text, least=1)


def numbers(text: str) -> tuple[float, ...]:
    """Read one number, or one per channel: 0.485,0.456,0.406."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} must be numbers with commas between them") from None
    if not all(map(math.isfinite, found)):
        raise click.BadParameter(f"{text!r} must be finite numbers")
    return found


def positive(text: str) -> tuple[float, ...]:
    """The same, of what may be divided by."""
    found = numbers(text)
    if min(found) <= 0:
        raise click.BadParameter(f"{text!r} must be greater than 0")
    return found


def padding(text: str) -> str | tuple[int, ...]:
    """Read "same", "valid", or samples per dimension such as 1x2."""
    return text if text in ("same", "valid") else _numbers(text, least=0)


def _numbers(text: str, least: int) -> tuple[int, ...]:
    numbers = text.split("x")
    if not all(re.fullmatch("[0-9]+", number) and int(number) >= least for number in numbers):
        raise click.BadParameter(
            f"{text!r} must be whole numbers of at least {least} with an x between them"
        )
    return tuple(map(int, numbers))


def input_size(function: Function) -> Function:
    """Add `--input-size`."""
    return click.option(
        "--input-size",
        type=size,
        default="1x3x224x224",
        show_default=True,
        help="Shape of the input, batch included.",
    )(function)


def dtype(function: Function) -> Function:
    """Add `--dtype`."""
    return click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Of the input; that of the network's weights if left out. int64 makes indices.",
    )(function)


def example(network: nn.Module, input_size: tuple[int, ...], dtype: str | None) -> dict[str, Any]:
    """The inputs of a network as arguments of a function of the account."""
    if dtype is None:
        return {"input_size": input_size}
    import torch

    from ..cost.inputs import make_inputs

    return {"inputs": make_inputs(network, input_size, dtypes=getattr(torch, dtype)).args}


def device(text: str) -> str:
    """Check a device such as cuda:0."""
    import torch

    try:
        torch.device(text)
    except RuntimeError:
        raise click.BadParameter(f"{text!r} must be a device such as cpu or cuda:0") from None
    return text


_THREADS_HELP = "Threads that an operator may use; torch's own number if left out."


def threads(function: Function, help: str = _THREADS_HELP) -> Function:
    """Add `--threads`."""
    return click.option("--threads", type=click.IntRange(1, MOST_THREADS), help=help)(function)


def torch_threads(function: Function, help: str = _THREADS_HELP) -> Function:
    """Add `--threads`, and let torch compute with so many while the command runs."""

    @functools.wraps(function)
    def run(*args: Any, threads: int | None, **kwargs: Any) -> Any:
        if threads is None:
            return function(*args, **kwargs)
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return threads(run, help)


def weights(function: Function) -> Function:
    """Add `--weights`."""
    return click.option(
        "--weights",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Trained weights, safetensors; random if left out.",
    )(function)


def outputs(function: Function) -> Function:
    """Add `--outputs`."""
    return click.option(
        "--outputs",
        type=click.Choice(OUTPUTS),
        default="auto",
        show_default=True,
        help="What the network returns: scores of classes, or values as of a regression. auto "
        "takes all [N, k] for scores.",
    )(function)


def photos(flag: str, help: str) -> Callable[[Function], Function]:
    """Add an option for a folder of images, and `--images`, `--mean` and `--std` to read them."""
    options = (
        click.option(flag, type=click.Path(path_type=Path, file_okay=False), help=help),
        click.option(
            "--images",
            "most",
            type=click.IntRange(1),
            default=512,
            show_default=True,
            help="Most images to take from the folder, at random.",
        ),
        click.option(
            "--mean",
            type=numbers,
            default=IMAGENET[0],
            show_default=True,
            help="Of the channels, 0 to 1.",
        ),
        click.option(
            "--std",
            type=positive,
            metavar="NUMBERS",
            default=IMAGENET[1],
            show_default=True,
            help="What to divide them by.",
        ),
    )
    return lambda function: functools.reduce(lambda f, option: option(f), options[::-1], function)


def check_writable(out: Path) -> None:
    """Refuse, before the work, a file whose folder is not there or takes none."""
    folder = out.absolute().parent
    if not folder.is_dir():
        raise click.UsageError(f"--out: there is no folder {str(folder)!r}")
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise click.UsageError(
            f"--out: no file can be written in {str(folder)!r}: {error.strerror}"
        ) from None


def names(text: str) -> tuple[str, ...]:
    """Read names with commas between them."""
    return tuple(text.split(","))


def json_flag(function: Function) -> Function:
    """Add `--json`, and print the text that the command returns, alone on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")(
        _printing(function)
    )


def _printing(function: Function) -> Function:
    """Print the text that a command returns; what a network or a library prints is sent to stderr.

    So stdout holds the result alone.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        with redirect_stdout(sys.stderr):
            text = function(*args, **kwargs)
        click.echo(text)

    return run


def output_format(function: Function, formats: Sequence[str] = FORMATS) -> Function:
    """Add `--format` and `--json`, and print the text that the command returns."""
    choice = click.option(
        "--format",
        "style",
        type=click.Choice(formats),
        default="table",
        show_default=True,
        help="How to print the result.",
    )
    json = click.option("--json", "style", flag_value="json", help="Short for --format json.")
    return choice(json(_printing(function)))


def table_or_json(function: Function) -> Function:
    """The same for a command that prints text or JSON and no table of its own."""
    return output_format(function, ("table", "json"))


def load_converted(path: Path | str, network: nn.Module, option: str) -> nn.Module:
    """Read a conversion of a network from the file that an option names."""
    from .. import conversion

    with named(path=option):
        return conversion.load(path, model=network)


def load(name: str, weights: Path | None = None) -> nn.Module:
    """Build the network that MODEL names, in eval mode, with weights of a safetensors file."""
    from ..models import create_model, load_weights
    from ..progress import progress

    with progress("building the network"):
        network = create_model(name).eval()
    if weights is not None:
        load_weights(network, weights, "--weights")
    return network
