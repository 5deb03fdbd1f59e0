"""The picture of the story: what is saved, and what accuracy is left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ImportError(
        "matplotlib is not installed: pip install 'separable[demo]'", name=error.name
    ) from error

if TYPE_CHECKING:
    from .story import Story

INK, MUTED, GRID = "#1f2933", "#6b7785", "#dde3ea"
REGULAR, OTHERS = "#9aa5b1", ("#0b7285", "#5f3dc4", "#2b8a3e")
LOSS = "#e8590c"
METRICS = {
    "params": "Parameters",
    "macs": "MACs",
    "latency": "Time, measured",
    "peak_memory_bytes": "Peak memory, measured",
    "traffic_bytes": "Memory traffic",
}


def draw_picture(story: Story, path: Path) -> None:
    """Write the picture of `story` as a PNG to `path`."""
    figure = Figure(figsize=(10, 4.6), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.06)  # type: ignore[union-attr, call-arg]
    first = story.contenders[1]
    savings = story.savings(first)
    figure.suptitle(
        f"{first.name.capitalize()}: {savings['macs']:.1f}× fewer multiply-adds, "
        f"{savings['latency']:.1f}× the speed: "
        f"{story.promise_kept(first):.0%} of the promise arrives",
        x=0.015,
        ha="left",
        fontsize=15,
        fontweight="bold",
        color=INK,
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _draw_savings(left, story)
    _draw_accuracies(right, story)
    figure.supxlabel(story.conditions, x=0.015, ha="left", fontsize=8, color=MUTED)
    figure.savefig(path)


def _prepare(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=10, colors=INK)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(axis="x", labelsize=9, colors=MUTED)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_savings(axes: Any, story: Story) -> None:
    """Draw bars from 1, where nothing is saved, on a logarithmic axis."""
    regular, *others = story.contenders
    _prepare(axes, "Cost, " + " and ".join(f"{regular.name} / {other.name}" for other in others))
    metrics = [name for name in METRICS if name in regular.costs]
    height = 0.7 / len(others)
    axes.set_xscale("log")
    for i, (other, colour) in enumerate(zip(others, OTHERS, strict=False)):
        savings = story.savings(other)
        for row, name in enumerate(metrics):
            value, place = savings[name], row + (i - (len(others) - 1) / 2) * height
            # a loss is drawn in its own colour, to the left of 1
            axes.barh(place, value - 1, height, left=1, color=colour if value >= 1 else LOSS)
            axes.annotate(
                f"{value:.1f}×" if value >= 1 else f"{value:.2f}×",
                (value, place),
                xytext=(6 if value >= 1 else -6, 0),
                textcoords="offset points",
                ha="left" if value >= 1 else "right",
                va="center",
                fontsize=10,
                fontweight="bold",
                color=INK,
            )
    axes.axvline(1, color=INK, linewidth=1)
    every = [story.savings(other)[name] for other in others for name in metrics]
    low, high = min(0.5, 0.6 * min(every)), max(2.0, 1.5 * max(every))
    ticks = [tick for tick in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(metrics)), [METRICS[name] for name in metrics])
    axes.invert_yaxis()


def _draw_accuracies(axes: Any, story: Story) -> None:
    """Draw each test accuracy with its interval."""
    _prepare(axes, "Test accuracy and its 95 % interval")
    colours = (REGULAR, *OTHERS)
    for row, (each, colour) in enumerate(zip(story.contenders, colours, strict=False)):
        low, high = each.interval
        axes.plot([100 * low, 100 * high], [row, row], color=colour, linewidth=6, alpha=0.35)
        axes.plot(100 * each.accuracy, row, "o", color=colour, markersize=10)
        axes.annotate(
            f"{each.accuracy:.1%}",
            (100 * each.accuracy, row),
            xytext=(0, 11),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            fontweight="bold",
            color=INK,
        )
    lowest = 100 * min(each.interval[0] for each in story.contenders)
    margin = 0.06 * (100 - lowest)
    axes.set_xlim(lowest - margin, 100 + margin)
    axes.xaxis.set_major_formatter("{x:g}%")
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(story.contenders)), [each.name for each in story.contenders])
    axes.set_ylim(len(story.contenders) - 0.5, -0.6)
