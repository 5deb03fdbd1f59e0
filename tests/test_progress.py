"""The progress bar: after a while, on a terminal alone, and gone when the work is."""

import io
import sys
import time

import pytest

from separable import progress as module
from separable.progress import progress, timed

PATIENCE = 60.0  # seconds, of which a test takes as few as the machine lets it


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def waits_for(self, text):
        """Wait until something is written."""
        end = time.monotonic() + PATIENCE
        while text not in self.getvalue():
            assert time.monotonic() < end, f"there was no {text!r} in {self.getvalue()!r}"
            time.sleep(0.005)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "DELAY", 0.05)
    monkeypatch.setattr(module, "TICK", 0.02)


def on_a_terminal(monkeypatch):
    """From here on; pytest sets its own stream between a test's fixtures and its body."""
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    return stream


def last_line(stream):
    return stream.getvalue().rstrip("\r").split("\r")[-1]


def test_a_bar_appears_while_a_step_lasts_and_tells_the_time_left(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    with progress("working", 4) as bar:
        bar.update()
        terminal.waits_for("working:  25%")
        assert "1/4 [00:0" in last_line(terminal)
        assert "<00:0" in last_line(terminal)
    assert last_line(terminal).strip() == ""


def test_without_a_number_of_steps_it_tells_the_time_so_far(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    with progress("working"):
        terminal.waits_for("working: 00:0")


def test_short_work_shows_nothing(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setattr(module, "DELAY", PATIENCE)
    with progress("working", 4) as bar:
        bar.update()
        time.sleep(0.1)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(("stream", "is_shown"), [(io.StringIO, True), (Terminal, False)])
def test_nothing_is_shown_in_a_file_or_where_it_is_not_wanted(monkeypatch, stream, is_shown):
    monkeypatch.setattr(sys, "stderr", written := stream())
    with progress("working", 4, shown=is_shown) as bar:
        assert bar.disable
        bar.update()
        time.sleep(0.1)
    assert written.getvalue() == ""


def test_an_error_ends_it(monkeypatch):
    terminal = on_a_terminal(monkeypatch)

    def fail():
        with progress("working", 4):
            terminal.waits_for("working")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert last_line(terminal).strip() == ""


def test_what_is_hidden_hides_what_is_below(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    with progress("outer", 4, shown=False), progress("inner", 4) as bar:
        assert bar.disable
        assert list(timed(range(3), "measuring")) == [0, 1, 2]
    with progress("later", 4):
        terminal.waits_for("later")
    assert "inner" not in terminal.getvalue()
    assert "measuring" not in terminal.getvalue()


def test_nothing_is_drawn_beside_what_is_timed():
    """The thread that redraws, on a clock of the test's: each wait is one step of the story."""
    happened = []
    loop = timed(range(1), "measuring")

    class Bar:
        def refresh(self):
            happened.append("drawn")

    class Clock:
        def wait(self, seconds):
            happened.append(seconds)
            match happened.count(module.TICK):
                case 1:
                    next(loop)
                case 2:
                    assert list(loop) == []
                case 3:
                    return True
            return False

    module._redraw(Bar(), Clock())
    tick = module.TICK
    assert happened == [module.DELAY, "drawn", tick, tick, "drawn", tick]
