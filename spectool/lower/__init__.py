"""From a region of a graph to a linear map: closed forms where a rule exists, replay otherwise."""

from __future__ import annotations

from spectool.lower.build import lower, without_epsilon
from spectool.lower.replay import execute, remake_region

__all__ = ["execute", "lower", "remake_region", "without_epsilon"]
