"""Where a program comes from when the file has none."""

from __future__ import annotations

from spectool.architectures.matching import Match, match_keys
from spectool.architectures.resolve import build

__all__ = ["Match", "build", "match_keys"]
