"""Whether a change can be measured by what it does to data, and the reason where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spectool.clip.coordinates import Covariance, Metric, Rows
from spectool.clip.problem import Closed, Problem, is_row_matrix
from spectool.clip.weighted import WORK
from spectool.graph.types import Conv, Linear, Op

if TYPE_CHECKING:
    from torch import Tensor

    from spectool.clip.project import Options

_TURNED = 5 << 19
"""Entries of a weight up to which it is measured by data: the bundle holds 300 images of it, 3 GB in float32."""


def not_by_data(metric: Metric, reason: str) -> str:
    """Return that the change is not measured by data, and why; empty without a reason."""
    return f"metric {metric}, not data: {reason}" if reason else ""


def covariance_of(
    problem: Problem, forms: Sequence[Closed | None], weight: Tensor, options: Options
) -> tuple[Covariance | None, str]:
    """Return what the rows of the one constant of a problem see, and why not if that was asked for in vain.

    Args:
        problem: Constraints with one edited constant.
        forms: What its regions are.
        weight: The constant.
        options: What was asked for, and what is known.
    """
    (name,) = problem.names
    if options.uncovered is None:
        return None, ""
    if options.method != "auto":
        return None, f"{options.method} does not minimise it"
    if options.all_sizes or any(form is not None and form.kind == "infinite" for form in forms):
        return None, "it is clipped for every input size"
    matrix = options.covariances.get(name)
    if matrix is None:
        return None, options.uncovered.get(name) or options.uncovered.get("", "")
    uses = {
        _rows(node.op)
        for constraint in problem.constraints
        for node in constraint.region.nodes
        if name in node.inputs
    }
    rows = uses.pop()
    if rows is None or uses:
        return None, "it is used in several ways"
    covariance = Covariance(matrix.double(), rows)
    if not covariance.fits(weight):
        return None, "what its layer sees is not what its rows are multiplied with"
    if not bool(covariance.root.isfinite().all()):
        return None, "the covariance of what its layer sees is lost in roundings"
    if len(forms) == 1 and is_row_matrix(forms[0], weight):
        _, m, n = rows.split(weight).shape
        return (None, f"a matrix {m}×{n} takes too long") if m * n * min(m, n) > WORK else (covariance, "")
    if weight.numel() > _TURNED:
        return None, f"{weight.numel()} entries, and that takes 3 GB at {_TURNED}"
    return covariance, ""


def _rows(op: Op) -> Rows | None:
    """Return how the weight of an operator is rows; None for what is no operator."""
    if isinstance(op, Conv):
        return Rows(op.geometry.groups, op.geometry.transposed)
    return Rows(transposed=op.transposed) if isinstance(op, Linear) else None
