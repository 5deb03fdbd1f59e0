"""What `data` may be: folders, data sets by name, tensors, datasets and loaders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from ..images import centre_crop, find_images, no_images, open_image, standardise, transforms
from .augmenting import augmentation, flipped, shifted
from .checking import IGNORED
from .digits import CLASSES as DIGITS
from .digits import IMAGE_SIZE as SMALL
from .digits import load_digits
from .loading import is_plain
from .recipe import Augment, Recipe

IMAGE_SIZE = 224
WORKERS = 2
NAMES = ("digits", "cifar10", "hf:NAME")
_HUB = "hf:"
_CIFAR10 = "uoft-cs/cifar10"
_PARTS = (("train", "val"), ("train", "validation"), ("train", "test"))


@dataclass(frozen=True)
class Source:
    """Training data, and how its inputs are prepared.

    Attributes:
        train: items are inputs or (input, label) pairs.
        validation: the same, or None where a share of `train` is to be held out.
        classes: how many there are; None if unknown, or if labels are not asked for.
        names: of the classes, in the order of the labels, where they have names.
        augmented: prepares an input for training, at random.
        prepared: prepares an input for validation.
        workers: processes that load, if the recipe names none.
        loader: the loader that `train` was taken from; its batch size, order and collating stand.
    """

    train: Any
    validation: Any = None
    classes: int | None = None
    names: tuple[str, ...] = ()
    augmented: Callable[[Any], Tensor] | None = None
    prepared: Callable[[Any], Tensor] | None = None
    workers: int = 0
    loader: DataLoader[Any] | None = None

    @property
    def shuffles(self) -> bool:
        """Whether the order is drawn anew each epoch."""
        return self.loader is None or isinstance(self.loader.sampler, RandomSampler)


class Images(Dataset[Any]):
    """Images of files, as PIL images with a label or without.

    In place of an image that can't be read comes the next one that can; `broken` says which.

    Args:
        paths: the files.
        labels: a class per file, or None.
        channels: 1 for grey, 3 for colour.
    """

    def __init__(
        self, paths: Sequence[Path | str], labels: Sequence[int] | None, channels: int
    ) -> None:
        self.paths, self.labels, self.channels = paths, labels, channels
        # in memory that the loading processes share
        self.flags = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        for step in range(len(self)):
            place = (index + step) % len(self)
            if self.flags[place]:
                continue
            image = open_image(self.paths[place], self.channels)
            if image is not None:
                return image if self.labels is None else (image, self.labels[place])
            self.flags[place] = True
        raise no_images(Path(self.paths[0]).parent, "`data`")

    @property
    def broken(self) -> list[Path | str]:
        """The images that were met and could not be read."""
        return [self.paths[index] for index in self.flags.nonzero()[:, 0].tolist()]


def open_source(
    data: Any, validation: Any, recipe: Recipe, *, labels: bool, channels: int
) -> Source:
    """Turn what a user gives into a source; see `train` for what that may be.

    Args:
        data: the training data.
        validation: the validation data, of the same kinds, or None.
        recipe: for image size, statistics and augmentation.
        labels: whether labels are needed; if not, none is looked at.
        channels: what the network takes; grey images become as many equal channels.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no inputs, or only one class.
        TypeError: `data` is nothing that holds inputs.
        ImportError: a package that the data needs is not installed.
    """
    source = _opened(data, recipe, labels, channels)
    if labels and source.classes == 1:
        raise ValueError(f"`data` (={_named(data)}) has one class; telling apart takes two")
    if not len(source.train):
        raise ValueError(f"`data` (={_named(data)}) is empty; give at least one input")
    if validation is None:
        return source
    try:
        other = _opened(validation, recipe, labels, channels)
    except (ValueError, TypeError, OSError) as error:
        if "`data`" not in str(error):
            raise
        raise type(error)(str(error).replace("`data`", "`validation_data`")) from error
    part = other.train if other.validation is None else other.validation
    if not len(part):
        raise ValueError(
            f"`validation_data` (={_named(validation)}) is empty; give at least one input"
        )
    if source.names and other.names and source.names != other.names:
        raise ValueError(
            f"`validation_data` (={_named(validation)}) has the classes {', '.join(other.names)}, "
            f"and `data` {', '.join(source.names)}; they must be the same"
        )
    return dataclasses.replace(source, validation=part)


def _named(data: Any) -> str:
    return repr(str(data)) if isinstance(data, str | Path) else f"a {type(data).__name__}"


def _opened(data: Any, recipe: Recipe, labels: bool, channels: int) -> Source:
    if isinstance(data, str | Path):
        return _by_name(str(data), recipe, labels, channels)
    if is_plain(data):
        workers = data.num_workers
        return Source(data.dataset, augmented=_augmented(recipe), workers=workers, loader=data)
    if isinstance(data, tuple):
        data = tuple(torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in data)
    if isinstance(data, Tensor | np.ndarray):
        data = TensorDataset(torch.as_tensor(data))
    elif isinstance(data, list) and data and all(isinstance(x, Tensor) for x in data):
        raise TypeError(
            f"`data` (a list of {len(data)} tensors) could be batches, or inputs and labels: join "
            "batches by torch.cat, or give (inputs, labels) as a tuple"
        )
    elif isinstance(data, tuple) and data and all(isinstance(x, Tensor) for x in data):
        if len(data) > 2:
            raise TypeError(
                f"`data` (a tuple of {len(data)} tensors) must be (inputs, labels); join batches "
                "by torch.cat"
            )
        if len({len(part) for part in data}) != 1:
            raise ValueError("`data`: inputs and labels must be as many as each other")
        data = TensorDataset(*data)
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    # every dataset has the method, one that is only iterated has torch's, which raises
    iterated = isinstance(data, Dataset) and type(data).__getitem__ is Dataset.__getitem__
    if indexed and not iterated and not isinstance(data, Mapping):
        classes = None
        if labels and isinstance(data, TensorDataset) and len(data.tensors) > 1 and len(data):
            classes = _classes(data.tensors[1])
        return Source(data, classes=classes, augmented=_augmented(recipe))
    raise TypeError(
        f"`data` (a {type(data).__name__}) must be a folder, {', '.join(NAMES)}, a tensor, a pair "
        "of tensors, a dataset, a DataLoader or a LightningDataModule"
    )


def _classes(labels: Tensor) -> int | None:
    """How many classes labels tell apart: one, or as many as the largest asks for."""
    if labels.ndim != 1 or labels.is_floating_point():
        return None  # dense or soft ones, which each step looks at
    labels = labels[labels != IGNORED]
    if not len(labels):
        return None
    if labels.min() < 0:
        raise ValueError(f"`data` has the label {labels.min()}; labels must be 0 or more")
    return 1 if len(labels.unique()) == 1 else int(labels.max()) + 1


def _augmented(recipe: Recipe, default: Augment = "none") -> Callable[[Tensor], Tensor] | None:
    return augmentation(recipe.augment or default)


def _by_name(name: str, recipe: Recipe, labels: bool, channels: int) -> Source:
    if name == "digits":
        return _digits(recipe, labels, channels)
    if name == "cifar10":
        return _hub(_CIFAR10, recipe, labels, channels, "flip-shift", SMALL)
    if name.startswith(_HUB):
        return _hub(name.removeprefix(_HUB), recipe, labels, channels, "flip-crop", IMAGE_SIZE)
    if not Path(name).is_dir():
        raise FileNotFoundError(
            f"`data`: there is no folder {name!r}, and of the data sets by name only "
            f"{', '.join(NAMES)}"
        )
    return _folder(Path(name), recipe, labels, channels)


def _digits(recipe: Recipe, labels: bool, channels: int) -> Source:
    digits = load_digits(image_size=recipe.image_size or SMALL)

    def part(images: Tensor, classes: Tensor) -> TensorDataset:
        images = images.expand(-1, channels, -1, -1)
        return TensorDataset(images, classes) if labels else TensorDataset(images)

    return Source(
        part(digits.train_images, digits.train_labels),
        part(digits.test_images, digits.test_labels),
        DIGITS if labels else None,
        augmented=_augmented(recipe, "shift"),
    )


def _folder(root: Path, recipe: Recipe, labels: bool, channels: int) -> Source:
    classes: list[str] = []
    parts = next(
        ([root / a, root / b] for a, b in _PARTS if (root / a).is_dir() and (root / b).is_dir()),
        [root],
    )
    datasets = []
    for part in parts:
        if labels:
            samples, names = _class_folders(part)
            if classes and names != classes:
                raise ValueError(f"`data`: {parts[0]} and {part} hold different classes")
            classes = names
            paths, targets = zip(*samples, strict=True)
            datasets.append(Images(paths, targets, channels))
        else:
            datasets.append(Images(find_images(part), None, channels))
        if not len(datasets[-1]):
            raise no_images(part, "`data`")
    return _images(
        datasets,
        classes,
        recipe,
        channels,
        recipe.augment or "flip-crop",
        recipe.image_size or IMAGE_SIZE,
    )


def _class_folders(root: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """The images of a folder of class folders, and the classes."""
    transforms()  # or an error that names the extra
    from torchvision.datasets import ImageFolder

    from ..images import SUFFIXES

    if not any(path.is_dir() for path in root.iterdir()):
        raise ValueError(
            f"`data`: {str(root)!r} has no folders in it; put the images of each class into a "
            "folder of its own"
        )
    try:
        found = ImageFolder(
            str(root), is_valid_file=lambda path: Path(path).suffix.lower() in SUFFIXES
        )
    except FileNotFoundError as error:
        words = str(error).partition(".")[0].removeprefix("Found no valid file for the classes ")
        raise ValueError(
            f"`data`: {str(root)!r} has no images in the folders {words}; put some there, or "
            "remove them"
        ) from error
    return found.samples, found.classes


def _images(
    datasets: Sequence[Any],
    names: Sequence[str],
    recipe: Recipe,
    channels: int,
    augment: Augment,
    size: int,
) -> Source:
    """A source of PIL images: the training part, and the one for validation if there is one."""
    v2 = transforms()
    tensor = standardise(recipe.mean, recipe.std, channels)
    steps: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "none": [],
        "shift": [shifted],
        "flip-shift": [flipped, shifted],
    }
    if augment == "flip-crop":
        random = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *tensor]
    else:
        random = [*centre_crop((size, size)), *tensor, *steps[augment]]
    return Source(
        datasets[0],
        datasets[1] if len(datasets) > 1 else None,
        len(names) or None,
        tuple(names),
        v2.Compose(random),
        v2.Compose([*centre_crop((size, size)), *tensor]),
        WORKERS,
    )


class _HubImages(Dataset[Any]):
    """A Hugging Face dataset as PIL images with a label or without."""

    def __init__(self, table: Any, image: str, label: str | None, channels: int) -> None:
        self.table = table.select_columns([image] if label is None else [image, label])
        self.image, self.label, self.mode = image, label, "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        row = self.table[index]
        image = row[self.image].convert(self.mode)
        return image if self.label is None else (image, row[self.label])


def _hub(
    name: str, recipe: Recipe, labels: bool, channels: int, augment: Augment, size: int
) -> Source:
    """A data set of the Hugging Face hub, with its train and validation or test split."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ImportError(
            "datasets is not installed: pip install 'separable[datasets]'", name=error.name
        ) from error
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises many kinds
        words = " ".join(str(error).split())
        raise OSError(
            f"`data`: the Hugging Face data set {name!r} can't be loaded, which needs the network "
            f"the first time: {words}"
        ) from error
    return _of_splits(splits, name, recipe, labels, channels, augment, size)


def _of_splits(
    splits: Any,
    name: str,
    recipe: Recipe,
    labels: bool,
    channels: int,
    augment: Augment,
    size: int,
) -> Source:
    import datasets

    features = splits["train"].features
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next(
        (key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None
    )
    if image is None or (labels and label is None):
        raise ValueError(
            f"`data`: {name!r} has the columns {', '.join(features)}; it needs one of images"
            + " and one of classes" * labels
        )
    used = [part for part in ("train", "validation", "test") if part in splits][:2]
    return _images(
        [_HubImages(splits[part], image, label if labels else None, channels) for part in used],
        features[label].names if labels else (),
        recipe,
        channels,
        recipe.augment or augment,
        recipe.image_size or size,
    )
