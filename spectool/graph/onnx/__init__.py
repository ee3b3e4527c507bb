"""ONNX front-end: from a ``ModelProto`` to regions and explained skips."""

from __future__ import annotations

from spectool.graph.onnx.survey import survey_onnx

__all__ = ["survey_onnx"]
