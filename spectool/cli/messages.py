"""What goes to stderr: messages, hints and errors, never data."""

from __future__ import annotations

import os
import sys

from spectool.report.text import visible

_COLOURS = {"error": "\033[1;31m", "warning": "\033[33m", "hint": "\033[36m"}

_LONGEST = 1500


def say(text: str, *, label: str = "") -> None:
    """Write one line to stderr, with control characters spelled out.

    Args:
        text: What to say; it may hold names from a file.
        label: ``error``, ``warning`` or ``hint``; coloured on a terminal unless NO_COLOR is set.
    """
    head = f"{label}: " if label else ""
    if label in _COLOURS and coloured():
        head = f"{_COLOURS[label]}{head}\033[0m"
    if len(text) > _LONGEST:
        # A name in a file may be as long as the file.
        text = f"{text[: _LONGEST - 300]} … {text[-250:]}"
    try:
        sys.stderr.write(f"{head}{visible(text)}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        # Nobody is listening on stderr, and there is nowhere else to say so.
        return


def coloured() -> bool:
    """Return whether stderr takes colours."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
