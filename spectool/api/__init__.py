"""The library twin of every command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectool.api.checking import check
    from spectool.api.clipping import clip
    from spectool.api.inspecting import inspect
    from spectool.api.listing import ls
    from spectool.api.live import clip_
    from spectool.api.operators import svds
    from spectool.api.training import SpectralClipper

__all__ = ["SpectralClipper", "check", "clip", "clip_", "inspect", "ls", "svds"]

_HOMES = {
    "SpectralClipper": "training",
    "check": "checking",
    "clip": "clipping",
    "clip_": "live",
    "inspect": "inspecting",
    "ls": "listing",
    "svds": "operators",
}


def __getattr__(name: str) -> Any:
    # Late: listing tensors needs no torch, everything else does.
    if name not in _HOMES:
        raise AttributeError(f"module 'spectool.api' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"spectool.api.{_HOMES[name]}"), name)
