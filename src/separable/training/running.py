"""Running a training: a `Learning` and its data through Lightning's Trainer, into a folder."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..conversion import Report
from ..cost.preserving import copied
from ..wording import counted
from .checkpoints import (
    Checkpoints,
    check_shapes,
    checkpoint_callbacks,
    last_checkpoint,
    read_checkpoint,
    remove_partial,
    weights_of,
)
from .feeding import Feeding, validates
from .learning import Learning
from .optimizing import averaging
from .recipe import Recipe
from .records import (
    Waiting,
    check_config,
    csv_logger,
    draw_curves,
    tensorboard_logger,
    write_config,
    write_environment,
)


@dataclass(frozen=True)
class Run:
    """What a training did."""

    folder: Path | None
    """where its files are; None if they were not kept"""
    epochs: int
    steps: int
    """optimiser steps, those before it was resumed included"""
    seconds: float
    """of this call"""
    waiting: float
    """share of the training time spent waiting for data; the rest are its steps"""
    metrics: dict[str, float]
    """the last value of each"""
    skipped: tuple[str, ...] = ()
    """images that could not be read, in this process"""

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain Python values, ready for JSON."""
        folder = None if self.folder is None else str(self.folder)
        return {**dataclasses.asdict(self), "folder": folder}

    def __str__(self) -> str:
        told = {name: value for name, value in self.metrics.items() if not name.startswith("lr-")}
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in told.items())
        return (
            f"{counted(self.epochs, 'epoch')}, {counted(self.steps, 'step')} in "
            f"{self.seconds:.1f} s, {self.waiting:.1%} of the training time spent waiting "
            f"for data\n{metrics}"
        )


@dataclass(frozen=True)
class Place:
    """Where a run keeps its files.

    Attributes:
        folder: is made where it does not exist.
        resume: whether to go on from its last checkpoint.
        names: what its configuration says of the networks and the data.
    """

    folder: Path
    resume: bool
    names: Mapping[str, str | None]

    @property
    def checkpoint(self) -> Path | None:
        """What to go on from."""
        return last_checkpoint(self.folder) if self.resume else None


def run(
    model: nn.Module,
    learning: Learning,
    feeding: LightningDataModule,
    place: Place | None,
    progress: bool,
) -> nn.Module:
    """Train, and return a copy of a network with the trained weights.

    Args:
        model: the network as it was given.
        learning: holds the copy of it that is trained.
        feeding: the data.
        place: where to keep the run's files; None keeps none.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the network has an attribute in the run's place, or the training diverged.
    """
    own = getattr(model, "run", None)
    if own is not None and not isinstance(own, Run):
        raise ValueError(
            f"the network has an attribute `run` (a {type(own).__name__}), where a training leaves "
            "what it measured; rename it"
        )
    recipe, network = learning.recipe, learning.network
    checkpoint, done = None if place is None else place.checkpoint, 0
    if place is not None and checkpoint is not None:
        saved = read_checkpoint(checkpoint)
        check_config(place.folder, recipe, place.names)
        check_shapes(saved, checkpoint, network)
        done = int(saved["global_step"])
        del saved  # the trainer reads its own
    if recipe.dtype is not None:
        network.to(recipe.dtype)  # before the average of the weights copies it
    if recipe.channels_last:
        for weight in network.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    if recipe.compile:
        network.compile()
    waiting, begun = Waiting(), time.perf_counter()
    with _quiet(), _interruptible(), torch.random.fork_rng(devices=[]):
        trainer = _trainer(learning, feeding, place, waiting, progress)
        if recipe.sync_batchnorm and trainer.strategy.root_device.type == "cpu":
            raise ValueError(
                "`sync_batchnorm` (=True) needs GPUs, and this trains on the CPU; leave it out"
            )
        if place is not None:  # from here on files are written
            trainer.loggers = _loggers(place, done, recipe)
        if place is not None and trainer.is_global_zero:
            place.folder.mkdir(parents=True, exist_ok=True)
            remove_partial(place.folder)
            write_config(place.folder, recipe, place.names)
            write_environment(place.folder, trainer.strategy.root_device, trainer.world_size)
        trainer.fit(learning, datamodule=feeding, ckpt_path=checkpoint, weights_only=True)
    weights = _trained(trainer, learning, checkpoint)
    learning.check_finite(weights, model.state_dict())
    if place is not None and trainer.is_global_zero:
        draw_curves(place.folder)
    result = copied(model)
    result.eval().load_state_dict(weights)
    if isinstance(getattr(network, "report", None), Report):
        result.report = network.report
    result.run = Run(  # type: ignore[assignment]
        folder=None if place is None else place.folder,
        epochs=trainer.current_epoch,
        steps=trainer.global_step,
        seconds=time.perf_counter() - begun,
        waiting=waiting.share,
        metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
        skipped=tuple(feeding.broken) if isinstance(feeding, Feeding) else (),
    )
    return result


def _trained(trainer: Trainer, learning: Learning, checkpoint: Path | None) -> dict[str, Any]:
    """The weights that a training ended with, by their names in the network."""
    if checkpoint is not None:
        saved = read_checkpoint(checkpoint)
        if int(saved["global_step"]) == trainer.global_step:
            # it had finished before, and its averaged weights are in the checkpoint alone
            return weights_of(saved["state_dict"])
    if isinstance(trainer.strategy, FSDPStrategy):
        assert trainer.strategy.model is not None
        whole = StateDictOptions(full_state_dict=True)  # each process has a part of every tensor
        return weights_of(get_model_state_dict(trainer.strategy.model, options=whole))
    return learning.network.state_dict()


def _trainer(
    learning: Learning,
    feeding: LightningDataModule,
    place: Place | None,
    waiting: Waiting,
    progress: bool,
) -> Trainer:
    recipe = learning.recipe
    callbacks: list[Callback] = []
    if recipe.ema:
        if "fsdp" in recipe.strategy:
            raise ValueError(
                f"`ema` (={recipe.ema}) can't average weights that `strategy` "
                f"(={recipe.strategy!r}) shards; use ema=0"
            )
        if any(weight.dtype is torch.bfloat16 for weight in learning.network.parameters()):
            raise ValueError(
                f"`ema` (={recipe.ema}) can't average weights of 8 significant bits, as bfloat16 "
                "has (the network's own, or by `precision`): small steps vanish; use ema=0"
            )
        callbacks.append(averaging(recipe.ema))
    if place is not None:
        monitor = learning.monitor if validates(feeding) else None
        callbacks += checkpoint_callbacks(place.folder, recipe.checkpoint_every, monitor)
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    plugins: list[Any] = [Checkpoints(learning.network)]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # its own checkpoints at a signal would lie in the working directory, for any run to take
        plugins.append(SLURMEnvironment(auto_requeue=False))
    devices, nodes = _devices(recipe)
    return Trainer(
        accelerator=recipe.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=recipe.strategy,
        precision=recipe.precision,
        max_epochs=recipe.epochs,
        accumulate_grad_batches=recipe.accumulate,
        gradient_clip_val=recipe.clip or None,
        sync_batchnorm=recipe.sync_batchnorm,
        use_distributed_sampler=False,  # the batches of each process are drawn for it
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if validates(feeding) else 0,
        # where Lightning looks for checkpoints of SLURM's: never in the working directory
        default_root_dir=os.devnull if place is None else place.folder,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=place is not None,
        enable_progress_bar=progress,
        enable_model_summary=False,
        profiler=waiting,
        plugins=plugins,
    )


def _loggers(place: Place, done: int, recipe: Recipe) -> list[Logger]:
    events = tensorboard_logger(place.folder, recipe.tensorboard)
    return [csv_logger(place.folder, done), *([] if events is None else [events])]


def is_first_process() -> bool:
    """Whether this process writes a run's files and speaks for it."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _devices(recipe: Recipe) -> tuple[str, int]:
    """Devices per machine, and machines; as torchrun started them, where it did."""
    if recipe.devices == "auto" and "LOCAL_WORLD_SIZE" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return str(local), int(os.environ["WORLD_SIZE"]) // local
    return recipe.devices, recipe.num_nodes


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from saying what a run need not hear."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)  # which devices it found, and that it stops when it is done
    try:
        with warnings.catch_warnings():
            # validation is a choice here
            warnings.filterwarnings("ignore", "You defined a `validation_step` but have no")
            # a run that is resumed goes on in its own folder
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            # Lightning builds a class of torch's in a way that newer torch deprecates
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C through, and SIGTERM end the process as it does elsewhere.

    At Ctrl-C Lightning exits with 1, and ignores it from then on; what is being written then
    fails with errors of its own.
    """
    outer = sys.exception()  # what the caller is handling
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None and cause is not outer:
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            cause = cause.__context__
        raise
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
