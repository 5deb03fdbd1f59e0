"""The demo: its data, its interval, its training, and what it writes."""

import dataclasses
import json
import math
import sys
from itertools import pairwise

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("plotly")

from separable.demo import story as story_module
from separable.demo import tell
from separable.training.digits import Digits, load_digits
from separable.training.scoring import wilson_interval

# the tests convert with fewer images than the demo does
pytestmark = pytest.mark.filterwarnings("ignore:layer .* more calibration inputs would help")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def few(digits, images=64):
    """The first images of each part."""
    return Digits(*(getattr(digits, field.name)[:images] for field in dataclasses.fields(digits)))


def test_digits_are_split_by_class(digits):
    assert digits.train_images.shape == (1257, 1, 32, 32)
    assert digits.test_images.shape == (540, 1, 32, 32)
    for labels, total in ((digits.train_labels, 1257), (digits.test_labels, 540)):
        assert (labels.bincount() / total - 0.1).abs().max() < 0.01
    again = load_digits()
    assert torch.equal(again.test_labels, digits.test_labels)
    assert abs(digits.train_images.mean()) < 1e-4
    assert abs(digits.train_images.std() - 1) < 1e-4


def test_no_test_image_is_trained_on(digits):
    train = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in train for image in digits.test_images)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (529, 540), (3, 7), (1, 1)])
def test_wilson_interval_solves_its_definition(correct, total):
    """At each end p the score (share - p) / sqrt(p (1 - p) / total) is the quantile ±z."""
    z = 1.959964
    low, high = wilson_interval(correct, total)
    share = correct / total
    assert 0 <= low <= share <= high + 1e-12 <= 1 + 2e-12
    for end in (low, high):
        assert math.isclose(
            (share - end) ** 2, z**2 * end * (1 - end) / total, rel_tol=1e-6, abs_tol=1e-12
        )
    assert high - low > 0


@pytest.fixture(scope="module")
def told(tmp_path_factory, digits, hasty):
    out = tmp_path_factory.mktemp("told") / "new" / "folder"
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story_module, "load_digits", lambda: few(digits))
        told = tell(out, epochs=1, seed=3)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    return told, out


def test_story_compares_the_two_forms(told):
    story, _ = told
    regular, converted, separable = story.contenders
    assert [each.name for each in story.contenders] == ["regular", "converted", "separable"]
    # 13 blocks at width 0.25, counted by hand: 9·C·N against 9·C + C·N weights, and their norms
    channels = [8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256]
    rest = 9 * 8 + 2 * 8 + 257 * 10
    pairs = list(pairwise(channels))
    assert regular.account.params == rest + sum(9 * c * n + 2 * n for c, n in pairs)
    assert separable.account.params == rest + sum(9 * c + c * n + 2 * (c + n) for c, n in pairs)
    assert (regular.account.macs, separable.account.macs) == (64 * 24_848_896, 64 * 3_183_616)
    assert story.savings(separable)["traffic_bytes"] < 1
    assert story.savings(regular)["latency"] == story.promise_kept(regular) == 1
    times = (
        dataclasses.replace(regular.measurement, times=(0.6, 0.8, 1.6)),
        dataclasses.replace(separable.measurement, times=(0.4, 0.4, 0.4)),
    )
    pair = zip((regular, separable), times, strict=True)
    staged = [dataclasses.replace(each, measurement=time) for each, time in pair]
    other = dataclasses.replace(story, contenders=tuple(staged))
    savings = other.savings(staged[1])
    assert (savings["latency"], round(savings["macs"], 4)) == (2, 7.8052)
    assert other.promise_kept(staged[1]) == pytest.approx(0.25624, abs=1e-5)
    assert 0 <= separable.interval[0] <= separable.accuracy <= separable.interval[1] <= 1
    # a budget of the convolutions' multiply-adds, the classifier aside
    assert 0.9 * separable.account.macs < converted.account.macs < 1.01 * separable.account.macs


def test_table(told):
    story, _ = told
    regular, _, separable = story.contenders
    text = str(story)
    for words in (
        "1,771,650 | ",
        "215,498 | ",
        "8.22x",
        f"{story.promise_kept(separable):.0%} |",
        f"{regular.accuracy:.2%} |",
        f"{separable.interval[0]:.1%} to {separable.interval[1]:.1%}",
        "1 epoch, seed 3, 64 test images",
        "threads: 1",
    ):
        assert words in text
    assert "<table>" in story.to_string("html")
    assert len(story.to_string("csv").splitlines()) == text.count("\n| ")
    with pytest.raises(ValueError, match=r"`format` \(='xml'\) must be one of"):
        story.to_string("xml")


def test_files(told):
    story, out = told
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.png", "report.html"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "separable demo --epochs 1 --seed 3" in page
    for name in ("trained separable", *(f"{each}, fitted once" for each in story_module.FURTHER)):
        assert name in page
    figures = json.loads((out / "demo.json").read_text())
    assert figures == json.loads(story.to_string("json"))
    assert figures["contenders"][2]["params"] == 215_498
    assert figures["contenders"][2]["promise_kept"] > 0


def test_epochs_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match=r"`epochs` \(=0\) must be at least 1"):
        tell(tmp_path / "none", epochs=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib.figure", "matplotlib")]
)
def test_a_missing_package_names_the_extra(monkeypatch, tmp_path, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "separable.demo.picture", raising=False)
    with pytest.raises(ImportError) as raised:
        tell(tmp_path / "none")
    assert str(raised.value) == f"{package} is not installed: pip install 'separable[demo]'"
    assert not (tmp_path / "none").exists()
