"""The page in a browser: no errors, no network; it sorts, filters, folds; both themes pass axe."""

import os
from pathlib import Path

import pytest

from .conftest import CHROMIUM, HOSTILE

pytest.importorskip("plotly", reason="needs the extra `report`")
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
ARTEFACTS = Path(__file__).parents[2] / "artefacts"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory, findings, alone):
    folder = tmp_path_factory.mktemp("pages")
    findings.write(folder / "converted.html")
    alone.write(folder / "alone.html")
    return folder


@pytest.fixture
def visit(browser, files):
    """Open a page; at the end, check that it had no trouble and asked for nothing."""
    trouble, asked, contexts = [], [], []

    def visit(name="converted", viewport=DESKTOP, theme="light", **options):
        context = browser.new_context(viewport=viewport, color_scheme=theme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((files / f"{name}.html").as_uri())
        page.wait_for_selector("#plot-roofline .main-svg")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert trouble == []
    # what is embedded may be asked for as data
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def shot(page, name):
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"report-{name}.png", full_page=True)


def names(page):
    """The layers that are shown, from above to below."""
    return page.eval_on_selector_all(
        "#layers tbody tr:not([hidden])", "rows => rows.map(row => row.dataset.name)"
    )


@pytest.mark.parametrize("name", ["converted", "alone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_in_both_themes(visit, name, theme):
    page = visit(name, theme=theme)
    shot(page, f"{name}-{theme}")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("name", ["converted", "alone"])
def test_a_phone_scrolls_only_down(visit, name):
    page = visit(name, viewport=PHONE, has_touch=True, is_mobile=True)
    shot(page, f"{name}-phone")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
def test_plots_fill_their_place_and_no_more(visit, viewport):
    page = visit(viewport=viewport)
    widths = page.eval_on_selector_all(
        "figure", "all => all.map(f => [f.clientWidth, f.querySelector('.main-svg').clientWidth])"
    )
    assert len(widths) == 5
    assert all(drawn == pytest.approx(place, abs=2) for place, drawn in widths)


def test_a_column_sorts_down_and_up(visit, findings):
    page = visit()
    leaves = [layer for layer in findings.layers if layer.is_leaf]
    title = page.get_by_role("button", name="MACs, converted")
    title.click()
    shown = names(page)
    assert set(shown) == {layer.name for layer in leaves}
    macs = {layer.name: layer.after.macs for layer in leaves}
    assert [macs[name] for name in shown] == sorted(macs.values(), reverse=True)
    assert page.locator("th[aria-sort=descending]").count() == 1
    title.click()
    assert [macs[name] for name in names(page)] == sorted(macs.values())
    page.get_by_role("button", name="PyTorch, ms, regular").click()
    seconds = {layer.name: layer.before.torch_seconds for layer in leaves}
    assert names(page) == sorted(seconds, key=seconds.get, reverse=True)
    assert page.locator("th[aria-sort]").count() == 1
    page.get_by_role("button", name="Layer", exact=True).click()
    assert names(page)[0] == HOSTILE
    page.get_by_role("button", name="Became, and why").click()
    became = {layer.name: f"{layer.form} {layer.reason}" for layer in leaves}
    assert [became[name] for name in names(page)] == sorted(became.values())
    page.get_by_role("button", name="Network order").click()
    assert names(page) == [layer.name for layer in findings.layers]


def test_one_network_sorts_too(visit, alone):
    page = visit("alone")
    page.get_by_role("button", name="Parameters").click()
    params = {layer.name: layer.before.params for layer in alone.layers if layer.is_leaf}
    assert [params[name] for name in names(page)] == sorted(params.values(), reverse=True)


def test_the_filter_finds_names_types_and_forms(visit, findings):
    page = visit()
    box = page.get_by_role("searchbox", name="Filter")
    box.fill("batchnorm")
    assert names(page) == ["stem.1"]
    assert page.locator("#shown").inner_text() == f"1 of {len(findings.layers)} rows"
    box.fill("<script>")
    assert names(page) == [HOSTILE]
    form = next(layer.form for layer in findings.layers if layer.form)
    box.fill(form)
    assert set(names(page)) >= {layer.name for layer in findings.layers if layer.form == form}
    box.fill("no such layer")
    assert names(page) == []
    box.fill("")
    assert len(names(page)) == len(findings.layers)


def test_modules_fold(visit, findings):
    page = visit()
    every = [layer.name for layer in findings.layers]
    stem = page.get_by_role("button", name="stem", exact=True)
    stem.click()
    assert names(page) == [name for name in every if not name.startswith("stem.")]
    assert stem.get_attribute("aria-expanded") == "false"
    stem.press("Enter")
    assert names(page) == every
    page.get_by_role("button", name="Collapse all").click()
    assert names(page) == [name for name in every if "." not in name]
    page.get_by_role("button", name="Expand all").click()
    assert names(page) == every
    page.get_by_role("button", name="the network").click()
    assert names(page) == [""]


def test_hovering_a_point_names_its_layer(visit, findings):
    page = visit()
    page.locator("#plot-roofline").scroll_into_view_if_needed()
    layers = {layer.name for layer in findings.layers}
    for point in page.locator("#plot-roofline .scatterlayer .point").all()[:3]:
        box = point.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector("#plot-roofline .hoverlayer .hovertext")
        label = page.locator("#plot-roofline .hoverlayer .hovertext").first
        first = label.locator("tspan").first.text_content()
        assert first in layers
        page.mouse.move(0, 0)
        page.wait_for_selector("#plot-roofline .hoverlayer .hovertext", state="detached")


def test_a_hostile_name_is_shown_as_it_is(visit):
    page = visit()
    page.get_by_role("searchbox", name="Filter").fill("alert")
    assert HOSTILE in page.locator("#layers tbody tr:not([hidden]) th").inner_text()
    assert "A & <b>net</b>" in page.locator("h1").inner_text()


def test_the_theme_switches_and_back(visit):
    page = visit(theme="dark")
    button = page.get_by_role("button", name="Switch between light and dark")

    def paper():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    dark = paper()
    button.click()
    light = paper()
    assert light == "rgb(255, 255, 255)"
    assert dark != light
    button.click()
    assert paper() == dark


def test_it_prints_without_its_tools_in_light_colours(visit):
    page = visit(theme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator(".tools").is_visible()
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    ARTEFACTS.mkdir(exist_ok=True)
    page.pdf(path=ARTEFACTS / "report.pdf", prefer_css_page_size=True)
    assert os.path.getsize(ARTEFACTS / "report.pdf") > 10_000
