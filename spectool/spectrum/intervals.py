"""From an estimate to intervals: which upper bounds are computed, and which of them is printed."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite, prod, sqrt
from typing import TYPE_CHECKING

import numpy as np

from spectool.errors import OperatorError
from spectool.linear import Adjoint, Composed, ConvMap, LinearMap, MatrixMap, Recast, Reshaped, Scaled, size
from spectool.spectrum import probabilistic
from spectool.spectrum.bounds import cost, deterministic
from spectool.spectrum.dense import Solved, on_host
from spectool.spectrum.levels import Floats, Levels
from spectool.spectrum.polish import PROMISE
from spectool.spectrum.types import Spectrum, UpperKind

if TYPE_CHECKING:
    from spectool.progress import Progress
    from spectool.spectrum.estimate import Estimate

_SUM_ERROR = 1e-11  # relative rounding of a Frobenius norm's square, generously
_SHARE = 0.25  # flops of a bound count about four times those of a convolution: small batched factorisations


def iterated(
    A: LinearMap,
    k: int,
    estimate: Estimate,
    *,
    method: str,
    why: str,
    certify: bool,
    seed: int,
    progress: Progress,
) -> Solved:
    """Enclose what an iterative solver left.

    Lower ends are its Ritz values minus rounding. Upper ends: the probabilistic bound, free from the
    verification round; the deterministic one where it costs less than the estimate did, the smaller of the two
    counting. With ``certify`` the deterministic bound is printed wherever one exists, even if it is the larger.
    Without either, a probabilistic run of its own is made.

    Args:
        A: The map that was solved.
        k: How many values.
        estimate: From ``lanczos``, ``power`` or ``powerqr``.
        method: As ``Spectrum.method``.
        why: As ``Spectrum.why``.
        certify: Whether deterministic bounds are wanted at any price.
        seed: For the probabilistic run.
        progress: Receives steps.
    """
    lower, chance = (np.asarray(ends, dtype=np.float64) for ends in probabilistic.enclose(estimate))
    matvecs, kind = estimate.matvecs, _kind(chance)
    upper = chance
    affordable = cost(A) <= _SHARE * work(A) * estimate.matvecs
    bound = deterministic(on_host(A), k, guess=float(lower[0])) if certify or affordable else None
    if bound is not None:
        if certify or bound.upper[0] <= chance[0]:
            kind = bound.kind
        upper = bound.upper if certify else np.minimum(bound.upper, chance)
    if not isfinite(upper[0]):
        level, spent = probabilistic.upper(A, guess=float(lower[0]), seed=seed, progress=progress)
        matvecs += spent
        upper = np.full(k, level)
        kind = _kind(upper)
    values = estimate.values.cpu().numpy()
    levels = Levels(values, lower, np.maximum(upper, lower), np.ones(len(values), dtype=np.int64))
    return Solved(
        levels,
        method,
        why,
        kind=kind,
        exact=False,
        converged=estimate.converged,
        matvecs=matvecs,
        residuals=tuple(float(residual) for residual in estimate.residuals),
        note=estimate.note,
        left=estimate.left,
        right=estimate.right,
        multiplicity=estimate.multiplicity,
    )


def _kind(upper: Floats) -> UpperKind:
    return "probabilistic" if isfinite(float(upper[0])) else "none"


def work(A: LinearMap) -> float:
    """Estimate the flops of one application of A."""
    m, n = size(A)
    if isinstance(A, ConvMap):
        outputs = A.in_shape[1:] if A.geometry.transposed else A.out_shape[1:]
        return 2.0 * A.weight.numel() * prod(outputs)
    if isinstance(A, MatrixMap):
        return 2.0 * m * n
    if isinstance(A, (Adjoint, Reshaped, Recast, Scaled)):
        return work(A.inner)
    if isinstance(A, Composed):
        return sum(work(part) for part in A.maps)
    return 20.0 * (m + n)


def spectrum_of(solved: Solved, A: LinearMap, k: int, *, seed: int, fro: float | None, note: str) -> Spectrum:
    """Put a solution into its public form: lists of k, descending, every value inside its interval.

    Args:
        solved: The solution.
        A: The map as the caller gave it.
        k: How many.
        seed: As asked for.
        fro: ‖A‖_F where a closed form knows it.
        note: To be put before the solver's own.
    """
    values, lower, upper = solved.levels.expand(k)
    if not np.isfinite(values).all() or np.isnan(upper).any():
        raise OperatorError(
            "the solver broke down: the operator's values overflow",
            hint="scale the weights, or compute in float64",
        )
    closed = fro is not None
    listed = int(solved.levels.count.sum())
    if fro is None and solved.exact and listed >= min(size(A)):
        fro = sqrt(float((solved.levels.values**2 * solved.levels.count).sum()))
    lower = np.maximum.accumulate(lower[::-1])[::-1]  # σ_i ≥ σ_{i+1} ≥ its lower end
    upper = np.minimum.accumulate(upper)
    # Only a norm that was not computed from these values bounds them.
    if closed and fro is not None and isfinite(fro):
        upper = np.minimum(upper, _room(lower, fro, upper[0]))
    # Crossed ends could only come of the probabilistic bound's 1e-9; what is proven from below stays.
    upper = np.maximum(upper, lower)
    values = np.clip(values, lower, upper)
    multiplicity = solved.multiplicity or solved.levels.multiplicity()
    converged, own_note = solved.converged, solved.note
    if solved.exact and upper[0] > 0.0:
        accuracy = solved.accuracy if solved.accuracy is not None else float((upper - lower).max()) / 2
        if not accuracy <= PROMISE * max(values[0], 0.5 * upper[0]):
            converged, fro = False, fro if closed else None
            own_note = _join(own_note, f"not converged: rounding leaves {accuracy / upper[0]:.1e} of σ₁ open")
    if upper[0] == 0.0:
        note, multiplicity = _join(note, "zero operator"), min(size(A))
    return Spectrum(
        values=tuple(values.tolist()),
        lower=tuple(lower.tolist()),
        upper=tuple(upper.tolist()),
        upper_kind=solved.kind,
        residuals=solved.residuals,
        multiplicity=min(multiplicity, min(size(A))),
        multiplicity_exact=solved.exact and (solved.levels.resolved() or upper[0] == 0.0),
        converged=converged,
        matvecs=solved.matvecs,
        method=solved.method,
        seed=seed,
        why=solved.why,
        note=_join(note, own_note),
        fro=fro,
        left=solved.left,
        right=solved.right,
    )


def _room(lower: Floats, fro: float, first: float) -> Floats:
    """Bound σ_i for i ≥ 2 by what ‖A‖_F² leaves: i·σ_i² ≤ ‖A‖_F², and σ_i² ≤ ‖A‖_F² − Σ_{j<i} σ_j²."""
    index = np.arange(1, len(lower) + 1)
    square = fro**2 * (1 + _SUM_ERROR)
    before = np.concatenate([[0.0], np.cumsum(lower**2)[:-1]]) * (1 - _SUM_ERROR)
    room: Floats = np.sqrt(np.minimum(square / index, np.maximum(square - before, 0.0)))
    room[0] = max(first, 0.0) if isfinite(first) else inf
    return room


def _join(first: str, second: str) -> str:
    return "; ".join(text for text in (first, second) if text)


def with_levels(solved: Solved, levels: Solved) -> Solved:
    """Return a solution with vectors, its values replaced by those of a theorem about the same operator."""
    return replace(
        solved,
        levels=levels.levels,
        kind=levels.kind,
        exact=levels.exact,
        method=levels.method,
        why=levels.why,
        multiplicity=levels.multiplicity,
    )
