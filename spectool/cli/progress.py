"""Progress on stderr: a bar once work takes more than a second; off a terminal a plain line now and then."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from spectool.cli.messages import say
from spectool.progress import Step
from spectool.report.text import visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

PATIENCE = 1.0
PLAIN_EVERY = 30.0
_KEY = 32


class LiveProgress:
    """A progress callback and the context in which it shows anything.

    A thread draws, so that a long step without a word still shows that something happens. What it shows is the latest
    step it was given.

    Args:
        enabled: False for ``--no-progress`` and ``-q``: nothing is ever shown.
        patience: Seconds of work before anything is shown on a terminal.
        plain_every: Seconds between lines where stderr is no terminal.
    """

    def __init__(
        self, *, enabled: bool = True, patience: float = PATIENCE, plain_every: float = PLAIN_EVERY
    ) -> None:
        self._enabled = enabled
        self._terminal = sys.stderr.isatty()
        self._wait = patience if self._terminal else plain_every
        self._latest: Step | None = None
        self._start = time.monotonic()
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __call__(self, step: Step) -> None:
        """Note a step; cheap, whatever is shown."""
        with self._lock:
            self._latest = step
            if self._bar is not None:
                self._draw(step)

    def __enter__(self) -> LiveProgress:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._enabled:
            self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    def _watch(self) -> None:
        while not self._done.wait(self._wait):
            if self._terminal:
                self._show_bar()
                return  # from here on the bar draws itself
            with self._lock:
                step = self._latest
            if step is not None:
                say(plain_line(step, time.monotonic() - self._start))

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=2)),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False, style="dim"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True, highlight=False, emoji=False),
            transient=True,
        )
        with self._lock:
            self._task = bar.add_task("reading", total=None, detail="")
            bar.start()
            self._bar = bar
            if self._latest is not None:
                self._draw(self._latest)

    def _draw(self, step: Step) -> None:
        if self._bar is None or self._task is None:
            return
        name = visible(step.task)
        self._bar.update(
            self._task,
            description=name if len(name) <= _KEY else f"…{name[1 - _KEY :]}",
            completed=step.index,
            total=step.total or None,
            detail=_detail(step),
        )


def plain_line(step: Step, seconds: float) -> str:
    """Return where the work is, as one line for a log."""
    place = f"[{step.index + 1}/{step.total}] " if step.total else ""
    detail = _detail(step)
    return f"{place}{step.task}{', ' if detail else ''}{detail} ({seconds:.0f} s)"


def _detail(step: Step) -> str:
    parts = [f"{step.matvecs} matvecs"] if step.matvecs else []
    if step.residual is not None:
        parts.append(f"residual {step.residual:.1e}")
    if step.message:
        parts.append(visible(step.message))
    return ", ".join(parts)
