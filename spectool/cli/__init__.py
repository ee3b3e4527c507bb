"""The command line: parse, call the library, hand the result to a writer."""

from __future__ import annotations

from spectool.cli.commands import app
from spectool.cli.run import main

__all__ = ["app", "main"]
