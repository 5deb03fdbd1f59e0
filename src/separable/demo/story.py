"""Train and convert the contenders, count and measure them, lay their figures side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from prettytable import PrettyTable
from torch import nn

from ..conversion.converting import frontier
from ..cost import Account, Measurement, count, measure_interleaved
from ..cost.account import Format, check_format, draw
from ..models import mobilenet_v1
from ..reporting import Findings, report
from ..training import Recipe, train
from ..training.digits import CLASSES, IMAGE_SIZE, Digits, load_digits
from ..training.scoring import count_correct, wilson_interval
from ..wording import counted

BATCH = 64
INPUT_SIZE = (BATCH, 1, IMAGE_SIZE, IMAGE_SIZE)
# of both forms, trained for ten epochs of 1257 images
RECIPE: dict[str, Any] = {
    "batch_size": 32,
    "lr": 0.2,
    "weight_decay": 5e-4,
    "warmup": 0.3,
    "ema": 0.99,
    "augment": "shift",
    "validation": 0.0,
    "accelerator": "cpu",
}
# unlabelled training images that the conversion sees
CALIBRATION = 640
# besides that of the separable form, for the report; each takes about 20 seconds on two cores
FURTHER = ("macs=0.06",)
# on few cores the barriers of a busy machine cost more than a second thread gains
THREADS = 1


@dataclass(frozen=True)
class Contender:
    """One network of the story.

    Attributes:
        name: its name in the table.
        correct: test images put into their class.
        tested: test images.
        account: what a pass over `BATCH` images costs.
        measurement: what that pass took, measured in turn with the other contenders.
    """

    name: str
    correct: int
    tested: int
    account: Account
    measurement: Measurement

    @property
    def accuracy(self) -> float:
        """Share of the test images put into their class."""
        return self.correct / self.tested

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracy's 95 % Wilson interval."""
        return wilson_interval(self.correct, self.tested)

    @cached_property
    def costs(self) -> dict[str, float]:
        """What a pass costs by metric; the smaller the better."""
        costs: dict[str, float] = {
            "params": self.account.params,
            "macs": self.account.macs,
            "traffic_bytes": self.account.traffic_bytes,
            "peak_activation_bytes": self.account.peak_activation_bytes,
            "latency": self.measurement.median,
        }
        if self.measurement.peak_memory_bytes is not None:
            costs["peak_memory_bytes"] = self.measurement.peak_memory_bytes
        return costs

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain Python values."""
        return {
            "name": self.name,
            "accuracy": self.accuracy,
            "interval": self.interval,
            "correct": self.correct,
            "tested": self.tested,
            **self.costs,
            "measurement": self.measurement.to_dict(),
            "account": self.account.to_dict(),
        }


ROWS = {
    "params": ("Parameters", "{:,.0f}", 1.0),
    "macs": ("MACs (million)", "{:,.1f}", 1e-6),
    "traffic_bytes": ("Compulsory traffic (MB)", "{:,.1f}", 1e-6),
    "peak_activation_bytes": ("Activations alive at once (MB)", "{:,.2f}", 1e-6),
    "peak_memory_bytes": ("Peak memory, measured (MB)", "{:,.2f}", 1e-6),
    "latency": ("Latency, measured (ms)", "{:,.2f}", 1e3),
}


@dataclass(frozen=True)
class Story:
    """The contenders, the regular network first; printing it draws the table.

    Attributes:
        contenders: the networks and their figures.
        epochs: passes over the training images.
        seed: of the weights, the order of the images and their shifts.
    """

    contenders: tuple[Contender, ...]
    epochs: int
    seed: int

    def savings(self, contender: Contender) -> dict[str, float]:
        """The regular network's costs over those of `contender`; above 1 it needs less."""
        regular = self.contenders[0]
        savings = {
            name: regular.costs[name] / cost
            for name, cost in contender.costs.items()
            if name in regular.costs and cost
        }
        savings["latency"] = regular.measurement.ratio_to(contender.measurement).median
        return savings

    def promise_kept(self, contender: Contender) -> float:
        """Share of the promised saving that arrives: measured speed-up / MAC ratio."""
        savings = self.savings(contender)
        return savings["latency"] / savings["macs"]

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain Python values, ready for JSON."""
        return {
            "epochs": self.epochs,
            "seed": self.seed,
            "input_size": INPUT_SIZE,
            "contenders": [
                {
                    **contender.to_dict(),
                    "savings": self.savings(contender),
                    "promise_kept": self.promise_kept(contender),
                }
                for contender in self.contenders
            ],
        }

    def to_string(self, format: Format = "table") -> str:
        """Draw the story as "table" (text), "json", "csv", "markdown" or "html".

        Raises:
            ValueError: `format` is none of these.
        """
        check_format(format)
        if format == "json":
            return json.dumps(self.to_dict(), indent=2)
        regular, *others = self.contenders
        titles = [f"Per pass over {BATCH} images", regular.name]
        for other in others:
            titles += [other.name, f"{regular.name} / {other.name}"]
        table = PrettyTable(titles, align="r")
        table.align[titles[0]] = "l"
        for metric, (title, pattern, unit) in ROWS.items():
            if metric not in regular.costs:
                continue
            cells = [title, pattern.format(unit * regular.costs[metric])]
            for other in others:
                cells.append(pattern.format(unit * other.costs[metric]))
                cells.append(f"{self.savings(other)[metric]:.2f}x")
            table.add_row(cells)
        promises, accuracies, intervals = ["", ""], [], []
        for each in self.contenders:
            low, high = each.interval
            accuracies += [f"{each.accuracy:.2%}", ""]
            intervals += [f"{low:.1%} to {high:.1%}", ""]
        for other in others:
            promises += [f"{self.promise_kept(other):.0%}", ""]
        # the regular network has no column of ratios
        for title, row in (
            ("Share of the promise", promises),
            ("Test accuracy", accuracies),
            ("its 95 % interval", intervals),
        ):
            table.add_row([title, row[0], *row[2:]])
        drawn = draw(table, format)
        return drawn if format == "csv" else f"{drawn}\n\n{self.conditions}"

    @property
    def conditions(self) -> str:
        """What the figures hold for, in a few lines."""
        first = self.contenders[0]
        measured = first.measurement
        versions = ", ".join(f"{name} {number}" for name, number in measured.versions.items())
        return (
            "Share of the promise: measured speed-up / how many times fewer MACs.\n"
            f"MobileNetV1 on handwritten digits, {counted(self.epochs, 'epoch')}, seed "
            f"{self.seed}, {first.tested} test images. A pass takes {BATCH} images; median of "
            f"{len(measured.times)} repeats, the networks in turn.\n"
            f"{measured.device}, threads: {measured.threads}, {measured.dtype}, {versions}."
        )

    def __str__(self) -> str:
        return self.to_string()


def tell(out: Path, *, epochs: int = 10, seed: int = 0, width: float = 0.25) -> Story:
    """Train MobileNetV1 in both forms on handwritten digits, convert the regular one, and compare.

    The conversion sees training images without their labels, and its budget is the number of
    multiply-adds that the separable form has.

    Writes the picture `demo.png`, the figures `demo.json` and the page `report.html` on the
    conversion into `out` once all is done.

    Args:
        out: the folder, made where it does not exist.
        epochs: passes over the training images.
        seed: of the weights, the order of the images and their shifts.
        width: width multiplier of both networks.

    Raises:
        ValueError: `epochs` is less than 1.
        ImportError: matplotlib, scikit-learn or plotly is not installed.
        OSError: `out` cannot be made or written.
    """
    if epochs < 1:
        raise ValueError(f"`epochs` (={epochs}) must be at least 1")
    # before the training, for matplotlib or plotly may be missing
    from ..reporting import page  # noqa: F401
    from .picture import draw_picture

    digits = load_digits()
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    with _threads(THREADS), torch.random.fork_rng(devices=[]):
        networks = _networks(seed, width)
        story, others = _compete(networks, digits, epochs, seed, threads)
        findings = _findings(networks, others, digits, epochs, seed)
    draw_picture(story, out / "demo.png")
    (out / "demo.json").write_text(story.to_string("json") + "\n", encoding="utf-8")
    findings.write(out / "report.html")
    return story


def _networks(seed: int, width: float) -> dict[str, nn.Module]:
    networks: dict[str, nn.Module] = {}
    for conv in ("regular", "separable"):
        torch.manual_seed(seed)
        network = mobilenet_v1(conv, width=width, num_classes=CLASSES, in_channels=1, stem_stride=1)
        networks[conv] = network.to(memory_format=torch.channels_last)
    return networks


def _compete(
    networks: dict[str, nn.Module], digits: Digits, epochs: int, seed: int, threads: int
) -> tuple[Story, dict[str, nn.Module]]:
    """Train both networks, convert the regular one into `networks` too, and compare.

    The conversion uses so many threads, all else those that are set.

    Returns:
        The story, and the conversions within other budgets.
    """
    is_shown = sys.stderr.isatty()
    recipe = Recipe(epochs=epochs, seed=seed, **RECIPE)
    labelled = digits.train_images, digits.train_labels
    for name, network in networks.items():
        networks[name] = train(network, labelled, recipe=recipe, progress=is_shown)
    # as many multiply-adds as the separable form has, and no label
    macs = {name: count(network, INPUT_SIZE).macs for name, network in networks.items()}
    budget = f"macs={macs['separable'] / macs['regular']:.4f}"
    seen = digits.train_images[:CALIBRATION]
    trained = networks.pop("separable")
    with _threads(threads):  # its matrices are large
        others = frontier(networks["regular"], seen, budget, FURTHER, seed=seed, progress=is_shown)
    networks["converted"] = others.pop(budget)
    networks["separable"] = trained
    measurements = measure_interleaved(list(networks.values()), digits.test_images[:BATCH])
    contenders = [
        Contender(
            name=name,
            correct=count_correct(network, digits.test_images, digits.test_labels),
            tested=len(digits.test_labels),
            account=count(network, INPUT_SIZE),
            measurement=measurement,
        )
        for (name, network), measurement in zip(networks.items(), measurements, strict=True)
    ]
    return Story(tuple(contenders), epochs, seed), others


def _findings(
    networks: dict[str, nn.Module],
    others: dict[str, nn.Module],
    digits: Digits,
    epochs: int,
    seed: int,
) -> Findings:
    """Report the regular network and its conversions, the trained separable one beside them."""
    return report(
        networks["regular"],
        inputs=digits.test_images[:BATCH],
        converted=networks["converted"],
        calibration=digits.train_images[:CALIBRATION],
        beside={**others, "trained separable": networks["separable"]},
        data=[(digits.test_images, digits.test_labels)],
        threads=THREADS,
        seed=seed,
        title="MobileNetV1 for handwritten digits",
        command=f"separable demo --epochs {epochs} --seed {seed}",
    )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
