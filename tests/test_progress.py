"""The progress bar: after a while, on a terminal alone, and gone when the work is."""

import io
import sys
import time

import pytest

from separable import progress as module
from separable.progress import progress, timed


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "DELAY", 0.05)
    monkeypatch.setattr(module, "TICK", 0.02)


def shown(monkeypatch, steps, stream, **options):
    """What a terminal holds while and after work that takes 0.2 s."""
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("working", steps, **options) as bar:
        if steps:
            bar.update()
        time.sleep(0.2)
    return stream.getvalue()


def test_a_bar_appears_while_a_step_lasts_and_tells_the_time_left(monkeypatch):
    text = shown(monkeypatch, 4, Terminal())
    *_, last, cleared = text.rstrip("\r").split("\r")
    assert last.startswith("working:  25%")
    assert "1/4 [00:00<00:00" in last
    assert cleared.strip() == ""


def test_without_a_number_of_steps_it_tells_the_time_so_far(monkeypatch):
    assert "working: 00:00" in shown(monkeypatch, None, Terminal())


def test_short_work_shows_nothing(monkeypatch):
    monkeypatch.setattr(module, "DELAY", 2.0)
    assert shown(monkeypatch, 4, Terminal()) == ""


@pytest.mark.parametrize(("stream", "is_shown"), [(io.StringIO, True), (Terminal, False)])
def test_nothing_is_shown_in_a_file_or_where_it_is_not_wanted(monkeypatch, stream, is_shown):
    assert shown(monkeypatch, 4, stream(), shown=is_shown) == ""


def test_an_error_ends_it(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)

    def fail():
        with progress("working", 4):
            time.sleep(0.1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert stream.getvalue().rstrip("\r").split("\r")[-1].strip() == ""


def test_what_is_hidden_hides_what_is_below(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("outer", 4, shown=False), progress("inner", 4) as bar:
        time.sleep(0.1)
        assert bar.disable
        assert list(timed(range(3), "measuring")) == [0, 1, 2]
    with progress("later", 4):
        time.sleep(0.1)
    assert "later" in stream.getvalue()
    assert "inner" not in stream.getvalue()
    assert "measuring" not in stream.getvalue()


def test_nothing_is_drawn_beside_what_is_timed(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("around", 4):
        time.sleep(0.1)
        for step in timed(range(2), "measuring"):
            if step == 0:
                time.sleep(0.05)  # the redraw that had begun
                before = stream.getvalue()
            time.sleep(0.1)
            assert "around" not in stream.getvalue()[len(before) :]
        time.sleep(0.1)
    assert "around" in stream.getvalue()[len(before) :]
