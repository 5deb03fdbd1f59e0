"""Starting a training: `train` and `finetune`, their arguments checked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from ..conversion import Report
from ..conversion.sensitivity import Returned
from ..cost.preserving import copied
from ..models import create_model
from .checking import check_classes, check_training, input_channels, outputs_of
from .checkpoints import holds_run
from .feeding import Feeding, Given, resumable
from .learning import Distilling, Supervised
from .loading import WEIGHTS, drawing, is_plain
from .recipe import AnyRecipe, Distillation, Recipe
from .running import Place, is_first_process, run
from .sources import open_source


def train(
    model: nn.Module | str,
    data: Any,
    *,
    validation_data: Any = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    recipe: Recipe | None = None,
    names: Mapping[str, str | None] | None = None,
    progress: bool = True,
    **options: Any,
) -> nn.Module:
    """Train a network on labelled inputs.

    Args:
        model: maps `[N, C, *spatial]` to logits `[N, classes]`, and is left as it was; or a name
            as `separable.models.create_model` takes it, built with as many classes as the data
            has.
        data: one of

            * a folder of class folders, or one with such folders `train` and `val`,
            * "digits" (of scikit-learn, offline), "cifar10", or "hf:NAME" for a data set of the
              Hugging Face hub,
            * a pair of tensors: inputs `[N, C, *spatial]` and labels `[N]`,
            * a dataset of `(input, label)`, a DataLoader, or a LightningDataModule.
        validation_data: the same, to validate on; left out, the data's own part for it, or a
            share held out as the recipe says.
        out: folder for checkpoints, weights, metrics and records; None keeps nothing.
        resume: whether to go on from the last checkpoint in `out`, to the same weights as if it
            had never stopped. Without a checkpoint the training begins anew.
        recipe: how; the default is `Recipe()`.
        names: what `config.yaml` says of the model and the data.
        progress: whether to show a progress bar.
        **options: fields of the recipe to change.

    Returns:
        A new network in eval mode, with the attribute `run` (a `Run`).

    Raises:
        ValueError: an argument is out of range, the network does not fit the data, or `out` holds
            a run already.
        TypeError: an argument is of the wrong type.
        FileNotFoundError: there is no such folder.
        ImportError: a package that is needed is not installed.

    Example:
        >>> inputs, labels = torch.randn(256, 1, 8, 8), torch.randint(0, 4, (256,))
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
        >>> net = train(net, (inputs, labels), epochs=2, batch_size=32, progress=False)
        >>> net.run.steps
        14
    """
    recipe = _recipe(recipe, Recipe, options)
    if not isinstance(model, nn.Module | str):
        raise TypeError(f"`model` (a {type(model).__name__}) must be a torch.nn.Module or a name")
    own = _names(model=model, data=data, validation_data=validation_data)
    place = _place(out, resume, {**own, **(names or {})})
    channels = 3
    if isinstance(model, nn.Module):
        channels = input_channels(model)
    elif isinstance(data, str | Path):
        channels = input_channels(create_model(model))
    feeding, sample, classes = _feeding(data, validation_data, recipe, True, channels)
    if isinstance(model, str):
        given = "num_classes=" in model or classes is None or ".py:" in model
        with drawing(recipe.seed, WEIGHTS):
            model = create_model(model if given else f"{model},num_classes={classes}")
    if sample is not None:
        sample = _cast(sample, model, recipe)
        check_classes(outputs_of(model, sample, "model"), classes, "model")
        size = feeding.batch_size if isinstance(feeding, Feeding) else recipe.batch_size
        check_training(model, sample, max(1, size // recipe.accumulate), "model")
    return run(model, Supervised(_trainable(model, "model"), recipe), feeding, place, progress)


def finetune(
    student: nn.Module,
    *,
    teacher: nn.Module,
    data: Any,
    validation_data: Any = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    recipe: Distillation | None = None,
    names: Mapping[str, str | None] | None = None,
    progress: bool = True,
    **options: Any,
) -> nn.Module:
    """Recover a converted network from its original by distillation, without labels.

    The student learns to return what its teacher does: for logits the KL divergence of both,
    softened by a temperature (Hinton et al. 2015, arXiv:1503.02531); for other outputs the
    squared error. `outputs` says which they are; left at "auto", what the conversion took them
    for, or their shape. `labels=True` adds the cross-entropy to labels, half and half.

    Args:
        student: what `separable.convert` or `separable.load` returned; it is left as it was.
        teacher: the original, which returns outputs of the same shape; it is left as it was.
        data: as in `train`, without labels: a folder of images, a tensor `[N, C, *spatial]`, a
            dataset or loader of inputs, or any that `train` takes, whose labels are not read.
        validation_data: the same, to measure the divergence on.
        out: as in `train`.
        resume: as in `train`.
        recipe: how; the default is `Distillation()`.
        names: as in `train`.
        progress: as in `train`.
        **options: fields of the recipe to change.

    Returns:
        A new network in eval mode, with the attribute `run` and the student's `report`, without
        the error, which is another one now; `separable.save` writes it.

    Raises:
        ValueError: as in `train`; or student and teacher differ in the shape of their outputs, or
            return no logits where `outputs` says so.
        TypeError: an argument is of the wrong type.
        FileNotFoundError: there is no such folder.
        ImportError: a package that is needed is not installed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU()).eval()
        >>> inputs = torch.randn(64, 8, 12, 12)
        >>> slim = separable.convert(model, inputs, budget="macs=0.5", progress=False)
        >>> slim = finetune(slim, teacher=model, data=inputs, progress=False)
        >>> slim.run.steps
        2
    """
    recipe = _recipe(recipe, Distillation, options)
    for name, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"`{name}` (a {type(network).__name__}) must be a torch.nn.Module")
    own = _names(student=student, teacher=teacher, data=data, validation_data=validation_data)
    place = _place(out, resume, {**own, **(names or {})})
    feeding, sample, classes = _feeding(
        data, validation_data, recipe, recipe.labels, input_channels(teacher)
    )
    if sample is not None:
        sample = _cast(sample, teacher, recipe)
        goal, made = outputs_of(teacher, sample, "teacher"), outputs_of(student, sample, "student")
        if goal.shape != made.shape:
            raise ValueError(
                f"`student` returns {tuple(made.shape)} and `teacher` {tuple(goal.shape)} for one "
                "input; they must agree"
            )
        if recipe.labels and made.ndim == 2:
            check_classes(made, classes, "student")
        Returned.of(goal).compared_as(recipe.outputs, "teacher")
    frozen = copied(teacher, name="teacher").eval().requires_grad_(False)
    learning = Distilling(_trainable(student, "student"), frozen, recipe)
    if sample is not None:
        learning.check_blocks(sample[None])
    return run(student, learning, feeding, place, progress)


def _recipe(
    recipe: AnyRecipe | None, kind: type[AnyRecipe], options: Mapping[str, Any]
) -> AnyRecipe:
    if recipe is None:
        return kind.of(options)
    is_other = kind is Recipe and isinstance(recipe, Distillation)
    if not isinstance(recipe, kind) or is_other:
        raise TypeError(f"`recipe` (a {type(recipe).__name__}) must be a {kind.__name__}")
    before = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return kind.of({**before, **options})


def _cast(sample: Tensor, network: nn.Module, recipe: Recipe) -> Tensor:
    """An input as a network gets it where the precision turns inputs into its type."""
    parameter = next(network.parameters(), None)
    if parameter is None or recipe.precision == "32-true" or not sample.is_floating_point():
        return sample
    return sample.to(parameter.dtype)


def _named(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else type(value).__name__


def _names(**arguments: Any) -> dict[str, str | None]:
    """What a run's configuration says of its networks and data: their names, or their types."""
    return {key: value if value is None else _named(value) for key, value in arguments.items()}


def _trainable(model: nn.Module, name: str) -> nn.Module:
    network = copied(model, name=name).train()
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(
            f"`{name}` has no parameters to train: `{name}.requires_grad_()` frees them"
        )
    report = getattr(network, "report", None)
    if isinstance(report, Report):
        network.report = report.after_training()  # type: ignore[assignment]
    return network


def _place(
    out: str | os.PathLike[str] | None, resume: bool, names: Mapping[str, str | None]
) -> Place | None:
    if out is None:
        if resume:
            raise ValueError("`resume` needs the folder of a run: `out`")
        return None
    folder = Path(out)
    if is_first_process() and not resume and holds_run(folder):
        raise ValueError(
            f"`out` (={str(folder)!r}) holds a run already; resume it, or name another folder"
        )
    return Place(folder, resume, names)


def _feeding(
    data: Any, validation: Any, recipe: Recipe, labels: bool, channels: int
) -> tuple[LightningDataModule, Tensor | None, int | None]:
    """The data module, one prepared input to try networks on, and the number of classes."""
    if isinstance(data, LightningDataModule):
        if validation is not None:
            raise ValueError(
                "`validation_data` must be left out where `data` is a LightningDataModule; give it "
                "a `val_dataloader`"
            )
        _check_augment(recipe, "a LightningDataModule")
        return resumable(data, recipe, labels), None, None
    if _loads(data) and not is_plain(data):
        batches = _loads(validation) or isinstance(validation, IterableDataset)
        if validation is not None and not batches:
            raise ValueError(
                f"`validation_data` (a {type(validation).__name__}) must be a loader too, where "
                "`data` is one with a sampler of its own"
            )
        _check_augment(recipe, "a loader with a sampler of its own")
        return resumable(Given(data, validation), recipe, labels), None, None
    if is_plain(data) and data.collate_fn is not default_collate:
        _check_augment(recipe, "a loader with a `collate_fn` of its own")
    source = open_source(data, validation, recipe, labels=labels, channels=channels)
    feeding = Feeding(source, recipe, labels)
    feeding.order()  # before anything is written, for the batch may be too large
    return feeding, feeding.first(), source.classes


def _loads(data: Any) -> bool:
    """Whether data is an iterable of batches."""
    inputs = (str, Path, Tensor, tuple, list, Mapping, Dataset)
    return hasattr(data, "__iter__") and not isinstance(data, inputs)


def _check_augment(recipe: Recipe, kind: str) -> None:
    if recipe.augment not in (None, "none"):
        raise ValueError(
            f"`augment` (={recipe.augment!r}) cannot change the inputs of {kind}; change them in "
            "its dataset, and leave it out"
        )
