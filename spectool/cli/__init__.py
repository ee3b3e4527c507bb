"""The command line: parse, call the library, hand the result to a writer."""

from __future__ import annotations

from spectool.cli.main import main

__all__ = ["main"]
