"""Checkpoints: written whole or not at all, with the weights beside them as safetensors."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors.torch import save_file
from torch import Tensor, nn

from ..conversion import Report, save
from ..writing import whole_file

LAST, BEST = "last", "best"
UNREADABLE = EOFError, OSError, RuntimeError, LookupError, TypeError, pickle.UnpicklingError
"""what reading a damaged checkpoint raises"""
_PREFIX = "network."


def write_weights(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights to a safetensors file; those of a converted network with its plan.

    `separable.load` reads the latter, the option `--weights` the others.
    """
    if isinstance(getattr(network, "report", None), Report):
        save(network, path, weights=weights)
        return
    # tied weights are written twice, for safetensors stores no views
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in weights.items()
        if isinstance(tensor, Tensor)  # a module's extra state may be anything
    }
    with whole_file(path) as partial:
        save_file(tensors, partial)


class Checkpoints(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name in its own folder, then renames it.

    Lightning's own writing goes through the system's temporary folder, which may be another file
    system, where a rename is a copy.

    Args:
        network: whose weights are written beside each checkpoint.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint and its weights."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = weights_of(checkpoint["state_dict"])
        write_weights(self.network, weights, path.with_suffix(".safetensors"))
        with whole_file(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


class _Within(ModelCheckpoint):
    """Saves within epochs; the checkpoint at an epoch's end is to come after its validation."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save every few steps."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)


def checkpoint_callbacks(
    folder: Path, every: int, monitor: tuple[str, str] | None
) -> list[Callback]:
    """Callbacks that keep `best.ckpt` and `last.ckpt` in a folder.

    Args:
        folder: where.
        every: optimiser steps between checkpoints; there is one after each epoch too.
        monitor: the metric that tells the best, and "min" or "max"; None keeps no best one.
    """

    def keep(name: str, kind: type[ModelCheckpoint] = ModelCheckpoint, **options: Any) -> Callback:
        return kind(folder, name, enable_version_counter=False, **options)

    callbacks: list[Callback] = []
    if monitor is not None:
        # first, so that the last checkpoint knows the best one
        callbacks.append(keep(BEST, monitor=monitor[0], mode=monitor[1]))
    callbacks.append(keep(LAST, _Within, every_n_train_steps=every))
    callbacks.append(keep(LAST, every_n_epochs=1, save_on_train_epoch_end=True))
    return callbacks


def weights_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a network in the state of its training, by their names in the network."""
    return {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(_PREFIX)
    }


def holds_run(folder: Path) -> bool:
    """Whether a folder has anything that a training took long to make."""
    names = (f"{name}{ending}" for name in (LAST, BEST) for ending in (".ckpt", ".safetensors"))
    return any((folder / name).exists() for name in names)


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run goes on from, if there is one."""
    path = folder / f"{LAST}.ckpt"
    return path if path.is_file() else None


def check_shapes(saved: Mapping[str, Any], checkpoint: Path, network: nn.Module) -> None:
    """Refuse a checkpoint of another network, as data of more classes would make it.

    Args:
        saved: what `checkpoint` holds.
        checkpoint: the file.
        network: is to go on from it.

    Raises:
        ValueError: a weight has another shape.
    """
    before = weights_of(saved["state_dict"])
    for name, now in network.state_dict().items():
        then = before.get(name)
        if isinstance(then, Tensor) and isinstance(now, Tensor) and then.shape != now.shape:
            raise ValueError(
                f"`resume`: the weight {name!r} was {list(then.shape)} when the run in "
                f"{str(checkpoint.parent)!r} began, and is {list(now.shape)}; resume it with the "
                "same network, on data of the same classes"
            )


def remove_partial(folder: Path) -> None:
    """Remove what runs that were killed while they wrote a checkpoint have left."""
    for name in (LAST, BEST):
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds: the state of the training, and how many steps it has seen.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        saved: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
        int(saved["global_step"]), saved["state_dict"]  # or it is damaged
        return saved
    except UNREADABLE as error:
        raise ValueError(
            f"`out`: {str(checkpoint)!r} is damaged; put a copy of it in its place, or start again "
            "in another folder"
        ) from error
