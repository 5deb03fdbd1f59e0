"""What a run's folder holds beside its weights: configuration, environment, metrics and curves."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.profilers import Profiler

from ..cost.measuring import device_name, versions_of
from ..writing import whole_file
from .recipe import Recipe

CONFIG, METRICS, ENVIRONMENT, CURVES = (
    "config.yaml",
    "metrics.csv",
    "environment.json",
    "curves.png",
)
_FLUSH = 50
INK, COLOURS = "#1a1a1a", ("#0b6e99", "#d1622b", "#5f8a3a", "#7a4f9a")


class Waiting(Profiler):
    """Times how long a training waits for its data, and how long its steps take."""

    _FETCH, _STEP = "train_dataloader_next", "run_training_batch"

    def __init__(self) -> None:
        super().__init__()
        self.seconds = {self._FETCH: 0.0, self._STEP: 0.0}
        self._begun: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        """Begin to time an action."""
        self._begun[action_name] = perf_counter()

    def stop(self, action_name: str) -> None:
        """Add an action's time, if it is one of the two."""
        begun = self._begun.pop(action_name, None)
        for kind in self.seconds:
            if begun is not None and action_name.endswith(kind):
                self.seconds[kind] += perf_counter() - begun

    @property
    def share(self) -> float:
        """Time spent waiting over that and the steps'."""
        return self.seconds[self._FETCH] / (sum(self.seconds.values()) or 1.0)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_config(folder: Path, recipe: Recipe, names: Mapping[str, str | None]) -> None:
    """Write what was trained on what and how; `--config` reads it again."""
    content = {**names, **recipe.to_dict()}
    write_text(folder / CONFIG, yaml.safe_dump(content, sort_keys=False))


def check_config(folder: Path, recipe: Recipe, names: Mapping[str, str | None]) -> None:
    """Refuse to resume a run with what would have given another result.

    Raises:
        ValueError: an option differs from that of the run.
    """
    try:
        before = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict):
        raise ValueError(
            f"`out`: {str(folder / CONFIG)!r} does not say how the run began; put a copy of it in "
            "its place, or start again in another folder"
        )
    now = {**names, **recipe.to_dict()}
    changeable = {f.name for f in dataclasses.fields(recipe) if f.metadata["resumable"]}
    # a run of an earlier version does not say what there was no choice of
    before = {**type(recipe)().to_dict(), **dict.fromkeys(names), **before}
    for name in before:  # also what is left out now
        if name not in changeable and before[name] != now.get(name):
            raise ValueError(
                f"`{name}` (={now.get(name)!r}) was {before.get(name)!r} when the run in "
                f"{str(folder)!r} began; resume it with the same, or start another in another "
                "folder"
            )


def write_environment(folder: Path, device: torch.device, processes: int) -> None:
    """Write versions, machine and command of a run."""
    packages = ("lightning", "torchmetrics", "torchvision", "datasets")
    versions = dict(versions_of(device))
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    record = {
        "command": sys.argv,
        "device": device_name(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": versions,
    }
    write_text(folder / ENVIRONMENT, json.dumps(record, indent=2) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The whole rows of a metrics file, without their empty cells."""
    if not path.is_file():
        return []
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            with contextlib.suppress(ValueError):  # of a row that was cut
                rows.append({key: float(cell) for key, cell in row.items() if cell})
    return rows


def csv_logger(folder: Path, steps: int) -> CSVLogger:
    """A logger that writes `metrics.csv`, and keeps what a run wrote in its first steps.

    Args:
        folder: the run's.
        steps: of the checkpoint that the run goes on from; 0 begins anew.
    """
    rows = [row for row in read_metrics(folder / METRICS) if row.get("step", steps) < steps]
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=_FLUSH)
    with warnings.catch_warnings():
        # it deletes the old metrics; what is still true of them is written again
        warnings.filterwarnings("ignore", "Experiment logs directory")
        experiment = logger.experiment
    if rows:
        experiment.metrics = [*rows]
        experiment.save()
    return logger


def tensorboard_logger(folder: Path, wanted: bool | None) -> Logger | None:
    """A logger of TensorBoard's events.

    Args:
        folder: of the run.
        wanted: whether to have one; None where TensorBoard is installed.

    Raises:
        ImportError: it is wanted, and TensorBoard is not installed.
    """
    installed = find_spec("tensorboard") is not None
    if wanted is False or (wanted is None and not installed):
        return None
    if not installed:
        raise ImportError(
            "tensorboard is not installed: pip install tensorboard", name="tensorboard"
        )
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="", version="tensorboard")


def draw_curves(folder: Path) -> None:
    """Draw each metric of `metrics.csv` over the steps, as `curves.png`."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder / METRICS)
    panels: dict[str, list[str]] = {}
    for name in sorted({key for row in rows for key in row} - {"step", "epoch"}):
        title = "learning rate" if name.startswith("lr-") else name.partition("_")[2] or name
        panels.setdefault(title, []).append(name)
    if not panels:
        return
    figure = Figure(figsize=(4.6 * len(panels), 3.6), dpi=120, layout="constrained")
    for axes, (title, names) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, colour in zip(names, itertools.cycle(COLOURS), strict=False):
            points = [(row["step"], row[name]) for row in rows if {name, "step"} <= row.keys()]
            mark = "o" if len(points) < 2 else None
            axes.plot(*zip(*points, strict=True), marker=mark, color=colour, label=name)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) <= len(COLOURS):
            axes.legend(frameon=False, fontsize=9)
    with whole_file(folder / CURVES) as partial:
        figure.savefig(partial, format="png")
