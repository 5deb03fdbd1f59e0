"""The answer: one sentence, and the four figures at the top of a report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .wording import amount, milliseconds, percent, small, times

if TYPE_CHECKING:
    from ..cost import Measurement
    from .findings import Findings, Network


@dataclass(frozen=True)
class Headline:
    """One figure at the top.

    Attributes:
        name: of what.
        value: of the converted network, or of the only one.
        before: of the regular network; "" where there is one network only.
        ratio: how the two compare.
        details: what else belongs to it.
        convention: what exactly it counts.
    """

    name: str
    value: str
    before: str
    ratio: str
    details: str
    convention: str


def answer(findings: Findings) -> str:
    """What separable gives for a network, in a sentence or two."""
    regular, converted = findings.regular, findings.converted
    if converted is None:
        return _alone(findings)
    macs = regular.account.macs / max(converted.account.macs, 1)
    params = regular.account.params / max(converted.account.params, 1)
    speeds = [f"{_speed(regular.torch, converted.torch)} in PyTorch"]
    if converted.runtime is not None:
        speeds.append(f"{_speed(regular.torch, converted.runtime)} in the separable runtime")
    text = (
        f"Converted, {findings.title} needs {_fewer(macs)} multiply-adds and {_fewer(params)} "
        f"parameters, runs {' and '.join(speeds)}"
    )
    if regular.accuracy is not None and converted.accuracy is not None:
        text += (
            f", and classifies {percent(converted.accuracy)} of {findings.tested} test inputs "
            f"correctly instead of {percent(regular.accuracy)}"
        )
    elif findings.error is not None:
        text += f", and its outputs move by {small(findings.error)} ({findings.error_convention})"
    return f"{text}.{_without_runtime(converted)}"


def _alone(findings: Findings) -> str:
    account, regular = findings.regular.account, findings.regular
    text = (
        f"{findings.title} needs {amount(account.macs)} multiply-adds and has "
        f"{amount(account.params)} parameters"
    )
    if regular.runtime is not None:
        text += f"; the separable runtime runs it {_speed(regular.torch, regular.runtime)}"
        text += " as PyTorch does"
    text += "."
    if findings.obstacle:
        text += f" There is nothing to convert: {findings.obstacle}."
    return text + _without_runtime(regular)


def _speed(before: Measurement, after: Measurement) -> str:
    return f"{times(before.ratio_to(after).median)} as fast"


def _fewer(ratio: float) -> str:
    return f"{times(ratio)} fewer" if ratio >= 1 else f"{times(1 / ratio)} more"


def _without_runtime(network: Network) -> str:
    return f" The separable runtime can't take it: {network.problem}." if network.problem else ""


def headlines(findings: Findings) -> tuple[Headline, ...]:
    """The four figures at the top: parameters, MACs, latency, and accuracy or error."""
    return (
        _counted(findings, "Parameters", "params", "parameters, shared ones once"),
        _counted(
            findings,
            "Multiply-adds",
            "macs",
            "MACs of convolutions and matrix products in one pass, padding zeros included",
        ),
        _latency(findings),
        _quality(findings),
    )


def _counted(findings: Findings, name: str, field: str, convention: str) -> Headline:
    accounts = [network.account for network in findings.networks.values()]
    values = [getattr(account, field) for account in accounts]
    bound = "≥ " if field == "macs" and any(account.is_lower_bound for account in accounts) else ""
    exact = [f"{bound}{value:,}" for value in values]
    details = " → ".join(exact)
    if len(values) == 1:
        return Headline(name, bound + amount(values[0]), "", "", details, convention)
    ratio = values[0] / values[1] if values[1] else math.inf
    return Headline(
        name, bound + amount(values[1]), amount(values[0]), _fewer(ratio), details, convention
    )


def _latency(findings: Findings) -> Headline:
    networks = list(findings.networks.values())
    first, last = networks[0], networks[-1]
    fastest = last.runtime or last.torch
    engine = "the separable runtime" if last.runtime is not None else "PyTorch"
    lines = []
    for name, found in (
        ("PyTorch", [network.torch for network in networks]),
        ("runtime", [network.runtime for network in networks]),
    ):
        measured = [each for each in found if each is not None]
        if measured:
            lines.append(f"{name} {' → '.join(milliseconds(m.median) for m in measured)} ms")
    spread = first.torch.ratio_to(fastest)
    ratio = f"{times(spread.median)} as fast" if fastest is not first.torch else ""
    quartiles = f", quartiles {times(spread.low)} to {times(spread.high)}" if ratio else ""
    return Headline(
        "Latency",
        f"{milliseconds(fastest.median)} ms",
        f"{milliseconds(first.torch.median)} ms" if ratio else "",
        ratio,
        "; ".join(lines),
        f"one pass in {engine}{', before in PyTorch' if ratio else ''}; medians of "
        f"{len(fastest.times)} repeats in turn{quartiles}",
    )


def _quality(findings: Findings) -> Headline:
    regular, converted = findings.regular, findings.converted
    if regular.accuracy is not None:
        convention = f"share of {findings.tested} labelled inputs put into their class"
        if converted is None or converted.accuracy is None:
            return Headline("Accuracy", percent(regular.accuracy), "", "", "", convention)
        points = 100 * (converted.accuracy - regular.accuracy)
        ratio = converted.accuracy / regular.accuracy if regular.accuracy else math.inf
        return Headline(
            "Accuracy",
            percent(converted.accuracy),
            percent(regular.accuracy),
            f"{ratio:.3f}×",
            f"{points:+.1f} points".replace("-", "−"),
            convention,
        )
    if converted is not None:
        if findings.error is None:
            convention = "no calibration inputs to measure it on"
            return Headline("Output error", "unknown", "", "", "", convention)
        predicted = findings.plan.error if findings.plan is not None else None
        return Headline(
            "Output error",
            small(findings.error),
            "",
            f"{times(findings.error / predicted)} the predicted" if predicted else "",
            f"predicted {small(predicted)}" if predicted else "",
            f"{findings.error_convention}, between the outputs of both on the calibration inputs",
        )
    if regular.deviation is None:
        return Headline(
            "Output error", "none", "", "", "", "nothing was converted, and no runtime checked"
        )
    return Headline(
        "Output error",
        small(regular.deviation),
        "",
        "",
        "",
        "largest difference of the runtime's outputs from PyTorch's, relative to the largest one",
    )
