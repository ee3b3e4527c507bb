"""The front-end for TorchScript: its code is interpreted symbolically here, never compiled or run by torch."""

from __future__ import annotations

from spectool.graph.script.front import survey_script

__all__ = ["survey_script"]
