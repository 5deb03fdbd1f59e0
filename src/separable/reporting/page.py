"""The page: findings as one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from . import wording
from .figures import Figure, figures
from .layers import Layer, Side

try:
    import jinja2
    from markupsafe import Markup
except ModuleNotFoundError as error:
    raise ImportError(
        "jinja2 is not installed: pip install 'separable[report]'", name=error.name
    ) from error

if TYPE_CHECKING:
    from .findings import Findings

CONFIG = {"responsive": True, "displayModeBar": False, "scrollZoom": False}


@dataclass(frozen=True)
class Cell:
    """One figure of the table: its text, what it sorts by, the length of its bar."""

    text: str
    value: float
    share: float | None = None
    side: str = ""
    is_shared: bool = False


def render(findings: Findings) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("separable.reporting", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"size": wording.size, "percent": wording.percent}
    drawn = {figure.name: figure for figure in figures(findings)}
    return environment.get_template("page.html.jinja").render(
        findings=findings,
        style=_asset("page.css"),
        script=_asset("page.js"),
        plotly=_plotly(),
        drawn={name: (figure, _embed(figure)) for name, figure in drawn.items()},
        columns=[(title, list(findings.networks)) for title in COLUMNS],
        rows=list(zip(findings.layers, _cells(findings), strict=True)),
        fallbacks=_fallbacks(findings),
    )


def _asset(name: str) -> Markup:
    folder = resources.files("separable.reporting") / "assets"
    return Markup((folder / name).read_text(encoding="utf-8"))


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def _embed(figure: Figure) -> Markup:
    text: Any = figure.plot.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"plot-{figure.name}", config=CONFIG
    )
    return Markup(text)


def _fixed(seconds: float) -> str:
    """Milliseconds with three decimals, so that a column's points line up."""
    return f"{1e3 * seconds:,.3f}"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "Parameters": ("params", "{:,}".format),
    "MACs": ("macs", "{:,}".format),
    "PyTorch, ms": ("torch_seconds", _fixed),
    "Runtime, ms": ("runtime_seconds", _fixed),
}


def _cells(findings: Findings) -> Iterator[list[Cell]]:
    """The figures of each layer in the order of the columns; bars compare within a pair of them."""
    pairs = [
        (field, spell, name) for field, spell in COLUMNS.values() for name in findings.networks
    ]
    longest: dict[str, float] = {}
    for layer in findings.layers:
        for field, _, name in pairs if layer.is_leaf else ():
            longest[field] = max(longest.get(field, 0.0), _figure(layer, field, name) or 0.0)
    for layer in findings.layers:
        cells = []
        for field, spell, name in pairs:
            value = _figure(layer, field, name)
            if value is None:
                cells.append(Cell(_absence(layer, field, name), -1))
                continue
            most = longest.get(field, 0.0)
            share = value / most if layer.is_leaf and value else None
            side = _side(layer, name)
            shared = field == "runtime_seconds" and side is not None and side.is_shared
            cells.append(Cell(spell(value), value, share, name, shared))
        yield cells


def _side(layer: Layer, name: str) -> Side | None:
    return layer.before if name == "regular" else layer.after


def _figure(layer: Layer, field: str, name: str) -> float | None:
    side = _side(layer, name)
    return None if side is None else getattr(side, field)


def _absence(layer: Layer, field: str, name: str) -> str:
    """Why a layer has no figure: another layer's kernel does its work, or nobody."""
    side = _side(layer, name)
    if side is None or not side.runs_in or field != "runtime_seconds":
        return "–"
    parent = layer.name.rpartition(".")[0]
    return "in " + (side.runs_in.removeprefix(f"{parent}.") or "the network")


def _fallbacks(findings: Findings) -> dict[str, list[str]]:
    """The operators that went back to torch, by network."""
    found = {}
    for name, network in findings.networks.items():
        rows = network.explanation.fallbacks if network.explanation is not None else ()
        steps = [f"{row.layer} ({row.operation})" for row in rows]
        if steps:
            found[name] = list(dict.fromkeys(steps))
    return found
