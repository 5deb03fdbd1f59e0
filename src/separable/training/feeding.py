"""The data module: batches of a source for each process, or a user's module made resumable."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from .loading import SPLIT, Drawn, Order, Repeated, Resumable, Shard, is_plain, permutation
from .recipe import Recipe
from .sources import Images, Source


class Feeding(LightningDataModule):
    """Feeds a training from a source.

    Args:
        source: the data.
        recipe: batch size, share held out, workers and seed.
        labels: whether batches are `(inputs, labels)`; if not, labels are never looked at. None
            takes items as they are.
    """

    def __init__(self, source: Source, recipe: Recipe, labels: bool | None) -> None:
        super().__init__()
        self.source, self.recipe, self.labels = source, recipe, labels
        indices, held = torch.arange(len(source.train)), 0
        if source.validation is None:
            held = round(recipe.validation * len(indices))
            indices = permutation(len(indices), recipe.seed, SPLIT)
        self.held, self.trained_on = indices[:held], indices[held:].sort().values

    @property
    def batch_size(self) -> int:
        """Inputs per optimiser step."""
        loader = self.source.loader
        return self.recipe.batch_size if loader is None else loader.batch_size or 1

    def order(self, rank: int = 0, world: int = 1) -> Order:
        """The training batches of one process."""
        return Order(
            self.trained_on,
            self.batch_size,
            self.recipe.seed if self.source.shuffles else None,
            accumulate=self.recipe.accumulate,
            rank=rank,
            world=world,
        )

    def first(self) -> Tensor | None:
        """An input as the network gets it; None if only the user's collating makes it one."""
        item = self._drawn(self.source.train, self.source.prepared)[0, int(self.trained_on[0])]
        input = item[0] if isinstance(item, Sequence) else item
        return input if isinstance(input, Tensor) else None

    def train_dataloader(self) -> Resumable:
        """The training part's batches."""
        assert self.trainer is not None
        order = self.order(self.trainer.global_rank, self.trainer.world_size)
        drawn = self._drawn(self.source.train, self.source.augmented)
        return Resumable(self._loader(drawn, order), self.recipe.seed)

    def val_dataloader(self) -> Any:
        """The validation part's batches."""
        assert self.trainer is not None
        dataset, indices = self.source.train, self.held
        if self.source.validation is not None:
            dataset, indices = self.source.validation, torch.arange(len(self.source.validation))
        rank, world = self.trainer.global_rank, self.trainer.world_size
        shard = Shard(indices, self.batch_size, rank, world)
        return Repeated(self._loader(self._drawn(dataset, self.source.prepared), shard))

    def _drawn(self, dataset: Any, transform: Any) -> Drawn:
        loader = self.source.loader
        # a collating function of the user's own gets items as they are
        own = loader is not None and loader.collate_fn is not default_collate
        return Drawn(dataset, None if own else self.labels, transform, self.recipe.seed)

    def _loader(self, dataset: Drawn, batches: Order | Shard) -> DataLoader[Any]:
        workers, loader = self.recipe.workers, self.source.loader
        if workers is None:
            workers = self.source.workers
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=None if loader is None else loader.collate_fn,
            worker_init_fn=None if loader is None else loader.worker_init_fn,
        )

    @property
    def broken(self) -> list[str]:
        """Images that were met and could not be read, in this process."""
        parts = (self.source.train, self.source.validation)
        return [str(path) for part in parts if isinstance(part, Images) for path in part.broken]


class Given(LightningDataModule):
    """A user's own loaders, as a data module.

    Args:
        train: yields training batches.
        validation: yields validation batches, or None.
    """

    def __init__(self, train: Any, validation: Any) -> None:
        super().__init__()
        self.train, self.validation = train, validation

    def train_dataloader(self) -> Any:
        """The training loader."""
        return self.train

    def val_dataloader(self) -> Any:
        """The validation loader."""
        return self.validation


def validates(module: LightningDataModule) -> bool:
    """Whether a data module has anything to validate on."""
    if isinstance(module, Feeding):
        return module.source.validation is not None or len(module.held) > 0
    if isinstance(module, Given):
        return module.validation is not None
    return is_overridden("val_dataloader", module)


def resumable(module: LightningDataModule, recipe: Recipe, labels: bool) -> LightningDataModule:
    """A copy of a data module whose training batches are a function of seed, epoch and position.

    A loader that draws from an indexed dataset at random or in sequence is shared between the
    processes; any other must share its batches itself.

    Args:
        module: a user's.
        recipe: seed and accumulation.
        labels: whether they are needed.
    """
    result = copy.copy(module)
    own = result.train_dataloader  # of the copy, which is what Lightning sets up

    def train_dataloader() -> Any:
        loader: Any = own()
        try:
            len(loader)
        except TypeError:  # a DataLoader of an iterable dataset has the method all the same
            raise TypeError(
                f"`data` yields a {type(loader).__name__} without a length, which the learning "
                "rate's schedule needs; give it, or its dataset, a `__len__`"
            ) from None
        if not is_plain(loader):
            return Resumable(loader, recipe.seed)
        source = Source(loader.dataset, workers=loader.num_workers, loader=loader)
        whole = dataclasses.replace(recipe, validation=0.0)
        feeding = Feeding(source, whole, None if labels else False)
        feeding.trainer = result.trainer
        return feeding.train_dataloader()

    result.train_dataloader = train_dataloader  # type: ignore[method-assign]
    return result
