"""What a compiled model does, layer by layer, and how close each comes to the machine's limits."""

from __future__ import annotations

import time
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prettytable import PrettyTable, TableStyle

from ..progress import timed
from . import jit
from .emit.chain import Chain, ChainTile
from .emit.conv import Conv, ConvTile
from .emit.kernel import Description, Kernel, Tile
from .emit.reduction import Columns
from .emit.relayout import Relayout
from .emit.window import Window
from .execute import Program
from .memory import Buffer
from .roofline import Peak
from .steps import Step


@dataclass(frozen=True)
class Row:
    """One step.

    Attributes:
        layer: where it comes from in the model.
        fused: the layers that run inside it.
        operation: the kernel's family, or torch's operator.
        shape: output sizes and channels, as the kernel sees them.
        tile: pixels × vectors in registers, of a convolution; rows per band, of a chain.
        macs: multiply-accumulates.
        traffic: bytes of each operand once.
        seconds: measured alone on one thread, the best of several; `None` where torch runs.
        predicted: by the roofline, on one thread.
        peak_share: of the multiply-add peak.
    """

    layer: str
    fused: tuple[str, ...]
    operation: str
    shape: str
    tile: str
    macs: int
    traffic: int
    seconds: float | None
    predicted: float
    peak_share: float

    @property
    def roofline_share(self) -> float:
        """Predicted over measured time."""
        return self.predicted / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Explanation:
    """All steps of a compiled model; `str()` is a table.

    Attributes:
        rows: in execution order.
        arena_bytes: activation memory of one call.
        constant_bytes: packed weights.
        peak_flops: of one core, measured between the steps.
        isa: the instruction set.
        threads: of one call.
    """

    rows: tuple[Row, ...]
    arena_bytes: int
    constant_bytes: int
    peak_flops: float
    isa: str
    threads: int

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        """What went back to torch, because there is no kernel for it."""
        return tuple(row for row in self.rows if row.seconds is None)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain Python values, ready for JSON."""
        rows = [{**asdict(row), "roofline_share": row.roofline_share} for row in self.rows]
        return {**asdict(self), "rows": rows}

    def __str__(self) -> str:
        table = PrettyTable()
        table.set_style(TableStyle.PLAIN_COLUMNS)
        table.field_names = [
            "layer", "fused", "kernel", "shape", "tile", "MACs", "µs", "predicted", "peak", "roof"
        ]  # fmt: skip
        table.align = "r"
        for name in ("layer", "fused", "kernel", "shape"):
            table.align[name] = "l"
            table.max_width[name] = 36
        for row in self.rows:
            measured = row.seconds is not None
            table.add_row(
                [
                    row.layer,
                    _beside(row.layer, row.fused),
                    row.operation if measured else f"torch: {row.operation}",
                    row.shape,
                    row.tile,
                    f"{row.macs:,}" if row.macs else "",
                    f"{1e6 * (row.seconds or 0):.1f}" if measured else "",
                    f"{1e6 * row.predicted:.1f}" if measured else "",
                    f"{row.peak_share:.0%}" if row.macs else "",
                    f"{row.roofline_share:.0%}" if measured else "",
                ]
            )
        macs = sum(row.macs for row in self.rows)
        seconds = sum(row.seconds or 0 for row in self.rows)
        return (
            f"{table}\n\n{self.isa}, one thread: {1e3 * seconds:.3f} ms in kernels, "
            f"{macs:,} MACs, {2 * macs / seconds / self.peak_flops if seconds else 0:.0%} of "
            f"{self.peak_flops / 1e9:.1f} GFLOP/s measured in between\n"
            f"activations {self.arena_bytes / 1e6:.2f} MB, weights "
            f"{self.constant_bytes / 1e6:.2f} MB, {len(self.fallbacks)} operators in torch"
        )


def explain(program: Program, inputs: Sequence[Any], repeats: int = 10) -> Explanation:
    """Measure every kernel of a program alone, in turns, the machine's peak in between.

    Args:
        program: the compiled steps.
        inputs: for one call.
        repeats: measurements per kernel, of which the best counts.
    """
    steps = program.schedule.steps
    best = [float("inf")] * len(steps)
    peak = Peak(program.machine)
    program(inputs)
    run = program.step_runner(inputs)
    overhead = float("inf")
    for _ in timed(range(repeats), "timing kernels"):
        for i, step in enumerate(steps):
            if step.kernel is None:
                continue
            start = time.perf_counter()
            run(i, i)
            middle = time.perf_counter()
            run(i, i + 1)
            overhead = min(overhead, middle - start)
            best[i] = min(best[i], time.perf_counter() - middle)
        peak.measure()
    # What calling from Python costs belongs to no step; a clock tick is left.
    best = [max(seconds - overhead, 1e-7) for seconds in best]
    rows = tuple(_row(step, seconds, peak) for step, seconds in zip(steps, best, strict=True))
    return Explanation(
        rows,
        program.arena_bytes,
        program.constant_bytes,
        peak.flops,
        program.machine.isa,
        program.threads,
    )


def assembly(program: Program, layer: str) -> str:
    """The assembly of a layer's kernels, to read.

    Raises:
        ValueError: if no kernel computes that layer.
    """
    kernels: dict[Kernel, None] = {}
    for step in program.schedule.steps:
        if step.kernel and step.node and layer in (step.node.name, *step.node.absorbed):
            kernels[step.kernel] = None
    if not kernels:
        known = [step.node.name for step in program.schedule.steps if step.node and step.kernel]
        raise ValueError(f"`layer` (={layer!r}) must be one of {', '.join(dict.fromkeys(known))}")
    return "\n".join(jit.emit_assembly(kernel.ir, kernel.machine) for kernel in kernels)


def _row(step: Step, seconds: float, peak: Peak) -> Row:
    node = step.node
    layer = node.name if node else "copy"
    fused = tuple(dict.fromkeys(name for name in (node.absorbed if node else ()) if name != layer))
    sizes: dict[Buffer, int] = {buffer: buffer.size for buffer, _ in step.arguments}
    traffic = 4 * sum(size for buffer, size in sizes.items() if buffer.kind != "scratch")
    if step.kernel is None:
        assert node is not None
        target = node.attributes["target"]
        plain = isinstance(target, types.FunctionType | types.BuiltinFunctionType)
        target = target.__name__ if plain else str(target)
        shape = "×".join(map(str, node.shape or ()))
        return Row(layer, fused, target, shape, "", 0, traffic, None, 0.0, 0.0)
    does, tile = step.kernel.does, step.kernel.tile
    shape = "×".join(map(str, node.shape)) if node and node.shape else ""
    predicted = max(2 * does.macs / peak.flops, traffic / peak.bandwidth)
    return Row(
        layer=layer,
        fused=fused,
        operation=_operation(does),
        shape=shape,
        tile=_cut(tile),
        macs=does.macs,
        traffic=traffic,
        seconds=seconds,
        predicted=predicted,
        peak_share=2 * does.macs / seconds / peak.flops,
    )


def _operation(does: Description) -> str:
    """A kernel in a word."""
    if isinstance(does, Chain):
        return " + ".join(map(_operation, does.stages))
    if isinstance(does, Conv):
        if does.w_strides:
            return "product"
        return "pointwise" if does.kernel == (1, 1) else "×".join(map(str, does.kernel))
    if isinstance(does, Relayout):
        return "layout"
    kind = getattr(does, "kind", "")
    if isinstance(does, Columns):
        return str(kind)
    if isinstance(does, Window):
        return {"conv": "depthwise", "max": "max pool", "mean": "average pool"}[kind]
    return type(does).__name__.lower() + (f" {kind}" if kind else "")


def _beside(layer: str, names: Sequence[str]) -> str:
    """Names in short: without the part before the last dot where it is that of the layer."""
    outer = layer.rpartition(".")[0] + "."
    short = [name.removeprefix(outer) if name != outer[:-1] else "." for name in names]
    return " ".join(short)


def _cut(tile: Tile | None) -> str:
    if isinstance(tile, ChainTile):
        return f"{tile.rows} rows"
    return f"{tile.pixels}×{tile.vectors}" if isinstance(tile, ConvTile) else ""
