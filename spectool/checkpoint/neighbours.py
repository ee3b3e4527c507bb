"""Files that a checkpoint names: shards, external data."""

from __future__ import annotations

from pathlib import Path


def is_there(path: Path) -> bool:
    """Tell whether something is at ``path``; a name that no file can have is that of none."""
    try:
        path.stat()
    except (OSError, ValueError):
        # Too long, a null byte, a surrogate, a loop of links: ``Path.exists`` raises for some of them.
        return False
    return True


def lies_in(path: Path, folder: Path) -> bool:
    """Tell whether ``path``, links followed, lies in ``folder``; never for a name that no file can have."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False
