"""The findings: all that a report shows, counted, converted and measured, as one frozen value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from ..conversion import Plan
from ..cost import Account, LayerTime, Measurement
from ..runtime.explaining import Explanation
from .layers import Layer, join
from .summary import Headline, answer, headlines

Kind = Literal["regular", "converted", "fitted once", "beside"]


@dataclass(frozen=True)
class Network:
    """One network: what it costs, and what a pass takes in PyTorch and in the runtime.

    Attributes:
        account: what it costs.
        torch: a pass in eager PyTorch, measured in turn with all others of the report.
        layers: each module in eager PyTorch, on one thread.
        runtime: a pass in the separable runtime, measured in the same turns; None where it can't
            take the network.
        explanation: each kernel alone, on one thread; None where there is no runtime.
        deviation: largest difference of the runtime's outputs from PyTorch's, relative to the
            largest output.
        problem: why there is no runtime.
        accuracy: share of the labelled inputs put into their class; None without labels.
    """

    account: Account
    torch: Measurement
    layers: tuple[LayerTime, ...] = ()
    runtime: Measurement | None = None
    explanation: Explanation | None = None
    deviation: float | None = None
    problem: str = ""
    accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain Python values, ready for JSON."""
        return {
            "account": self.account.to_dict(),
            "torch": self.torch.to_dict(),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "runtime": self.runtime and self.runtime.to_dict(),
            "explanation": self.explanation and dataclasses.asdict(self.explanation),
            "deviation": self.deviation,
            "problem": self.problem,
            "accuracy": self.accuracy,
        }


@dataclass(frozen=True)
class Point:
    """One network on the frontier of error against cost.

    Attributes:
        name: its budget, or what it is.
        macs: of a pass.
        params: its parameters.
        torch_seconds: median of a pass in eager PyTorch.
        runtime_seconds: median of a pass in the separable runtime; None where it has none.
        error: distance of its outputs from the regular network's, as in `Findings`; None unknown.
        accuracy: share of the labelled inputs put into their class; None without labels.
        chosen: whether it is the converted network of the report.
        kind: what it is: "regular", "converted", "fitted once" where it was converted without the
            last pass over all layers, or "beside" where it is another network.
    """

    name: str
    macs: int
    params: int
    torch_seconds: float
    runtime_seconds: float | None
    error: float | None
    accuracy: float | None
    chosen: bool
    kind: Kind


@dataclass(frozen=True)
class Machine:
    """What one core can do at most, measured between the layers.

    Attributes:
        flops: FLOP per second; a multiply-add counts as two.
        bandwidth: bytes per second of a copy of 4 MiB, read plus written.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Findings:
    """What `separable.report` found; `write` makes the page and the other files of it.

    Attributes:
        title: name of the network.
        regular: the network as it was given.
        converted: its converted form; None where none was asked for or nothing can be converted.
        plan: what became of each convolution; None where no plan is known.
        obstacle: why nothing was converted though it was asked for.
        error: distance of the converted network's outputs from the regular one's on the
            calibration inputs; None where it was not measured.
        error_convention: what that distance is; empty where the outputs have none.
        tested: labelled inputs that the accuracies are of; 0 without labels.
        frontier: the networks that error and cost are shown of, the regular one first.
        machine: the limits of this machine; None where they can't be measured.
        environment: machine, versions and settings by name.
        seed: of the conversions.
        command: what reproduces the report.
    """

    title: str
    regular: Network
    converted: Network | None
    plan: Plan | None
    obstacle: str
    error: float | None
    error_convention: str
    tested: int
    frontier: tuple[Point, ...]
    machine: Machine | None
    environment: Mapping[str, str]
    seed: int
    command: str

    @property
    def networks(self) -> dict[str, Network]:
        """The networks by what they are: "regular", and "converted" where there is one."""
        both = {"regular": self.regular, "converted": self.converted}
        return {name: network for name, network in both.items() if network is not None}

    @property
    def answer(self) -> str:
        """What separable gives, in a sentence or two."""
        return answer(self)

    @property
    def headlines(self) -> tuple[Headline, ...]:
        """The four figures at the top: parameters, MACs, latency, and accuracy or error."""
        return headlines(self)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every module of the regular network beside what became of it, in execution order."""
        return join(self.regular, self.converted, self.plan)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain Python values, ready for JSON; times in seconds."""
        return {
            "title": self.title,
            "answer": self.answer,
            "headlines": [dataclasses.asdict(each) for each in self.headlines],
            "regular": self.regular.to_dict(),
            "converted": self.converted and self.converted.to_dict(),
            "plan": self.plan and json.loads(self.plan.to_json()),
            "obstacle": self.obstacle,
            "error": self.error,
            "error_convention": self.error_convention,
            "tested": self.tested,
            "frontier": [dataclasses.asdict(point) for point in self.frontier],
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "machine": self.machine and dataclasses.asdict(self.machine),
            "environment": dict(self.environment),
            "seed": self.seed,
            "command": self.command,
        }

    def write(self, path: str | PathLike[str], format: str | None = None) -> tuple[Path, ...]:
        """Write the page, the figures or the data.

        Files appear whole or not at all.

        Args:
            path: the file; for "png" and "svg" its name with `-roofline`, ... before the ending.
            format: "html", "json" (everything), "csv" (the table of the layers), "png" or "svg"
                (the plots); by the ending of `path` if None.

        Returns:
            What was written.

        Raises:
            ValueError: the format is unknown.
            ImportError: a package of the extra `report` is missing.
            RuntimeError: "png" and "svg" need Chrome or Chromium, and there is none.
            OSError: the file cannot be written.
        """
        from .writing import write

        return write(self, Path(path), format)

    def __str__(self) -> str:
        return self.answer
