"""The recipe of a training: the one source of options, YAML keys and documentation."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar, get_args

from ..images import IMAGENET_MEAN, IMAGENET_STD
from ..limits import whole_number
from ..outputs import Outputs

if typing.TYPE_CHECKING:
    import torch

Optimizer = Literal["sgd", "adamw"]
Augment = Literal["none", "shift", "flip-shift", "flip-crop"]
BatchNorm = Literal["train", "frozen"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]

_RATES = {"sgd": 0.1, "adamw": 1e-3}
_DECAYS = {"sgd": 1e-4, "adamw": 0.05}
# A student begins near its teacher, and is to stay there.
_NEAR_RATES = {"sgd": 1e-3, "adamw": 3e-4}
_RELATIVE_RATE = 4e-3


def _field(default: Any, text: str, least: float | None = None, most: float = math.inf) -> Any:
    """Build a field with its help text, and the range that its value must lie in."""
    return dataclasses.field(
        default=default, metadata={"help": text, "least": least, "most": most, "resumable": False}
    )


def _machine(default: Any, text: str, least: float | None = None, most: float = math.inf) -> Any:
    """Build a field that says how a training runs: a resumed one may change it."""
    metadata = {"help": text, "least": least, "most": most, "resumable": True}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Each field is an option of the command and a key of the YAML file.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a value is out of its range.
    """

    epochs: int = _field(90, "Passes over the training data.", 1)
    batch_size: int = _field(
        128, "Inputs per optimiser step, over all processes and accumulated passes.", 1
    )
    accumulate: int = _field(1, "Passes that each process takes its share of a step in.", 1)
    optimizer: Optimizer = _field("sgd", "SGD with Nesterov momentum, or AdamW.")
    lr: float | None = _field(
        None, "Peak learning rate; left out 0.1 for SGD and 0.001 for AdamW.", 0
    )
    relative: bool | None = _field(
        None, "Multiply the rate of each tensor by its size, AdamW only; left out no."
    )
    momentum: float = _field(0.9, "Of SGD.", 0, 1)
    weight_decay: float | None = _field(
        None,
        "Not on norms, biases and depthwise filters; left out 0.0001 for SGD, 0.05 for AdamW.",
        0,
    )
    warmup: float = _field(0.05, "Share of the steps in which the rate rises linearly.", 0, 1)
    clip: float = _field(0.0, "Largest norm of the gradient; 0 does not clip.", 0)
    label_smoothing: float = _field(0.1, "Share of a label that all classes get alike.", 0, 1)
    ema: float = _field(
        0.999, "Decay of the weights' moving average, which is what is saved; 0 keeps none.", 0, 1
    )
    augment: Augment | None = _field(
        None,
        "Random changes of the training inputs; left out flip-crop for folders and Hugging Face, "
        "flip-shift for cifar10, shift for digits, none for tensors and datasets.",
    )
    image_size: int | None = _field(
        None, "Height and width of images; left out 224, for digits and cifar10 32.", 1
    )
    mean: tuple[float, ...] = _field(IMAGENET_MEAN, "Of an image's pixels in 0 to 1.")
    std: tuple[float, ...] = _field(IMAGENET_STD, "Their standard deviation.", 1e-6)
    validation: float = _field(
        0.1, "Share held out, drawn at random, where the data has no part for it.", 0, 0.9
    )
    seed: int = _field(
        0,
        "Of a named network's first weights, the data's order and changes, and dropout.",
        0,
        2**32 - 1,
    )
    precision: Precision = _field("32-true", "Of the arithmetic, mixed with 32 bit or throughout.")
    compile: bool = _field(False, "Compile the network with torch.compile.")
    channels_last: bool = _field(True, "Keep images in memory channels last.")
    workers: int | None = _machine(
        None, "Processes that load data; left out 2 for images, 0 for what is in memory.", 0, 256
    )
    checkpoint_every: int = _machine(
        1000, "Optimiser steps between checkpoints; there is one after each epoch too.", 1
    )
    tensorboard: bool | None = _machine(
        None, "Write TensorBoard's events too; left out where tensorboard is installed."
    )
    accelerator: str = _machine("auto", "cpu, gpu, or another that Lightning knows.")
    devices: str = _machine("auto", "Devices per machine: a number, or a list as in 0,2.")
    num_nodes: int = _machine(1, "Machines.", 1)
    strategy: str = _machine("auto", "ddp, fsdp, or another that Lightning knows.")
    sync_batchnorm: bool = _machine(
        False, "Take batch-norm statistics over all processes; GPUs only."
    )

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _coerced(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)  # frozen from here on
            least, most = field.metadata["least"], field.metadata["most"]
            values = value if isinstance(value, tuple) else (value,)
            if any(isinstance(each, float) and not math.isfinite(each) for each in values):
                raise ValueError(f"`{field.name}` (={value!r}) must be finite")
            if value is None or least is None:
                continue
            if not all(least <= each <= most for each in values):
                span = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise ValueError(f"`{field.name}` (={value!r}) must be {span}")

        if self.relative and self.optimizer != "adamw":
            raise ValueError(
                f"`relative` (=True) needs steps that do not grow with the gradient; leave it out, "
                f"or take optimizer=adamw in place of {self.optimizer}"
            )

    @property
    def peak_lr(self) -> float:
        """The largest learning rate."""
        return _RATES[self.optimizer] if self.lr is None else self.lr

    @property
    def is_relative(self) -> bool:
        """Whether each tensor's rate is multiplied by its size."""
        return bool(self.relative)

    @property
    def dtype(self) -> torch.dtype | None:
        """What the network is turned into; None leaves it as it is."""
        import torch  # not for the help of a command

        return {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(self.precision)

    @property
    def decay(self) -> float:
        """The weight decay of the weights that have one."""
        return _DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Build a recipe from options by name.

        Raises:
            ValueError: a name is unknown.
        """
        check_names(options, [field.name for field in dataclasses.fields(cls)], cls.__name__)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ready for YAML."""
        plain = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in plain.items()
        }


@dataclass(frozen=True)
class Distillation(Recipe):
    """How a converted network learns from its original; other defaults, and a few fields more."""

    epochs: int = _field(1, "Passes over the training data.", 1)
    batch_size: int = _field(
        16, "Inputs per optimiser step, over all processes and accumulated passes.", 1
    )
    optimizer: Optimizer = _field("adamw", "SGD with Nesterov momentum, or AdamW.")
    lr: float | None = _field(
        None,
        "Peak learning rate; left out 0.001 for SGD, for AdamW 0.004 if relative, 0.0003 if not.",
        0,
    )
    relative: bool | None = _field(
        None, "Multiply the rate of each tensor by its size, AdamW only; left out yes for AdamW."
    )
    weight_decay: float | None = _field(
        0.0,
        "Not on norms, biases and depthwise filters; None takes that of `train`.",
        0,
    )
    label_smoothing: float = _field(0.0, "Share of a label that all classes get alike.", 0, 1)
    ema: float = _field(
        0.98, "Decay of the weights' moving average, which is what is saved; 0 keeps none.", 0, 1
    )
    validation: float = _field(
        0.0, "Share held out, drawn at random, where the data has no part for it.", 0, 0.9
    )
    outputs: Outputs = _field(
        "auto", "Scores of classes, or values; auto goes by the conversion, else by their shape."
    )
    temperature: float = _field(4.0, "Both networks' logits are divided by it.", 0.01)
    features: float = _field(
        1.0, "Weight of the block ends' squared error over their variance; 0 leaves them out.", 0
    )
    blocks: tuple[str, ...] = _field(
        (), "Modules to match, as in layer1.*; left out the blocks that hold converted layers."
    )
    batch_norm: BatchNorm = _field(
        "frozen", "Whether batch norm goes on learning its statistics, or keeps them."
    )
    labels: bool = _field(False, "Learn from labels too, half and half.")

    @property
    def peak_lr(self) -> float:
        """The largest learning rate."""
        if self.lr is not None:
            return self.lr
        return _RELATIVE_RATE if self.is_relative else _NEAR_RATES[self.optimizer]

    @property
    def is_relative(self) -> bool:
        """Whether each tensor's rate is multiplied by its size."""
        return self.optimizer == "adamw" if self.relative is None else self.relative


class Described(NamedTuple):
    """A field of a recipe: its name, type, possible values, meaning and default."""

    name: str
    kind: Any
    choices: tuple[str, ...]
    text: str
    default: Any


def described(kind: type[Recipe]) -> list[Described]:
    """The fields of a recipe, for options and documentation."""
    hints = typing.get_type_hints(kind)
    return [
        Described(field.name, *_kind(hints[field.name]), field.metadata["help"], field.default)
        for field in dataclasses.fields(kind)
    ]


def _kind(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """The type of a field that is not None, and its possible values if they are few."""
    unions = (types.UnionType, typing.Union)
    choices = get_args(hint) if typing.get_origin(hint) in unions else (hint,)
    kind = next(choice for choice in choices if choice is not type(None))
    return (str, get_args(kind)) if typing.get_origin(kind) is Literal else (kind, ())


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def _coerced(name: str, value: Any, hint: Any) -> Any:
    """Check a value's type; whole numbers pass as floats, lists and single values as tuples."""
    kind, choices = _kind(hint)
    if value is None and type(None) in get_args(hint):
        return None
    if choices:
        if value not in choices:
            raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(choices)}")
        return value
    if typing.get_origin(kind) is tuple:
        parts = list(value) if isinstance(value, list | tuple) else [value]
        return tuple(_coerced(name, part, get_args(kind)[0]) for part in parts)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        try:  # YAML reads 1e-3 as a text
            return float(value)
        except ValueError:
            pass
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if kind is int:
        return whole_number(name, value)
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` (={value!r}) must be of the type {kind.__name__}")
    return value


def check_names(given: Iterable[str], known: Iterable[str], of: str) -> None:
    """Refuse names that are not known, naming the nearest that is.

    Raises:
        ValueError: a name is unknown.
    """
    known = list(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise ValueError(f"{of} has no `{name}`; the nearest is `{close[0]}`")


def read_config(path: str | os.PathLike[str], known: Iterable[str]) -> dict[str, Any]:
    """Read a YAML file of options.

    Args:
        path: the file.
        known: the keys that it may have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML mapping, or a key is unknown.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"--config: there is no file {os.fspath(path)!r}")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"--config: {os.fspath(path)!r} is no YAML file: {words}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config: {os.fspath(path)!r} must hold KEY: VALUE lines")
    check_names(content, known, f"--config {os.fspath(path)!r}")
    return content
