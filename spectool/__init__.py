"""spectool: certified singular values of every implicitly linear layer in a neural-network checkpoint."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectool.api import SpectralClipper, check, clip, clip_, inspect, ls, svds
    from spectool.checkpoint.limits import Limits
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
    "Limits",
    "Report",
    "Row",
    "SpectoolError",
    "SpectralClipper",
    "Spectrum",
    "__version__",
    "check",
    "clip",
    "clip_",
    "inspect",
    "ls",
    "svds",
]

_HOMES = {
    "check": "spectool.api",
    "clip": "spectool.api",
    "clip_": "spectool.api",
    "SpectralClipper": "spectool.api",
    "inspect": "spectool.api",
    "ls": "spectool.api",
    "svds": "spectool.api",
    "Limits": "spectool.checkpoint.limits",
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
    # A package that can be called: `spectool.clip` is a function of the library and holds its parts, too.
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _clip()(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(_clip())

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        text: str | None = _clip().__doc__
        return text


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import of the package of that name would put a module in the function's place.
        if name == "clip" and isinstance(value, ModuleType):
            value.__class__ = _Both
        super().__setattr__(name, value)


def _clip() -> Any:
    from spectool.api.clipping import clip

    return clip


sys.modules[__name__].__class__ = _Package
