"""Applying a plan: each layer fitted in execution order, batch norms, then all together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..cost.preserving import copied
from ..failures import warn
from ..outputs import MEASURES, Outputs
from ..progress import progress as progress_bar
from .calibration import Inputs
from .checking import check_model, check_reached
from .fitting import bias_of, fit, targets
from .forms import TRANSPOSED, Conv, Factors, SeparatedConv, Shape, attached, grouped, separated
from .moments import Moments
from .plans import Plan, Row
from .refining import refined
from .sensitivity import divergence, fisher
from .sites import (
    Runs,
    Site,
    collect,
    convolutions,
    frozen_copy,
    geometry,
    replaced,
    trace,
)
from .varying import Varied

ROUNDS = 2
"""times that a layer is fitted again, to outputs that its activation leaves free"""


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    plan: Plan
    error: float | None
    """divergence of the outputs on the calibration inputs, measured: mean KL of logits, else
    relative squared error; None without inputs, and once the network was trained"""
    batch_norm: bool
    """whether re-estimated batch-norm statistics lowered it and were kept"""
    refined: bool = False
    """whether the pass over all layers together lowered it, there and on variations of the
    inputs, and was kept"""
    outputs: Outputs = "auto"
    """what the network's outputs were taken for; "auto" is not known"""
    notes: tuple[str, ...] = ()
    """what else there is to tell, a sentence each"""
    trained: bool = False
    """whether the network was trained since, so that its error is another one"""

    def after_training(self) -> Report:
        """That of the network once it was trained: what was measured holds no more."""
        return dataclasses.replace(self, error=None, trained=True)

    def to_dict(self) -> dict[str, Any]:
        """The plan and what was measured as plain Python values, ready for JSON."""
        return {
            "plan": json.loads(self.plan.to_json()),
            "error": self.error,
            "batch_norm": self.batch_norm,
            "refined": self.refined,
            "outputs": self.outputs,
            "notes": list(self.notes),
            "trained": self.trained,
        }

    def __str__(self) -> str:
        told = "".join(f"\n{note}" for note in self.notes)
        if self.trained:
            return f"{self.plan}\noutput error not measured since fine-tuning{told}"
        if self.error is None:
            return f"{self.plan}\nfrom the weights alone; the error was not measured"
        statistics = "re-estimated" if self.batch_norm else "kept"
        together = "layers refined together" if self.refined else "each layer fitted once"
        measure = f" ({MEASURES[self.outputs]})" if self.outputs in MEASURES else ""
        return (
            f"{self.plan}\nmeasured output error {self.error:.3g}{measure} on the calibration "
            f"inputs, batch-norm statistics {statistics}, {together}{told}"
        )


@torch.inference_mode(False)
def apply(model: nn.Module, plan: Plan, calibration: Any, *, progress: bool = True) -> nn.Module:
    """Convert a network as a plan says.

    Layers are fitted one after the other in the order in which they run: each is given the
    inputs that it gets in the network converted so far, and is to return what it returned in the
    original. Under torch.distributed each process passes its own share of the calibration
    inputs; their moments are summed, and all processes return the same weights.

    Args:
        model: the network the plan was made for; it is left as it was.
        plan: the plan, which may have been edited.
        calibration: an iterable of inputs, batches or (input, label) pairs; None fits the
            weights alone, which costs much more accuracy.
        progress: whether to show a progress bar.

    Returns:
        A new model with the attribute `report`. Its train flags, data types, devices, memory
        formats and requires_grad flags are the original's.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the plan is of another network, or the inputs are rejected or not finite.
    """
    check_model(model, Report)
    original = frozen_copy(model)
    _check_plan(original, plan)
    inputs = None if calibration is None else Inputs(calibration, original)
    first, further = (None, ()) if inputs is None else (inputs.first, inputs)
    sites = trace(original, first, further)
    if inputs is not None:
        changing = {row.name for row in plan.rows if row.form is not None}
        check_reached(original, [s for s in sites if s.name in changing], inputs.first, inputs)
    converted, report = fitted(original, plan, sites, inputs, progress)
    if inputs is not None:
        converted, report = finished(converted, report, original, inputs, progress)
    for name, module in converted.named_modules():
        with_flags = _source(model, name)
        if with_flags is not None:
            module.training = with_flags.training
    return with_report(converted, report, model)


@torch.no_grad()
def with_report(converted: nn.Module, report: Report, model: nn.Module) -> nn.Module:
    """Leave the report on a network, and buffers as calibration found them, as counters of runs.

    Re-estimated batch-norm statistics stay.
    """
    own = dict(converted.named_buffers())
    for name, buffer in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        renewed = report.batch_norm and isinstance(owner, nn.modules.batchnorm._BatchNorm)
        if name in own and own[name].shape == buffer.shape and not renewed:
            own[name].copy_(buffer)
    converted.report = report  # type: ignore[assignment]
    return converted


def _source(model: nn.Module, name: str) -> nn.Module | None:
    """The module of a name, or of the converted convolution that holds it."""
    while True:
        try:
            return model.get_submodule(name)
        except AttributeError:
            name = name.rpartition(".")[0]


@torch.inference_mode(False)
def fitted(
    original: nn.Module,
    plan: Plan,
    sites: Iterable[Site],
    inputs: Inputs | None,
    progress: bool,
) -> tuple[nn.Module, Report]:
    """Fit a plan's layers one after the other, then the batch-norm statistics.

    Args:
        original: the network, in eval mode; left as it is.
        plan: the plan.
        sites: the network's layers, as `trace` finds them on the inputs.
        inputs: calibration inputs, or None.
        progress: whether to show a progress bar.
    """
    if inputs is None:
        warn(
            "conversion without calibration inputs fits the weights alone and keeps the "
            "batch-norm statistics: expect a large loss of accuracy; a few hundred unlabelled "
            "inputs avoid it"
        )
    converted = copied(original)
    by_name = {site.name: site for site in sites}
    changing = [row for row in plan.rows if row.form is not None]
    shown, kind = None, plan.outputs
    information: dict[str, Tensor] = {}
    if inputs is not None:
        kind, found = inputs.measured(kind), [by_name[row.name] for row in changing]
        macs = sum(row.macs_before for row in plan.rows)
        shown = Varied(inputs, macs, plan.seed).taken_by(original)
        information = fisher(original, found, shown, plan.seed, kind, inputs.whole)
    # a layer's time grows with the part of both networks that runs before it
    ends = _ends(plan)
    total = sum(ends[row.name] for row in changing)
    with progress_bar("fitting", total, unit=None, shown=progress) as bar:
        for row in changing:
            bar.set_description(f"fitting {row.name}", refresh=False)
            site = by_name[row.name]
            told = information.get(row.name)
            layer = _settled(original, converted, site, row, told, shown, plan.seed)
            converted = replaced(converted, site.names, layer)
            bar.update(ends[row.name])
    if inputs is None:
        return converted, Report(plan, None, False, outputs=kind)
    error = divergence(converted, original, inputs, kind)
    report = Report(plan, error, False, outputs=kind, notes=tuple(inputs.notes))
    renewed = with_batch_norm(converted, inputs)
    if renewed is not None and (after := divergence(renewed, original, inputs, kind)) < error:
        return renewed, dataclasses.replace(report, error=after, batch_norm=True)
    return converted, report


@torch.inference_mode(False)
def finished(
    converted: nn.Module, report: Report, original: nn.Module, inputs: Inputs, progress: bool
) -> tuple[nn.Module, Report]:
    """End with the pass over all layers together, unless the calibration error rises by it."""
    plan, kind, before = report.plan, report.outputs, report.error
    assert before is not None
    macs = sum(row.macs_before + 3 * row.macs_after for row in plan.rows)
    better = refined(converted, original, inputs, macs, plan.seed, progress, kind)
    report = dataclasses.replace(report, notes=tuple(inputs.notes))
    if better is None:
        return converted, report
    error = divergence(better, original, inputs, kind)
    if not error < before:
        return converted, report
    return better, dataclasses.replace(report, error=error, refined=True)


def _settled(
    original: nn.Module,
    converted: nn.Module,
    site: Site,
    row: Row,
    information: Tensor | None,
    shown: Varied | None,
    seed: int,
) -> SeparatedConv:
    """Fit a layer, again where its activation leaves its outputs free."""
    conv: Any = original.get_submodule(row.name)
    if shown is None:
        return fitted_module(conv, row, None, information)
    if not site.calls:
        raise ValueError(
            f"layer `{row.name}` never runs on the `calibration` inputs; keep it dense with "
            "`plan.edited`"
        )
    runs = Runs(original, converted, site, shown)
    moments = collect(runs, seed)
    _warn_if_few(moments.count / shown.copies, row)
    layer = fitted_module(conv, row, moments, information)
    for _ in range(ROUNDS if site.sequel.cuts else 0):
        moments = collect(runs, seed, layer, moments)
        layer = fitted_module(conv, row, moments, information)
    return layer


def fitted_module(
    conv: Conv, row: Row, moments: Moments | None, information: Tensor | None
) -> SeparatedConv:
    """Fit a row's form to a layer's moments, group by group, and build its module."""
    assert row.form is not None
    goals = targets(grouped(conv.weight.detach(), conv.groups), moments, information)
    parts = [fit(goal, row.form, row.rank) for goal in goals]
    joined: list[Any] = [
        None if part[0] is None else torch.cat(part)
        for part in zip(*(factors[1:] for factors in parts), strict=True)
    ]
    factors = Factors(row.form, *joined)
    bias = conv.bias if moments is None else bias_of(factors.dense(), moments)
    return separated(conv, factors, bias)


def _ends(plan: Plan) -> dict[str, float]:
    """Multiply-adds of a network up to each layer, inclusive."""
    total, result = 0.0, {}
    for row in plan.rows:
        total += row.macs_before
        result[row.name] = total
    return result


def _check_plan(model: nn.Module, plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"`plan` (a {type(plan).__name__}) must be a Plan, as `plan()` returns it")
    known = convolutions(model)
    for row in plan.rows:
        if row.name not in known:
            raise ValueError(f"`plan` has the layer `{row.name}`, which `model` has not")
        conv: Any = model.get_submodule(row.name)
        if row.shape and (isinstance(conv, TRANSPOSED) or Shape.of(conv) != row.shape):
            raise ValueError(
                f"`plan` was made for another shape of layer `{row.name}`: {row.shape}, "
                f"not that of {conv}"
            )
        if row.geometry and row.geometry != geometry(conv):
            raise ValueError(
                f"`plan` was made for another layer `{row.name}`: with {row.geometry}, not "
                f"{geometry(conv)}"
            )
        if row.form and (reason := attached(conv)):
            raise ValueError(
                f"layer `{row.name}` cannot change, as {reason}: keep it dense with `plan.edited`"
            )


def _warn_if_few(positions: float, row: Row) -> None:
    assert row.shape is not None
    unknowns = row.shape.inputs * row.shape.taps
    if positions < unknowns:
        warn(
            f"layer `{row.name}` has {unknowns} inputs per output but the calibration inputs "
            f"show it only {positions:.0f} positions; more calibration inputs would help"
        )


def with_batch_norm(converted: nn.Module, inputs: Iterable[Tensor]) -> nn.Module | None:
    """Re-estimate the statistics of a network's batch norms.

    Args:
        converted: the network, in eval mode; it is left as it was.
        inputs: batches; those of a single input are passed over.

    Returns:
        A copy whose running statistics are averages over the batches, or None if there are no
        batch norms or no batches.
    """
    result = copied(converted)
    norms: list[Any] = [
        module
        for module in result.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and module.running_mean is not None
    ]
    if not norms:
        return None
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # plain averages over the batches
        norm.train()
    batches = 0
    with torch.no_grad():
        for batch in inputs:
            if len(batch) > 1:  # one input may leave a channel with one value and no variance
                result(batch)
                batches += 1
    if not batches:
        return None
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
        _average(norm, batches)
    return result


def _average(norm: Any, batches: int) -> None:
    """Average the statistics of all processes, each by its number of batches."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    total = torch.tensor(float(batches), device=norm.running_mean.device)
    dist.all_reduce(total)
    norm.num_batches_tracked.fill_(int(total))
    for statistic in (norm.running_mean, norm.running_var):
        statistic.mul_(batches / total)
        dist.all_reduce(statistic)
