"""From a region of a graph to a linear map: closed forms where a rule exists, replay otherwise."""

from __future__ import annotations

from spectool.lower.build import chain_parts, lower, without_epsilon
from spectool.lower.replay import execute, remake_region

__all__ = ["chain_parts", "execute", "lower", "remake_region", "without_epsilon"]
