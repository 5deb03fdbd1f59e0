"""The page: findings as one HTML file that needs no network."""

from __future__ import annotations

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
    """One figure of the table: what it shows, what it sorts by, and the length of its bar."""

    text: str
    value: float | str
    share: float | None = None
    side: str = ""


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
        columns=_columns(findings),
        rows=[(layer, _cells(layer, findings)) for layer in findings.layers],
        fallbacks=_fallbacks(findings),
    )


def _asset(name: str) -> Markup:
    folder = resources.files("separable.reporting") / "assets"
    return Markup((folder / name).read_text(encoding="utf-8"))  # noqa: S704


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())  # noqa: S704


def _embed(figure: Figure) -> Markup:
    text: Any = figure.plot.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"plot-{figure.name}", config=CONFIG
    )
    return Markup(text)  # noqa: S704


COLUMNS = {
    "Parameters": ("params", "{:,}".format),
    "MACs": ("macs", "{:,}".format),
    "PyTorch, ms": ("torch_seconds", wording.milliseconds),
    "Runtime, ms": ("runtime_seconds", wording.milliseconds),
}


def _columns(findings: Findings) -> list[tuple[str, list[str]]]:
    """The groups of columns and the networks in each."""
    return [(title, list(findings.networks)) for title in COLUMNS]


def _cells(layer: Layer, findings: Findings) -> list[Cell]:
    """The figures of a layer in the order of the columns."""
    whole = findings.layers[0]
    cells = []
    for field, spell in COLUMNS.values():
        for name in findings.networks:
            side = layer.before if name == "regular" else layer.after
            # both bars are shares of the regular network, so that their lengths compare
            total = getattr(whole.before, field)
            cells.append(_cell(side, field, spell, total, name))
    return cells


def _cell(side: Side | None, field: str, spell: Any, total: float | None, name: str) -> Cell:
    value = None if side is None else getattr(side, field)
    if value is None:
        host = side.runs_in if side is not None and field == "runtime_seconds" else ""
        text = "in torch" if host == "torch" else f"in {host}" if host else "–"
        return Cell(text, -1)
    return Cell(spell(value), value, min(value / total, 1.0) if total else 0.0, name)


def _fallbacks(findings: Findings) -> dict[str, list[str]]:
    """The operators that went back to torch, by network."""
    found = {}
    for name, network in findings.networks.items():
        rows = network.explanation.fallbacks if network.explanation is not None else ()
        steps = [f"{row.layer} ({row.operation})" for row in rows]
        if steps:
            found[name] = list(dict.fromkeys(steps))
    return found
