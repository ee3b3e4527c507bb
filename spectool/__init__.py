"""spectool: certified singular values of every implicitly linear layer in a neural-network checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectool.api import check, inspect, ls, svds
    from spectool.errors import SpectoolError
    from spectool.report.check import CheckReport, CheckRow
    from spectool.report.row import Report, Row
    from spectool.spectrum.types import Spectrum

__version__ = "0.1.0"
__all__ = [
    "CheckReport",
    "CheckRow",
    "Report",
    "Row",
    "SpectoolError",
    "Spectrum",
    "__version__",
    "check",
    "inspect",
    "ls",
    "svds",
]

_HOMES = {
    "check": "spectool.api",
    "inspect": "spectool.api",
    "ls": "spectool.api",
    "svds": "spectool.api",
    "CheckReport": "spectool.report.check",
    "CheckRow": "spectool.report.check",
    "Report": "spectool.report.row",
    "Row": "spectool.report.row",
    "Spectrum": "spectool.spectrum.types",
    "SpectoolError": "spectool.errors",
}


def __getattr__(name: str) -> Any:
    # Late, because torch takes seconds to import and `spectool --help` must not pay for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'spectool' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
