"""The library twin of every command."""

from __future__ import annotations

from spectool.api.inspecting import inspect
from spectool.api.listing import ls
from spectool.api.operators import svds

__all__ = ["inspect", "ls", "svds"]
