"""Progress: nothing for quick work, a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import io
import sys
import time

import pytest

from spectool.cli.progress import LiveProgress, plain_line
from spectool.progress import Step


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def wait_for(stream: io.StringIO, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in stream.getvalue():
        assert time.monotonic() < deadline, f"{text!r} never came: {stream.getvalue()!r}"
        time.sleep(0.01)


@pytest.mark.parametrize("terminal", [True, False])
def test_quick_work_shows_nothing(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with LiveProgress() as progress:
        for index in range(100):
            progress(Step("conv1.weight", index, 100, matvecs=index))
    assert stream.getvalue() == ""


def test_a_terminal_shows_key_place_matvecs_and_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    with LiveProgress(patience=0.01) as progress:
        progress(Step("layer1.\x1b[2Jconv.weight", 3, 21, matvecs=40, residual=2.5e-4))
        for text in ("layer1.\\x1b[2Jconv.weight", "3/21", "40 matvecs", "residual 2.5e-04"):
            wait_for(stream, text)
        progress(Step("fc.weight", 20, 21, message="polishing"))
        wait_for(stream, "polishing")
    assert "\x1b[2J" not in stream.getvalue()


def test_elsewhere_it_is_a_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with LiveProgress(plain_every=0.01) as progress:
        progress(Step("conv1.weight", 3, 21, matvecs=40, residual=2.5e-4))
        wait_for(stream, "\n")
    line = stream.getvalue().splitlines()[0]
    assert line.startswith("[4/21] conv1.weight, 40 matvecs, residual 2.5e-04 (")
    assert "\x1b" not in stream.getvalue()


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with LiveProgress(enabled=False, patience=0.0) as progress:
        progress(Step("conv1.weight"))
        time.sleep(0.05)
    assert stream.getvalue() == ""


def test_an_interrupt_passes_and_clears_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")

    def interrupted() -> None:
        with LiveProgress(patience=0.01) as progress:
            progress(Step("conv1.weight", 0, 2))
            wait_for(stream, "conv1.weight")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue().endswith(("\x1b[2K", "\x1b[?25h")), "the line is cleared and the cursor is back"


def test_plain_line_without_a_total() -> None:
    assert plain_line(Step("finding operators"), 31.4) == "finding operators (31 s)"
