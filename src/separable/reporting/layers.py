"""The table of the layers: each module of the regular network beside what became of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .wording import size, small

if TYPE_CHECKING:
    from ..conversion import Plan
    from ..conversion import Row as PlanRow
    from ..cost import Row
    from ..runtime.explaining import Explanation
    from ..runtime.explaining import Row as KernelRow
    from .findings import Network


@dataclass(frozen=True)
class Side:
    """A module, with all that is below it, in one of the two networks.

    Attributes:
        params: its parameters.
        macs: its multiply-accumulates in a pass.
        traffic_bytes: its compulsory traffic in a pass.
        torch_seconds: in eager PyTorch; None where it was not called as a module.
        runtime_seconds: sum of its kernels in the separable runtime; None where it has none of
            its own, or a part of it runs in torch.
        runs_in: the layer whose kernel does its work too, "torch" where torch does, else "".
        is_shared: whether one of its kernels has multiply-adds of modules outside of it too.
    """

    params: int
    macs: int
    traffic_bytes: int
    torch_seconds: float | None
    runtime_seconds: float | None
    runs_in: str
    is_shared: bool


@dataclass(frozen=True)
class Layer:
    """A module of the regular network and what became of it.

    Attributes:
        name: dotted name, "" for the network itself.
        kind: name of its class.
        calls: in a pass.
        output_shape: of its first output; None where it has none.
        is_leaf: whether it has no module below it that is in the table.
        before: in the regular network.
        after: in the converted one; None where there is none of that name.
        form: what it was converted to, "" where it was not.
        rank: of that form.
        reason: why it was converted so, or why not.
    """

    name: str
    kind: str
    calls: int
    output_shape: tuple[int, ...] | None
    is_leaf: bool
    before: Side
    after: Side | None
    form: str
    rank: int
    reason: str

    @property
    def depth(self) -> int:
        """Containers around it: 0 for the network itself."""
        return self.name.count(".") + 1 if self.name else 0


def join(regular: Network, converted: Network | None, plan: Plan | None) -> tuple[Layer, ...]:
    """Lay the modules of both networks side by side, by name.

    Modules that were never called and hold none that was are left out.
    """
    befores = sides(regular)
    afters = {} if converted is None else sides(converted)
    planned = {} if plan is None else {row.name: row for row in plan.rows}
    rows = [row for row in regular.account.rows if row.calls or row.macs]
    parents = {row.name.rpartition(".")[0] for row in rows if row.name}
    layers = []
    for row in rows:
        is_leaf = row.name not in parents
        step = planned.get(row.name)
        layers.append(
            Layer(
                name=row.name,
                kind=row.kind,
                calls=row.calls,
                output_shape=row.output_shape,
                is_leaf=is_leaf,
                before=befores[row.name],
                after=afters.get(row.name),
                form=(step and step.form) or "",
                rank=step.rank if step else 0,
                reason=_reason(row, step, is_leaf) if plan else "",
            )
        )
    return tuple(layers)


def _reason(row: Row, step: PlanRow | None, is_leaf: bool) -> str:
    if step is None:
        return "not a convolution" if is_leaf and row.macs else ""
    if step.form is None:
        return step.reason
    saving = f"{step.macs_before / step.macs_after:.1f}× fewer MACs"
    return saving if step.error is None else f"{saving} at a predicted error of {small(step.error)}"


def sides(network: Network) -> dict[str, Side]:
    """The figures of every module of a network, by name."""
    rows = network.account.rows
    torch_seconds = {layer.name: layer.inclusive for layer in network.layers}
    kernels = _kernels(network.explanation, [row.name for row in rows])
    shared = _shared(network)
    return {
        row.name: Side(
            row.params,
            row.macs,
            row.traffic_bytes,
            torch_seconds.get(row.name),
            *kernels.get(row.name, (None, "")),
            row.name in shared,
        )
        for row in rows
    }


def multiplying(network: Network) -> Iterator[tuple[KernelRow, list[str]]]:
    """The kernels with multiply-adds, and the modules whose they are."""
    if network.explanation is None:
        return
    macs = {row.name for row in network.account.rows if row.own.macs}
    for step in network.explanation.rows:
        if step.macs:
            yield step, [step.layer, *(name for name in step.fused if name in macs)]


def _shared(network: Network) -> set[str]:
    """Modules that a kernel computes together with something outside of them."""
    found: set[str] = set()
    for _, names in multiplying(network):
        around = [set(_upwards(name)) for name in names]
        found |= {name for some in around for name in some if not all(name in a for a in around)}
    return found


def _kernels(
    explanation: Explanation | None, names: Sequence[str]
) -> dict[str, tuple[float | None, str]]:
    """Seconds of the kernels at and below each module, or who does its work."""
    if explanation is None:
        return {}
    known = set(names)
    seconds: dict[str, float] = {}
    hosts: dict[str, str] = {}
    for step in explanation.rows:
        # an operator outside of any module bears its own name: it is the network's
        owner = step.layer if step.layer in known else ""
        for name in _upwards(owner):
            if step.seconds is None:
                hosts[name] = "torch"
            else:
                seconds[name] = seconds.get(name, 0.0) + step.seconds
        # what is fused may be a part of a module that is in the table: b.lead of b
        for fused in step.fused:
            for name in _upwards(fused):
                hosts.setdefault(name, owner)
    found: dict[str, tuple[float | None, str]] = {}
    for name in names:
        if hosts.get(name) == "torch":
            found[name] = (None, "torch")
        elif name in seconds:
            found[name] = (seconds[name], "")
        elif name in hosts:
            found[name] = (None, hosts[name])
    return found


def _upwards(name: str) -> list[str]:
    """A module and all around it: a.b, a and the network itself."""
    names = [name]
    while names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return names


def to_csv(layers: Sequence[Layer]) -> str:
    """The table with bare numbers, for programs to read; times in seconds."""
    figures = list(Side.__dataclass_fields__)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["name", "kind", "calls", "output_shape"]
        + [f"{side}_{figure}" for side in ("regular", "converted") for figure in figures]
        + ["form", "rank", "reason"]
    )
    for layer in layers:
        cells = [
            "" if side is None else getattr(side, figure)
            for side in (layer.before, layer.after)
            for figure in figures
        ]
        own = [layer.name, layer.kind, layer.calls, size(layer.output_shape).replace("×", "x")]
        table.writerow([*own, *cells, layer.form, layer.rank or "", layer.reason])
    return text.getvalue()
