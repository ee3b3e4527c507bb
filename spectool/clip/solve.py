"""Solve a problem with one edited constant, or with several."""

from __future__ import annotations

from spectool.clip.measure import not_by_data
from spectool.clip.problem import Problem
from spectool.clip.project import Options, Projected, project
from spectool.clip.several import bends, distance, project_several, scale_bent
from spectool.progress import Progress, silent


def solve(problem: Problem, before: float, options: Options, progress: Progress = silent) -> Projected:
    """Return values of the edited constants that obey the limits, as near to the old ones as can be had.

    Args:
        problem: What to solve.
        before: Largest σ₁ over limit of its constraints, as it is.
        options: How.
        progress: Receives steps.

    Raises:
        OperatorError: If no values obey the limits, or a region cannot be built.
    """
    if before <= 1.0 and options.method == "auto" and not options.all_sizes:
        return _unchanged(problem)
    if len(problem.names) == 1 and not bends(problem):
        return project(problem, before, options, progress)
    several = len(problem.names) > 1
    made = (
        project_several(problem, before, options, progress)
        if several
        else scale_bent(problem, before, options)
    )
    if options.uncovered is None:
        return made
    reason = "several weights at once" if several else "its weight is used twice in a row"
    return made.with_note(not_by_data("weights", reason))


def _unchanged(problem: Problem) -> Projected:
    start = {name: problem.load(name).double() for name in problem.names}
    return Projected(
        weights=start,
        metric="weights",
        change=0.0,
        lower=0.0,
        scaling=0.0,
        method="none",
        iterations=0,
        applications=0,
        distance=lambda values: distance(start, values),
    )
