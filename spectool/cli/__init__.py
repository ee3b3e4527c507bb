"""The command line: parse, call the library, hand the result to a writer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run spectool and return its exit code; see ``spectool.cli.run``."""
    try:
        from spectool.cli.run import main as run
    except KeyboardInterrupt:
        return 130  # so early that there is nothing to say or to clean up
    return run(arguments)


def __getattr__(name: str) -> Any:
    if name == "app":
        from spectool.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
