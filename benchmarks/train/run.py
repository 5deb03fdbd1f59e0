"""Figures of the training: `python -m benchmarks.train.run --help`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from benchmarks.convert import data, networks
from PIL import Image
from prettytable import PrettyTable, TableStyle
from torch import Tensor, nn

import separable
from separable.conversion.sensitivity import divergence
from separable.cost.measuring import device_name
from separable.models import mobilenet_v1
from separable.training import Distillation, Recipe, finetune, train
from separable.training.digits import load_digits
from separable.training.scoring import count_correct, wilson_interval

CACHE = Path("runs/train")
OUT = Path("benchmarks/results/train.json")
CALIBRATION = 512
# cluttered images: those of benchmarks/convert, and so many that a tenth of a point is seen
TESTS = (2_000, 20_000)
DRAWS = 4_000
# the reader of the digit sets is the same small MobileNetV1 in both forms
NARROW = {"width": 0.25, "num_classes": 10, "in_channels": 1, "stem_stride": 1}
FORMS = ("regular", "separable")


def mean_and_spread(values: list[float]) -> str:
    """Mean and range, for few seeds have no quartiles."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def converted(name: str, dataset: str, seed: int, fold: float) -> tuple[nn.Module, nn.Module]:
    """A trained network and its conversion, from the cache if it was converted before."""
    model = networks.trained(name, dataset, seed)
    path = CACHE / f"slim-{name}-{dataset}-{seed}-{fold:g}.safetensors"
    if not path.exists():
        inputs = data.load(dataset)[0]
        chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(100 + seed))
        calibration = inputs[chosen[:CALIBRATION]]
        slim = separable.convert(model, calibration, f"macs={1 / fold}", progress=False)
        CACHE.mkdir(parents=True, exist_ok=True)
        separable.save(slim, path)
    return model, separable.load(path, model=model)


def distilled(name: str, dataset: str, seed: int, fold: float) -> dict[str, Any]:
    """One pass over the training inputs, without their labels, at the default recipe."""
    model, slim = converted(name, dataset, seed, fold)
    result = finetune(slim, teacher=model, data=data.load(dataset)[0], seed=seed, progress=False)
    tests = {}
    for count in TESTS if dataset == "cluttered" else TESTS[:1]:  # there are so many digits
        *_, test, labels = data.load(dataset, test=count)
        right = [networks.right(net, test, labels) for net in (model, slim, result)]
        original, before, after = (100 * each.float().mean().item() for each in right)
        lost = (right[0].float() - right[2].float()).numpy()
        shown = data.digits_shown(dataset, len(test))
        per_digit = np.bincount(shown, lost, data.TEST_DIGITS).astype(int)
        tests[str(len(test))] = {
            "lost": original - after,
            # digit:images, where the two networks differ
            "digits": " ".join(f"{digit}:{per_digit[digit]}" for digit in per_digit.nonzero()[0]),
        }
    row = {
        **versions(),
        "network": name,
        "data": dataset,
        "seed": seed,
        "fold": fold,
        "original": original,
        "converted": before,
        "distilled": after,
        "tests": tests,
        "kl_converted": divergence(slim, model, test.split(256)),
        "kl_distilled": divergence(result, model, test.split(256)),
        "steps": result.run.steps,
        "seconds": result.run.seconds,
    }
    print(
        f"{name} {dataset} {seed} {fold:g}x: {original:.2f} -> {before:.2f} -> {after:.2f} %, "
        f"KL {row['kl_converted']:.4f} -> {row['kl_distilled']:.4f}",
        flush=True,
    )
    return row


def interval_table(rows: list[dict[str, Any]]) -> PrettyTable:
    """What distilled networks lose in the mean, and what of that the test images can tell."""
    table = PrettyTable(["data", "budget", "test images", "networks", "lost", "95 % interval"])
    known = [row for row in rows if "tests" in row]
    for dataset, fold in sorted({(r["data"], r["fold"]) for r in known}, key=str):
        mine = [r["tests"] for r in known if (r["data"], r["fold"]) == (dataset, fold)]
        for images in sorted(mine[0], key=int):
            lost = statistics.mean(tests[images]["lost"] for tests in mine)
            low, high = interval(dataset, int(images), [tests[images]["digits"] for tests in mine])
            cells = [dataset, f"1/{fold:g}", f"{int(images):,}", len(mine)]
            table.add_row([*cells, f"{lost:.2f}", f"{low:.2f} to {high:.2f}"])
    return table


def interval(dataset: str, images: int, digits: list[str]) -> tuple[float, float]:
    """Where 95 % of the means lie that other networks and test digits would have, in points.

    Bootstrapped over both: images of one digit are alike, and so are networks by their digits.
    """
    lost = np.zeros((len(digits), data.TEST_DIGITS))
    for row, text in zip(lost, digits, strict=True):
        for pair in text.split():
            digit, count = map(int, pair.split(":"))
            row[digit] = count
    shown = np.bincount(data.digits_shown(dataset, images), minlength=data.TEST_DIGITS)
    generator = np.random.default_rng(0)
    means = []
    for _ in range(DRAWS):
        drawn = generator.integers(0, data.TEST_DIGITS, data.TEST_DIGITS)
        nets = generator.integers(0, len(lost), len(lost))
        means.append(lost[np.ix_(nets, drawn)].mean(0).sum() / shown[drawn].sum())
    low, high = 100 * np.percentile(means, (2.5, 97.5))
    return low, high


def distillation_table(rows: list[dict[str, Any]]) -> PrettyTable:
    """Points below the original, before and after, per data set, network and budget."""
    table = PrettyTable(
        ["data", "budget", "network", "original", "lost, converted", "lost, distilled", "KL"]
    )
    for dataset, fold in sorted({(r["data"], r["fold"]) for r in rows}, key=str):
        here = [r for r in rows if (r["data"], r["fold"]) == (dataset, fold)]
        for name in [*dict.fromkeys(r["network"] for r in here), "all"]:
            mine = [r for r in here if name in (r["network"], "all")]

            def mean(key: str, of: list[dict[str, Any]] = mine) -> float:
                return statistics.mean(r[key] for r in of)

            lost = {
                k: mean_and_spread([r["original"] - r[k] for r in mine])
                for k in ("converted", "distilled")
            }
            table.add_row(
                [
                    *(dataset, f"1/{fold:g}", name, f"{mean('original'):.2f} %"),
                    *lost.values(),
                    f"{mean('kl_converted'):.4f} to {mean('kl_distilled'):.4f}",
                ]
            )
    return table


def trained_form(conv: str, dataset: str, seed: int, epochs: int) -> dict[str, Any]:
    """MobileNetV1 in one form, trained as the other one is."""
    inputs, labels, test, test_labels = (
        dataclasses.astuple(load_digits()) if dataset == "digits" else data.load(dataset)
    )  # both of 32×32, for the network's stride is 16
    torch.manual_seed(seed)
    model = mobilenet_v1(conv, **NARROW)  # type: ignore[arg-type]
    options = {"epochs": epochs, "batch_size": 64, "lr": 0.1, "ema": 0.99, "validation": 0.0}
    result = train(model, (inputs, labels), seed=seed, augment="shift", progress=False, **options)
    correct = count_correct(result, test, test_labels)
    account = separable.count(model, (1, *inputs.shape[1:]))
    row = {
        **versions(),
        "form": conv,
        "data": dataset,
        "seed": seed,
        "epochs": epochs,
        "correct": correct,
        "tested": len(test),
        "params": account.params,
        "macs": account.macs,
        "seconds": result.run.seconds,
    }
    print(f"{conv} {dataset} {seed}: {100 * correct / len(test):.2f} %", flush=True)
    return row


def step_seconds(channels_last: bool, batch: int, turns: int) -> dict[str, list[float]]:
    """Seconds of a training step of either form, in turn."""
    inputs, labels = (part[:batch] for part in data.load("cluttered")[:2])
    form = torch.channels_last if channels_last else torch.contiguous_format
    steps = {}
    for conv in FORMS:
        torch.manual_seed(0)
        model = mobilenet_v1(conv, **NARROW).to(memory_format=form)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        steps[conv] = _step(model, optimizer, inputs.contiguous(memory_format=form), labels)
    seconds: dict[str, list[float]] = {conv: [] for conv in FORMS}
    for turn in range(turns + 3):
        for conv, step in steps.items():
            begun = time.perf_counter()
            step()
            if turn >= 3:  # the first ones warm up
                seconds[conv].append(time.perf_counter() - begun)
    return seconds


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor
) -> Callable[[], None]:
    def step() -> None:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def form_table(rows: list[dict[str, Any]]) -> PrettyTable:
    """Accuracy with its interval over all seeds' test images, parameters, MACs, time."""
    table = PrettyTable(
        [
            *("data", "epochs", "form", "accuracy", "95 % interval"),
            *("parameters", "MACs", "epoch (s)"),
        ]
    )
    for dataset, epochs in sorted({(r["data"], r["epochs"]) for r in rows}):
        for conv in FORMS:
            cell = (dataset, epochs, conv)
            mine = [r for r in rows if (r["data"], r["epochs"], r["form"]) == cell]
            correct, tested = (sum(r[key] for r in mine) for key in ("correct", "tested"))
            low, high = wilson_interval(correct, tested)
            epoch = [r["seconds"] / r["epochs"] for r in mine]
            table.add_row(
                [
                    *(dataset, str(epochs), conv, f"{100 * correct / tested:.2f} %"),
                    f"{100 * low:.2f} to {100 * high:.2f}",
                    *(f"{mine[0]['params']:,}", f"{mine[0]['macs']:,}"),
                    mean_and_spread(epoch),
                ]
            )
    return table


def step_table(steps: dict[str, Any]) -> PrettyTable:
    """Median and quartiles of a training step per image."""
    table = PrettyTable(["memory format", "form", "ms per image", "quartiles"])
    for layout, both in steps["seconds"].items():
        for conv, seconds in both.items():
            each = [1e3 * second / steps["batch"] for second in seconds]
            low, middle, high = statistics.quantiles(each, n=4)
            table.add_row([layout, conv, f"{middle:.3f}", f"{low:.3f} to {high:.3f}"])
    return table


def fed(images: int, size: int, workers: int, epochs: int) -> dict[str, Any]:
    """Share of the time that a training on a folder of JPEG files waits for its data."""
    with tempfile.TemporaryDirectory() as folder:
        generator = torch.Generator().manual_seed(0)
        for index in range(images):
            place = Path(folder, str(index % 10))
            place.mkdir(exist_ok=True)
            coarse = torch.rand(1, 3, 32, 40, generator=generator)
            pixels = nn.functional.interpolate(coarse, (300, 400), mode="bicubic").clamp(0, 1)
            array = (255 * pixels[0]).byte().permute(1, 2, 0).numpy()
            Image.fromarray(array).save(place / f"{index}.jpg", quality=90)
        recipe = Recipe(
            epochs=epochs, batch_size=32, image_size=size, workers=workers, validation=0.0
        )
        model = mobilenet_v1("separable", num_classes=10)
        run = train(model, folder, recipe=recipe, progress=False).run
    return {
        "images": images,
        "size": size,
        "workers": workers,
        "epochs": epochs,
        "waiting": run.waiting,
        "seconds": run.seconds,
    }


def versions() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "separable": separable.__version__,
    }


def record(part: str, value: Any) -> None:
    """Write one part of the results, and leave the others."""
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({**results, part: {**versions(), **value}}, indent=1) + "\n")


def _kept(part: str, again: set[tuple[Any, ...]], *keys: str) -> list[dict[str, Any]]:
    """The recorded rows of a part, each with its versions, without those measured again."""
    recorded = json.loads(OUT.read_text()) if OUT.exists() else {}
    part_of = recorded.get(part, {})
    held_for = {key: part_of[key] for key in versions() if key in part_of}
    return [
        {**held_for, **row}
        for row in part_of.get("rows", [])
        if tuple(row[key] for key in keys) not in again
    ]


def show(table: PrettyTable) -> None:
    """Print a table as it stands in the documentation."""
    table.set_style(TableStyle.MARKDOWN)
    print(table)


@click.group()
@click.option("--threads", default=1)
def main(threads: int) -> None:
    """Each command measures one part, prints its table and records it."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message=".*positions; more calibration")


@main.command()
@click.option("--network", "names", multiple=True, default=networks.NETWORKS)
@click.option("--data", "datasets", multiple=True, default=data.SETS)
@click.option("--seed", "seeds", multiple=True, type=int, default=(1, 2, 3))
@click.option("--fold", "folds", multiple=True, type=float, default=(7.0, 4.0))
def distil(
    names: tuple[str, ...],
    datasets: tuple[str, ...],
    seeds: tuple[int, ...],
    folds: tuple[float, ...],
) -> None:
    """Converted networks, before and after one pass over unlabelled inputs.

    What was recorded of other networks, data, seeds and budgets stays.
    """
    again = set(itertools.product(names, datasets, seeds, folds))
    rows = _kept("distillation", again, "network", "data", "seed", "fold")
    for seed in seeds:
        for dataset in datasets:
            for name in names:
                rows += [distilled(name, dataset, seed, fold) for fold in folds]
                record("distillation", {"recipe": Distillation().to_dict(), "rows": rows})
    show(distillation_table(rows))
    show(interval_table(rows))


@main.command()
@click.option("--data", "datasets", multiple=True, default=data.SETS)
@click.option("--seed", "seeds", multiple=True, type=int, default=(1, 2, 3))
@click.option("--epochs", default=10)
def forms(datasets: tuple[str, ...], seeds: tuple[int, ...], epochs: int) -> None:
    """MobileNetV1 in both forms, trained the same way.

    What was recorded of other data and seeds stays.
    """
    again = set(itertools.product(datasets, seeds, [epochs]))
    rows = _kept("forms", again, "data", "seed", "epochs")
    for seed in seeds:
        for dataset in datasets:
            rows += [trained_form(conv, dataset, seed, epochs) for conv in FORMS]
            record("forms", {"rows": rows})
    show(form_table(rows))


@main.command()
@click.option("--batch", default=64)
@click.option("--turns", default=15)
def steps(batch: int, turns: int) -> None:
    """A training step of either form, in turn."""
    layouts = {"contiguous": False, "channels_last": True}
    result = {
        "batch": batch,
        "seconds": {name: step_seconds(last, batch, turns) for name, last in layouts.items()},
    }
    record("steps", result)
    show(step_table(result))


@main.command()
@click.option("--images", default=320)
@click.option("--size", default=128)
@click.option("--workers", default=2)
@click.option("--epochs", default=1)
def feeding(images: int, size: int, workers: int, epochs: int) -> None:
    """A folder of images: how long the training waits for them."""
    result = fed(images, size, workers, epochs)
    record("feeding", result)
    print(
        f"{images} JPEG files of 300×400, batches of 32 at {size}×{size}, {workers} workers: "
        f"{result['waiting']:.1%} of the training time spent waiting for data"
    )


if __name__ == "__main__":
    main()
