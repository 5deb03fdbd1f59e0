"""The files: every format, whole or not at all."""

import csv
import json
import os
import sys

import pytest

from .conftest import CHROMIUM

pytest.importorskip("plotly", reason="needs the extra `report`")

from separable.reporting.figures import figures

SVG = b"<svg"
PNG = b"\x89PNG\r\n\x1a\n"


def test_html_holds_everything_and_escapes_names(findings, tmp_path):
    (path,) = findings.write(tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert text.count("plotly.js v") == 1
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "A &amp; &lt;b&gt;net&lt;/b&gt;" in text
    assert "separable report net.py:net" in text
    for name in ("roofline", "promise-pytorch", "promise-separable", "frontier-macs"):
        assert f'<figure id="{name}">' in text
    assert os.listdir(tmp_path) == ["page.html"]


def test_the_format_is_the_ending_or_what_is_asked_for(findings, tmp_path):
    findings.write(tmp_path / "a.json")
    findings.write(tmp_path / "a.txt", "json")
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(
        (tmp_path / "a.txt").read_text()
    )
    findings.write(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(findings.layers)
    with pytest.raises(ValueError, match=r"`format` \(='txt'\) must be one of html, json"):
        findings.write(tmp_path / "b.txt")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        findings.write(tmp_path / "none" / "b.html")
    with pytest.raises(IsADirectoryError, match="name a file"):
        findings.write(tmp_path, "html")
    assert findings.write(tmp_path / "a.JSON")
    assert sorted(os.listdir(tmp_path)) == ["a.JSON", "a.csv", "a.json", "a.txt"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to draw images")
@pytest.mark.parametrize(("format", "start"), [("svg", SVG), ("png", PNG)])
def test_images_one_per_plot(alone, tmp_path, format, start):
    written = alone.write(tmp_path / f"plots.{format}")
    names = [figure.name for figure in figures(alone)]
    assert names == ["roofline", "promise-pytorch", "promise-separable"]
    assert [path.name for path in written] == [f"plots-{name}.{format}" for name in names]
    assert all(path.read_bytes().startswith(start) for path in written)
    assert len(os.listdir(tmp_path)) == 3


def test_without_a_browser_the_remedy_is_named(alone, tmp_path, monkeypatch):
    from choreographer.browsers.chromium import Chromium

    monkeypatch.setattr(Chromium, "find_browser", lambda **_: None)
    with pytest.raises(RuntimeError, match="apt-get install chromium"):
        alone.write(tmp_path / "plots.png")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("module", "package", "format", "importer"),
    [
        ("plotly.graph_objects", "plotly", "html", "figures"),
        ("jinja2", "jinja2", "html", "page"),
        ("kaleido", "kaleido", "png", ""),
    ],
)
def test_a_missing_package_names_the_extra(
    alone, tmp_path, monkeypatch, module, package, format, importer
):
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("page", "figures"):
        monkeypatch.delitem(sys.modules, f"separable.reporting.{name}", raising=False)
        monkeypatch.delattr(f"separable.reporting.{name}", raising=False)
    with pytest.raises(ImportError) as raised:
        alone.write(tmp_path / f"page.{format}")
    assert str(raised.value) == f"{package} is not installed: pip install 'separable[report]'"
    assert not os.listdir(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(alone, tmp_path, monkeypatch):
    path = tmp_path / "page.json"
    path.write_text("old")

    def interrupted(source, target):
        assert source.stat().st_size > 0
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        alone.write(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.json"]


def test_plots_name_every_layer_in_their_labels(findings):
    drawn = {figure.name: figure.plot for figure in figures(findings)}
    texts = [text for trace in drawn["roofline"].data for text in trace.text or ()]
    for name in ("stem.0", "body.0", "&lt;script&gt;alert(1)&lt;/script&gt;", "classifier"):
        assert any(text.startswith(f"<b>{name}") for text in texts)
    assert not any("<script" in text for text in texts)
    (limit,) = [trace for trace in drawn["roofline"].data if trace.mode == "lines"]
    peak, bandwidth = findings.machine.flops / 2, findings.machine.bandwidth
    assert limit.y[1] == limit.y[2] == pytest.approx(peak / 1e9)
    assert limit.y[0] / limit.x[0] == pytest.approx(bandwidth / 1e9)
    assert limit.x[1] == pytest.approx(peak / bandwidth)


def test_promises_are_the_regular_times_over_the_saving(findings):
    drawn = {figure.name: figure.plot for figure in figures(findings)}
    for name, field in (("pytorch", "torch_seconds"), ("separable", "runtime_seconds")):
        layers = [
            layer
            for layer in findings.layers
            if layer.form
            and (name == "pytorch" or not (layer.before.is_shared or layer.after.is_shared))
        ]
        points = drawn[f"promise-{name}"].data[1]
        assert layers
        for layer, x, y in zip(layers, points.x, points.y, strict=True):
            saving = layer.before.macs / layer.after.macs
            assert x == pytest.approx(1e3 * getattr(layer.before, field) / saving)
            assert y == pytest.approx(1e3 * getattr(layer.after, field))
