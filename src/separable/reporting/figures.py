"""The plots of a report, drawn by plotly from its findings."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .layers import Layer, multiplying
from .wording import amount, milliseconds, percent, small

try:
    import plotly.graph_objects as go
except ModuleNotFoundError as error:
    raise ImportError(
        "plotly is not installed: pip install 'separable[report]'", name=error.name
    ) from error

if TYPE_CHECKING:
    from .findings import Findings, Point

# blue and orange differ for every kind of colour vision, and stand out on white and on near-black
ENGINES = {"PyTorch": "#c75f12", "separable runtime": "#2b7bba"}
NEUTRAL = "#7a8591"
INK = "#1c2127"
FAINT = "rgba(127, 136, 146, 0.22)"
SHARED = " Layers that one kernel computes together are left out."
CLOCK = 2e-7  # seconds below which a kernel is too short to be timed
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class Figure(NamedTuple):
    """A plot with its words.

    Attributes:
        name: for its file and its place in the page.
        title: what it shows.
        caption: how to read it.
        plot: plotly's figure.
    """

    name: str
    title: str
    caption: str
    plot: Any


class Dot(NamedTuple):
    """A layer on the roofline: multiply-adds, bytes, seconds, and what to say of it."""

    macs: int
    traffic: int
    seconds: float
    text: str


def figures(findings: Findings) -> tuple[Figure, ...]:
    """All plots that the findings have data for."""
    made = [_roofline(findings), *_promises(findings), *_frontiers(findings)]
    return tuple(figure for figure in made if figure is not None)


def _plot(x: str, y: str, height: int) -> Any:
    axis: dict[str, Any] = {
        "gridcolor": FAINT,
        "zeroline": False,
        "linecolor": FAINT,
        "ticks": "",
        "title_standoff": 12,
        "title_font_size": 13,
        "tickfont_size": 12,
        "exponentformat": "power",
        "automargin": True,
    }
    return go.Figure(
        layout={
            "template": "none",
            "font": {"family": FONT, "size": 13, "color": INK},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "height": height,
            "margin": {"l": 56, "r": 16, "t": 16, "b": 48},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "hoverlabel": {
                "bgcolor": INK,
                "bordercolor": INK,
                "font": {"family": FONT, "size": 13, "color": "#ffffff"},
                "align": "left",
            },
            "hovermode": "closest",
            "dragmode": False,
            "xaxis": axis | {"title_text": x},
            "yaxis": axis | {"title_text": y},
        }
    )


def _logarithmic(low: float, high: float) -> dict[str, Any]:
    """An axis between two values, with ticks at 1, 2 and 5 where powers of ten are too few."""
    first, last = math.log10(low), math.log10(high)
    steps = (1,) if last - first > 2.5 else (1, 2, 5)
    ticks = [s * 10.0**e for e in range(math.floor(first), math.ceil(last) + 1) for s in steps]
    return {
        "type": "log",
        "range": [first, last],
        "tickvals": ticks,
        "ticktext": [f"{tick:,g}" for tick in ticks],
    }


def _dots(
    name: str, colour: str, x: list[float], y: Sequence[float | None], text: list[str], **more: Any
) -> Any:
    marker = {"color": colour, "size": 9, "opacity": 0.85, "line": {"color": colour, "width": 1.5}}
    return go.Scatter(
        name=name,
        x=x,
        y=y,
        text=text,
        mode="markers",
        marker=marker | more,
        hovertemplate="%{text}<extra></extra>",
    )


def _line(x: list[float], y: list[float], text: str, name: str = "") -> Any:
    return go.Scatter(
        name=name,
        x=x,
        y=y,
        mode="lines",
        line={"color": NEUTRAL, "width": 1.5},
        hovertemplate=f"{text}<extra></extra>",
        showlegend=bool(name),
    )


def _says(*lines: str) -> str:
    """The text of a hover label; names may hold what plotly would take for a tag."""
    first, *rest = (html.escape(line) for line in lines if line)
    return "<br>".join([f"<b>{first}</b>", *rest])


def _roofline(findings: Findings) -> Figure | None:
    """Multiply-adds per second against multiply-adds per byte (Williams et al. 2009)."""
    groups = dict(_measured(findings))
    dots = [dot for group in groups.values() for dot in group]
    if findings.machine is None or not dots:
        return None
    peak, bandwidth = findings.machine.flops / 2, findings.machine.bandwidth
    ridge = peak / bandwidth
    intensities = [dot.macs / dot.traffic for dot in dots]
    low, high = min(*intensities, ridge) / 1.6, max(*intensities, ridge) * 1.6
    rates = [dot.macs / dot.seconds / 1e9 for dot in dots]
    plot = _plot("MACs per byte of compulsory traffic", "billion MACs per second", 440)
    plot.update_xaxes(_logarithmic(low, high))
    plot.update_yaxes(_logarithmic(min(rates) / 1.6, max(*rates, peak / 1e9) * 1.6))
    plot.add_trace(
        _line(
            [low, ridge, high],
            [low * bandwidth / 1e9, peak / 1e9, peak / 1e9],
            f"this core at most: {amount(peak)}MAC/s,<br>{amount(bandwidth)}B/s of memory traffic",
            "limit of one core",
        )
    )
    for (network, engine), group in groups.items():
        plot.add_trace(
            _dots(
                f"{network}, {engine}" if findings.converted else engine,
                ENGINES[engine],
                [dot.macs / dot.traffic for dot in group],
                [dot.macs / dot.seconds / 1e9 for dot in group],
                [
                    _says(
                        dot.text,
                        f"{network}, {engine}",
                        f"{milliseconds(dot.seconds)} ms, {amount(dot.macs)} MACs",
                        f"{dot.macs / dot.traffic:.1f} MACs per byte",
                        f"{percent(_reached(dot, peak, bandwidth))} of what this core can do here",
                    )
                    for dot in group
                ],
                symbol=("circle" if engine == "PyTorch" else "diamond")
                + ("-open" if network == "regular" and findings.converted else ""),
            )
        )
    return Figure(
        "roofline",
        "What holds each layer back",
        "Left of the bend a layer waits for memory, right of it for arithmetic; its distance below "
        "the line is what is lost besides. One core; the bend is at "
        f"{ridge:.1f} MACs per byte. Bandwidth is that of a copy of 4 MiB: a layer whose data stay "
        "in a nearer cache may lie above the slope. Layers without MACs, and those of less "
        "than 0.2 µs, are left out.",
        plot,
    )


def _reached(dot: Dot, peak: float, bandwidth: float) -> float:
    return max(dot.macs / peak, dot.traffic / bandwidth) / dot.seconds


def _measured(findings: Findings) -> Iterator[tuple[tuple[str, str], list[Dot]]]:
    """The layers with multiply-adds, by network and by who runs them."""
    for name, network in findings.networks.items():
        seconds = {layer.name: layer.own for layer in network.layers}
        yield (
            (name, "PyTorch"),
            [
                Dot(row.own.macs, row.own.traffic_bytes, seconds[row.name], _called(row.name))
                for row in network.account.rows
                if row.own.macs and row.own.traffic_bytes and seconds.get(row.name, 0.0) > 0
            ],
        )
        kernels = [
            Dot(step.macs, step.traffic, step.seconds, " + ".join(map(_called, names)))
            for step, names in multiplying(network)
            if step.traffic and step.seconds is not None and step.seconds > CLOCK
        ]
        if kernels:
            yield (name, "separable runtime"), kernels


def _called(name: str) -> str:
    return name or "(network)"


def _promises(findings: Findings) -> Iterator[Figure]:
    """Time promised by the multiply-adds against time measured, for each engine."""
    known = {
        engine: [
            (layer, *found)
            for layer in findings.layers
            if layer.is_leaf and (found := _promise(findings, layer, field)) is not None
        ]
        for engine, field in (
            ("PyTorch", "torch_seconds"),
            ("separable runtime", "runtime_seconds"),
        )
    }
    every = [1e3 * each for kept in known.values() for _, *both in kept for each in both]
    for engine, kept in known.items():
        if not kept:
            continue
        plot = _plot("promised by MACs, ms", "measured, ms", 400)
        ends = [min(every) / 1.5, max(every) * 1.5]  # the same for both, to be compared
        plot.update_xaxes(_logarithmic(*ends))
        plot.update_yaxes(_logarithmic(*ends))
        plot.add_trace(_line(ends, ends, "the promise kept"))
        plot.add_trace(
            _dots(
                engine,
                ENGINES[engine],
                [1e3 * promised for _, promised, _ in kept],
                [1e3 * measured for _, _, measured in kept],
                [
                    _says(
                        _called(layer.name),
                        layer.form,
                        f"promised {milliseconds(promised)} ms, "
                        f"measured {milliseconds(measured)} ms",
                        f"{percent(promised / measured)} of the promise arrives",
                    )
                    for layer, promised, measured in kept
                ],
                symbol="circle" if engine == "PyTorch" else "diamond",
            )
        )
        plot.update_layout(showlegend=False)
        share = statistics.median(promised / measured for _, promised, measured in kept)
        basis = (
            "the regular layer's time in the same engine, divided by how many times fewer MACs"
            if findings.converted is not None
            else "its MACs at the peak of one core"
        )
        yield Figure(
            f"promise-{engine.split()[0].lower()}",
            f"Promised and measured, {engine}",
            f"One point per {'converted ' if findings.converted else ''}layer, on one thread. "
            f"Promised: {basis}. Below the line a layer is faster than promised; in the median "
            f"{percent(share)} of the promise arrives.{'' if engine == 'PyTorch' else SHARED}",
            plot,
        )


def _promise(findings: Findings, layer: Layer, field: str) -> tuple[float, float] | None:
    """Seconds promised and measured, where both are known."""
    before, after = layer.before, layer.after
    if field == "runtime_seconds" and (before.is_shared or (after and after.is_shared)):
        return None  # the time is not the layer's own
    if findings.converted is None:
        measured = getattr(before, field)
        if findings.machine is None or not before.macs or not measured:
            return None
        return 2 * before.macs / findings.machine.flops, measured
    if after is None or not before.macs or after.macs == before.macs:
        return None
    promised, measured = getattr(before, field), getattr(after, field)
    return (promised * after.macs / before.macs, measured) if promised and measured else None


def _frontiers(findings: Findings) -> Iterator[Figure]:
    """Error or accuracy against multiply-adds and against milliseconds."""
    kind, label = (
        ("Accuracy", "test accuracy, %")
        if findings.tested
        else (
            "Error",
            findings.error_convention,
        )
    )

    def quality(point: Point) -> float | None:
        if not findings.tested:
            return point.error
        return None if point.accuracy is None else 100 * point.accuracy

    known = [point for point in findings.frontier if quality(point) is not None]
    if len(known) < 2:
        return
    once = any(point.kind == "fitted once" and not point.chosen for point in known)
    apart = [p for p in known if p.kind == "beside" or (once and p.kind == "converted")]

    def draw(title: str, costs: dict[str, Callable[[Point], float | None]]) -> Any:
        plot = _plot(title, label, 400)
        for engine, cost in costs.items():
            places = sorted(
                ((x, p) for p in known if (x := cost(p)) is not None), key=lambda place: place[0]
            )
            points = [point for _, point in places]
            colour = ENGINES.get(engine, NEUTRAL)
            joined = [(x, quality(point)) for x, point in places if point not in apart]
            plot.add_trace(
                go.Scatter(
                    x=[x for x, _ in joined],
                    y=[y for _, y in joined],
                    mode="lines",
                    line={"color": colour, "width": 1, "dash": "dot"},
                    hoverinfo="skip",
                    showlegend=False,
                )
            )
            trace = _dots(
                engine,
                colour,
                [x for x, _ in places],
                [quality(point) for point in points],
                [_says(point.name, *_facts(point)) for point in points],
                symbol=[_symbol(engine, point) for point in points],
                size=[15 if point.chosen else 9 for point in points],
            )
            trace.cliponaxis = False
            plot.add_trace(trace)
            for x, point in places:
                if point.chosen:
                    plot.add_annotation(
                        x=x, y=quality(point), text="chosen", showarrow=False, yshift=20
                    )
        plot.update_xaxes(rangemode="tozero")
        if not findings.tested:
            plot.update_yaxes(rangemode="tozero")
        plot.update_layout(showlegend=len(costs) > 1)
        return plot

    note = "Each point is a whole network; the line joins the regular one and its conversions"
    if once:
        note += ", whose layers were fitted once"
    if any(point.chosen for point in apart):
        note += (
            ". The chosen one has gone through the last pass over all layers together, which may "
            "improve the others too"
        )
    yield Figure(
        "frontier-macs",
        f"{kind} against multiply-adds",
        f"{note}.",
        draw("million MACs of a pass", {"": lambda p: p.macs / 1e6}),
    )
    yield Figure(
        "frontier-time",
        f"{kind} against time",
        "The same networks, measured in turn in PyTorch and in the separable runtime.",
        draw(
            "milliseconds of a pass",
            {
                "PyTorch": lambda p: 1e3 * p.torch_seconds,
                "separable runtime": lambda p: (
                    None if p.runtime_seconds is None else 1e3 * p.runtime_seconds
                ),
            },
        ),
    )


def _symbol(engine: str, point: Point) -> str:
    return ("circle" if engine == "PyTorch" else "diamond") + ("" if point.chosen else "-open")


def _facts(point: Point) -> Iterator[str]:
    yield f"{amount(point.macs)} MACs, {amount(point.params)} parameters"
    yield f"{milliseconds(point.torch_seconds)} ms in PyTorch"
    if point.runtime_seconds is not None:
        yield f"{milliseconds(point.runtime_seconds)} ms in the separable runtime"
    if point.error is not None:
        yield f"output error {small(point.error)}"
    if point.accuracy is not None:
        yield f"accuracy {percent(point.accuracy)}"
