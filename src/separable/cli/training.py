"""Commands of the training: train and finetune."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ..training.recipe import Distillation, Recipe, described, read_config
from .options import (
    MODEL_HELP,
    load,
    load_converted,
    numbers,
    table_or_json,
    torch_threads,
)
from .options import names as read_names

DATA_HELP = "A folder, digits, cifar10 or hf:NAME."


# how an option that is a list is read
_LISTS: dict[Any, Any] = {tuple[float, ...]: numbers, tuple[str, ...]: read_names}


def _recipe(kind: type[Recipe]) -> Callable[[Any], Any]:
    """Add an option for each field of a recipe."""

    def add(function: Any) -> Any:
        for field in reversed(described(kind)):
            flag = "--" + field.name.replace("_", "-")
            if field.kind is bool:
                flag += f"/--no-{flag[2:]}"
            default = "" if field.default in (None, ()) else f" [default: {_shown(field.default)}]"
            function = click.option(
                flag,
                field.name,
                type=click.Choice(field.choices)
                if field.choices
                else _LISTS.get(field.kind, field.kind),
                default=None,  # so that what the command line leaves out may stand in a file
                help=field.text + default,
            )(function)
        return function

    return add


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _shared(function: Any) -> Any:
    """Add the options of both commands that are no field of the recipe."""
    for option in reversed(
        [
            click.option("--data", help=DATA_HELP),
            click.option("--validation-data", help="The same; else a part of the data."),
            click.option(
                "--out",
                type=click.Path(path_type=Path, file_okay=False),
                help="Folder of the run; runs/COMMAND if left out.",
            ),
            click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out."),
            click.option(
                "--config",
                type=click.Path(path_type=Path, dir_okay=False),
                help="YAML file of options; those given here go before it.",
            ),
        ]
    ):
        function = option(function)
    return function


@click.command(epilog=MODEL_HELP)
@click.option("--model", help="The network; see below. It gets as many classes as the data.")
@_shared
@_recipe(Recipe)
@torch_threads
@table_or_json
def train(
    model: str | None,
    data: str | None,
    validation_data: str | None,
    out: Path | None,
    resume: bool,
    config: Path | None,
    style: Any,
    **options: Any,
) -> str:
    """Train a network on labelled images.

    A folder holds a folder of images per class, or two of that kind named train and val. The
    run's folder gets the best and last weights, checkpoints, metrics.csv, curves.png, config.yaml
    and environment.json.

    \b
    separable train --model separable:mobilenet_v1 --data photos --epochs 90
    separable train --model separable:mobilenet_v1,stem_stride=1 --data digits --epochs 10
    """
    from .. import training

    given = _configured(
        config,
        {"model": model, "data": data, "validation_data": validation_data},
        options,
        Recipe,
        needed=("model", "data"),
    )
    names = {key: given.pop(key) for key in ("model", "data", "validation_data")}
    network = training.train(
        names["model"],
        names["data"],
        validation_data=names["validation_data"],
        out=out or Path("runs/train"),
        resume=resume,
        names=names,
        progress=_watched(),
        **given,
    )
    return _told(network.run, style)


@click.command(epilog=MODEL_HELP)
@click.option("--student", help="The converted network, as `separable convert` wrote it.")
@click.option("--teacher", help="The original, a MODEL; see below.")
@click.option("--weights", help="The teacher's trained weights, safetensors.")
@_shared
@_recipe(Distillation)
@torch_threads
@table_or_json
def finetune(
    student: str | None,
    teacher: str | None,
    weights: str | None,
    data: str | None,
    validation_data: str | None,
    out: Path | None,
    resume: bool,
    config: Path | None,
    style: Any,
    **options: Any,
) -> str:
    """Recover a converted network from its original, on images without labels.

    The student learns to return what its teacher does. Its new weights are last.safetensors in
    the run's folder, which `separable.load` reads.

    \b
    separable finetune --student slim.safetensors --teacher torchvision:resnet18 \\
        --weights in.safetensors --data photos --epochs 1
    """
    from .. import training

    keys = ("student", "teacher", "weights", "data", "validation_data")
    own = dict(zip(keys, (student, teacher, weights, data, validation_data), strict=True))
    given = _configured(config, own, options, Distillation, needed=("student", "teacher", "data"))
    names = {key: given.pop(key) for key in keys}
    weights_file = None if names["weights"] is None else Path(names["weights"])
    original = load(names["teacher"], weights_file)
    network = training.finetune(
        load_converted(names["student"], original, "--student"),
        teacher=original,
        data=names["data"],
        validation_data=names["validation_data"],
        out=out or Path("runs/finetune"),
        resume=resume,
        names=names,
        progress=_watched(),
        **given,
    )
    return _told(network.run, style)


def _configured(
    config: Path | None,
    own: Mapping[str, Any],
    options: Mapping[str, Any],
    kind: type[Recipe],
    needed: tuple[str, ...],
) -> dict[str, Any]:
    """Options of the file, under those of the command line."""
    fields = [field.name for field in described(kind)]
    before = {} if config is None else read_config(config, [*own, *fields])
    given = {key: value for key, value in {**own, **options}.items() if value is not None}
    result = {**dict.fromkeys(own), **before, **given}
    for key in own:
        if not isinstance(result[key], str | None):
            raise click.UsageError(f"--config: `{key}` (={result[key]!r}) must be a text")
    for key in needed:
        if result[key] is None:
            raise click.UsageError(f"--{key} is missing")
    return result


def _watched() -> bool:
    return sys.stderr.isatty()


def _told(run: Any, style: str) -> str:
    """What a run did, from the first of its processes."""
    from ..training.running import is_first_process

    if run.skipped:
        from ..images import skipped

        click.echo(skipped(run.skipped), err=True)
    if not is_first_process():
        raise click.exceptions.Exit(0)
    click.echo(f"The run's folder is {run.folder}.", err=True)
    return json.dumps(run.to_dict(), indent=2) if style == "json" else str(run)
