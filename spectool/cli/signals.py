"""Signals that end a run: as exceptions, so that what it holds is cleaned up."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Seconds in which further signals are taken for the same wish: `timeout` and terminals send some twice.
_AGAIN = 1.0
_STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_UNTOUCHED = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(KeyboardInterrupt):
    """A signal came.

    Not ``KeyboardInterrupt`` itself: Python remembers one that leaves code run by ``exec`` (as imports of large
    packages do) and ends the process by SIGINT, whatever exit code it was given.
    """


class Stop:
    """What stopped a run.

    Attributes:
        number: The signal; 0 if none came.
    """

    def __init__(self) -> None:
        self.number = 0
        self._when = -_AGAIN

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            Stopped: Unless one came just before, whose cleaning up is not to be disturbed.
        """
        now = time.monotonic()
        if now - self._when >= _AGAIN:
            self.number, self._when = number, now
            raise Stopped

    @property
    def exit_code(self) -> int:
        """What shells report for a program that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.number or signal.SIGINT)


@contextmanager
def stoppable(process: bool) -> Iterator[Stop]:
    """Turn signals into an exception for the time of a run.

    Signals that are ignored (``nohup``) stay so. At the end all is done, and a signal may end the process at once.

    Args:
        process: Whether the run is all that the process is for; otherwise nothing is changed.
    """
    stop = Stop()
    if not process or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    taken = [number for number in _STOPPING if signal.getsignal(number) in _UNTOUCHED]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
