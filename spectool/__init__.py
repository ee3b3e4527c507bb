"""spectool: certified singular values of every implicitly linear layer in a neural-network checkpoint."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectool.api import check, clip, inspect, ls, svds
    from spectool.errors import SpectoolError
    from spectool.report.check import CheckReport, CheckRow
    from spectool.report.clip import ClipReport, ClipRow
    from spectool.report.row import Report, Row
    from spectool.spectrum.types import Spectrum

__version__ = "0.1.0"
__all__ = [
    "CheckReport",
    "CheckRow",
    "ClipReport",
    "ClipRow",
    "Report",
    "Row",
    "SpectoolError",
    "Spectrum",
    "__version__",
    "check",
    "clip",
    "inspect",
    "ls",
    "svds",
]

_HOMES = {
    "check": "spectool.api",
    "clip": "spectool.api",
    "inspect": "spectool.api",
    "ls": "spectool.api",
    "svds": "spectool.api",
    "CheckReport": "spectool.report.check",
    "CheckRow": "spectool.report.check",
    "ClipReport": "spectool.report.clip",
    "ClipRow": "spectool.report.clip",
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


class _Both(ModuleType):
    """A package that is called like a function and is that function, too."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from spectool.api.clipping import clip

        return clip(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        from spectool.api.clipping import clip

        return signature(clip)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # `spectool.clip` is a function of the library; importing the package of that name would put it in its place.
        if name == "clip" and isinstance(value, ModuleType):
            value.__class__ = _Both
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
