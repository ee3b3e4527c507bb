"""Singular values of linear maps, each enclosed: structure theorems, solvers and proven bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectool.spectrum.any_size import supremum
    from spectool.spectrum.solve import svds
    from spectool.spectrum.types import Method, Spectrum, UpperKind

__all__ = ["Method", "Spectrum", "UpperKind", "supremum", "svds"]

_HOMES = {
    "supremum": "spectool.spectrum.any_size",
    "svds": "spectool.spectrum.solve",
    "Method": "spectool.spectrum.types",
    "Spectrum": "spectool.spectrum.types",
    "UpperKind": "spectool.spectrum.types",
}


def __getattr__(name: str) -> Any:
    # Late, because the result types are wanted where torch must not be imported.
    if name not in _HOMES:
        raise AttributeError(f"module 'spectool.spectrum' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
