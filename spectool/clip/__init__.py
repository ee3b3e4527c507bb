"""The nearest weights whose operators obey a bound: projections, storage, certificates."""

from spectool.clip.bundle import Projection, bundle
from spectool.clip.grouping import group
from spectool.clip.problem import Constraint, Problem
from spectool.clip.project import Options, Projected
from spectool.clip.solve import solve
from spectool.clip.store import Stored, prove_limit, store

__all__ = [
    "Constraint",
    "Options",
    "Problem",
    "Projected",
    "Projection",
    "Stored",
    "bundle",
    "group",
    "prove_limit",
    "solve",
    "store",
]
