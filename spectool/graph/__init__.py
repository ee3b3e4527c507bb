"""Finding operators: front-ends that turn a checkpoint into regions and explained skips."""

from __future__ import annotations

from spectool.graph.survey import survey
from spectool.graph.types import Graph, Node, Region, Skipped, Survey, Value

__all__ = ["Graph", "Node", "Region", "Skipped", "Survey", "Value", "survey"]
