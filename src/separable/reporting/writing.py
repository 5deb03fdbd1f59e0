"""Files of a report: written whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..writing import whole_files
from .layers import to_csv

if TYPE_CHECKING:
    from .findings import Findings

FORMATS = ("html", "json", "csv", "png", "svg")
IMAGES = ("png", "svg")
SIZE = (900, 520)
SCALE = 2  # pixels per unit, for screens of high density


def check(path: Path, format: str | None) -> str:
    """Return the format to write, after checking that it can be written.

    Raises:
        ValueError: the format is unknown.
        FileNotFoundError: the folder does not exist.
        ImportError: a package is missing.
        RuntimeError: the browser that draws images is missing.
    """
    chosen = path.suffix.removeprefix(".").lower() if format is None else format
    if chosen not in FORMATS:
        raise ValueError(
            f"`format` (={chosen!r}) must be one of {', '.join(FORMATS)}, by itself or as the "
            f"ending of `path` (={str(path)!r})"
        )
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"`path`: there is no folder {str(path.absolute().parent)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"`path` (={str(path)!r}) is a folder; name a file")
    if chosen == "html":
        from . import page  # noqa: F401, raises where a package is missing
    if chosen in IMAGES:
        from . import figures  # noqa: F401

        _check_browser()
    return chosen


def write(findings: Findings, path: Path, format: str | None = None) -> tuple[Path, ...]:
    """Write findings in a format; see `Findings.write`."""
    chosen = check(path, format)
    if chosen in IMAGES:
        from .figures import figures

        contents = {
            path.with_name(f"{path.stem}-{figure.name}.{chosen}"): _image(figure.plot, chosen)
            for figure in figures(findings)
        }
    else:
        contents = {path: _text(findings, chosen).encode()}
    with whole_files(contents) as partial:
        for name, content in contents.items():
            partial[name].write_bytes(content)
    return tuple(contents)


def to_json(findings: Findings, indent: int) -> str:
    """The findings as JSON, which has no infinities: null in their place."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(findings.to_dict()), indent=indent, allow_nan=False)


def _text(findings: Findings, format: str) -> str:
    if format == "json":
        return to_json(findings, indent=1) + "\n"
    if format == "csv":
        return to_csv(findings.layers)
    from .page import render

    return render(findings)


def _image(plot: object, format: str) -> bytes:
    import plotly.io

    width, height = SIZE
    copy = plot.__class__(plot)  # type: ignore[call-arg]
    copy.update_layout(paper_bgcolor="white", plot_bgcolor="white")  # type: ignore[attr-defined]
    image: bytes = plotly.io.to_image(copy, format, width=width, height=height, scale=SCALE)
    return image


def _check_browser() -> None:
    try:
        import kaleido  # noqa: F401
        from choreographer.browsers.chromium import Chromium
    except ModuleNotFoundError as error:
        raise ImportError(
            "kaleido is not installed: pip install 'separable[report]'", name=error.name
        ) from error
    if Chromium.find_browser(skip_local=False) is None:
        raise RuntimeError(
            "png and svg are drawn by Chrome or Chromium, and there is none: install one (as in "
            "`apt-get install chromium`, or `plotly_get_chrome`), or write html"
        )
