"""What was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Written:
    """The outcome of one write.

    Attributes:
        path: What was asked for: a file or a folder.
        files: Every file that was written, copies of unchanged ones included.
        changed: (file, start, stop) of every run of bytes that was written anew, checksums included; all other bytes
            are those of the input. Positions count in the written file, in a gzipped one in its unpacked bytes.
    """

    path: Path
    files: tuple[Path, ...]
    changed: tuple[tuple[Path, int, int], ...]
