"""Terms of its own for each channel: `python -m benchmarks.convert.terms --help`.

A depthwise-pointwise form takes T filters of every input channel. Would as many filters in all do
better if each channel had the number it needs? And does the form with two pointwise convolutions,
which may mix channels before it filters them, do better still at the same multiply-adds?
"""

from __future__ import annotations

from typing import Any

import click
import torch
from torch import Tensor

from separable.conversion import fitting
from separable.conversion.calibration import Inputs
from separable.conversion.fitting import Target, curve, targets
from separable.conversion.forms import grouped
from separable.conversion.sensitivity import fisher
from separable.conversion.sites import input_moments, trace

from . import networks, tables
from .run import calibrated


def freely(target: Target, most: int) -> Tensor:
    """The error with 1 to `most` filters, each the one that lowers it most, `[most]`."""
    white = fitting._White.of(target, mix=False)
    filters = fitting._start(white, "depthwise-pointwise", target.shape.taps)
    covariance, cross = fitting._Problem.of(white, "depthwise-pointwise").normal(filters)
    covariance, cross = covariance.clone(), cross.clone()
    floor = 1e-7 * covariance.diagonal().mean()
    left, errors = float(white.energy), []
    for _ in range(most):
        scale = covariance.diagonal().clamp_min(floor)
        gains = cross.square().sum(0) / scale
        best = int(gains.argmax())
        column = covariance[:, best] / scale[best].sqrt()
        cross -= torch.outer(cross[:, best] / scale[best].sqrt(), column)
        covariance -= torch.outer(column, column)
        left -= float(gains[best])
        errors.append(max(left, 0.0))
    return torch.tensor(errors)


@click.command()
@click.option("--network", "names", multiple=True, default=networks.NETWORKS)
@click.option("--data", "dataset", default="digits")
@click.option("--terms", "counts", multiple=True, type=int, default=(1, 2, 3))
def main(names: tuple[str, ...], dataset: str, counts: tuple[int, ...]) -> None:
    """Print the predicted divergence that all layers cause, by closed-form starts of each form."""
    torch.set_num_threads(1)
    lines = []
    for name in names:
        model = networks.trained(name, dataset, 0)
        inputs = Inputs(calibrated(dataset, 0, 512), model)
        sites = [s for s in trace(model, inputs.first) if s.shape is not None and s.shape.taps > 1]
        moments = input_moments(model, sites, inputs, 0)
        information = fisher(model, sites, inputs, 0)
        sums = dict.fromkeys(((form, terms) for form in range(3) for terms in counts), 0.0)
        for site in sites:
            conv: Any = model.get_submodule(site.name)
            weight = grouped(conv.weight.detach(), conv.groups)
            (goal,) = targets(weight, moments[site.name], information[site.name], own=True)
            shape = goal.shape
            most = min(max(counts), shape.taps, shape.outputs)
            alike = curve(goal, "depthwise-pointwise", most)
            free = freely(goal, most * shape.inputs)
            ranks = shape.inputs + shape.outputs + shape.taps
            mixed = curve(goal, "pointwise-depthwise-pointwise", shape.inputs * shape.taps)
            for terms in counts:
                t = min(terms, most)
                rank = max(1, t * shape.inputs * (shape.taps + shape.outputs) // ranks)
                errors = alike[t - 1], free[t * shape.inputs - 1], mixed[min(rank, len(mixed)) - 1]
                for form, error in enumerate(errors):
                    sums[form, terms] += float(error) * goal.scale
        for terms in counts:
            lines.append([name, str(terms), *(f"{sums[form, terms]:.3g}" for form in range(3))])
    heads = ["network", "filters per channel", "the same T", "T by channel", "pw-dw-pw, same MACs"]
    print(tables.grid(heads, lines))


if __name__ == "__main__":
    main()
