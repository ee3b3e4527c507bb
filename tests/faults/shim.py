"""Calls of ``os`` that fail, are cut short or are interrupted at a chosen moment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest import mock

#: What a writer asks of the system; a name that the platform lacks is left out.
CALLS = (
    *(
        "open",
        "read",
        "write",
        "copy_file_range",
        "lseek",
        "fsync",
        "close",
        "chmod",
        "fchown",
        "fstat",
        "stat",
    ),
    *("link", "replace", "rename", "unlink", "mkdir", "rmdir", "scandir"),
)


@contextmanager
def fault_at(at: int, fault: Callable[[str], object], *, again: bool = False) -> Iterator[list[str]]:
    """Let something happen before the call number ``at``; yield the names of the calls made so far.

    Args:
        at: Which call, from 0 and over all functions together; -1 for none.
        fault: What happens: it raises or returns; then the call goes on.
        again: Whether it happens before every call from there on, too.
    """
    made: list[str] = []

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            made.append(name)
            if len(made) - 1 == at or (again and 0 <= at < len(made) - 1):
                fault(name)
            return real(*args, **options)

        return call

    with ExitStack() as stack:
        for name in CALLS:
            real = getattr(os, name, None)
            if real is not None:
                stack.enter_context(mock.patch.object(os, name, wrapped(name, real)))
        yield made


def raising(error: BaseException) -> Callable[[str], object]:
    """A fault that raises."""

    def fault(name: str) -> None:
        raise error

    return fault


@contextmanager
def interrupt_at(at: int, *folders: str) -> Iterator[list[str]]:
    """Raise ``KeyboardInterrupt`` before a line of code, as a signal does; yield the lines passed so far.

    Args:
        at: Which line, counted over all files; -1 for none.
        folders: Ends of the paths of files, or parts of them, whose lines count.
    """
    made: list[str] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not any(folder in name for folder in folders):
            return None
        if event == "line":
            made.append(f"{name.rpartition('/')[2]}:{frame.f_lineno}")
            if len(made) - 1 == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield made
    finally:
        sys.settrace(before)
