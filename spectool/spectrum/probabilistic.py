"""Probabilistic upper bounds, and the intervals an estimate gives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from spectool.linear import exact_arithmetic
from spectool.progress import Progress, Step, silent
from spectool.spectrum.gram import Gram
from spectool.spectrum.hochstenbach import FAILURE
from spectool.spectrum.rounding import application_error, begin, noise
from spectool.spectrum.starts import fingerprint, generator
from spectool.spectrum.verify import bounded_run

if TYPE_CHECKING:
    from spectool.linear import LinearMap
    from spectool.spectrum.estimate import Estimate


def enclose(estimate: Estimate) -> tuple[list[float], list[float]]:
    """Return (lower, upper): ``lower[i] ≤ σ_{i+1} ≤ upper[i]``, the upper ends with probability ≥ 1 − 1e-9.

    Lower: Ritz values of a float64 Rayleigh–Ritz step lie below the singular values (interlacing), but for the
    rounding that ``estimate.rounding`` bounds.

    Upper: in orthonormal bases that begin with the p left vectors U and the p right vectors V, A is
    [[S, E], [0, D]] with S = diag(ritz), ‖[E; D]‖ ≤ τ and E = UᵀA(I−VVᵀ) the remainder R. For x > τ² the
    matrix AAᵀ − x has as many positive eigenvalues as its Schur complement, which is at most
    S² + EEᵀ·x/(x−τ²) − x. So σ_i² ≤ x as soon as the i-th largest eigenvalue of S² + RRᵀ·x/(x−τ²) is ≤ x.
    The smallest such x is found by bisection. It is never above (max(σ̂_i, τ) + ‖R‖)² and, where τ < σ̂_i, exceeds
    σ̂_i² only by about ‖R‖²σ̂_i²/(σ̂_i²−τ²): second order. ``estimate.ceiling`` caps them all. Without τ the upper
    ends are infinite.

    Costs no matvecs.
    """
    lower = [max(0.0, float(value) - estimate.rounding) for value in estimate.values]
    if estimate.tau is None:
        return lower, [estimate.ceiling] * len(lower)
    upper: list[float] = []
    for index in range(len(lower)):
        bound = _quadratic(estimate.ritz, estimate.coupling, estimate.tau, index)
        upper.append(max(lower[index], min(bound, estimate.ceiling)) + estimate.rounding)
    return lower, upper


def _quadratic(ritz: torch.Tensor, coupling: torch.Tensor, tau: float, index: int) -> float:
    """Smallest (to 1e-13) sqrt(x) such that eigenvalue ``index`` of S² + RRᵀ·x/(x−τ²) is ≤ x, x > τ²."""
    scale = max(float(ritz[0]), tau)
    if scale == 0.0:
        return 0.0
    s2, g, t = torch.diag((ritz / scale) ** 2), coupling / scale**2, (tau / scale) ** 2

    def holds(x: float) -> bool:
        matrix = s2 + g * (x / (x - t))
        eigenvalues = torch.linalg.eigvalsh(matrix)
        # Small eigenvalues are as wrong as the largest is, 2n·eps of it: that of a σ_i of 1e-4·σ₁ by 1e-8.
        return float(eigenvalues[-1 - index]) + unsure * float(eigenvalues[-1]) <= x

    unsure = 2.0 * (len(s2) + 8) * torch.finfo(torch.float64).eps if index else 0.0
    low = max(float(s2[index, index]), t)
    spread = math.sqrt(max(0.0, float(torch.linalg.matrix_norm(g, 2))))
    high = (math.sqrt(low) + spread) ** 2 * (1.0 + 1e-15) + 1e-300
    while not holds(high):
        high = low + 2.0 * (high - low) + 1e-16
    for _ in range(80):
        middle = 0.5 * (low + high)
        if high - low <= 1e-14 * high or middle in (low, high):
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return scale * math.sqrt(high)


def upper(
    A: LinearMap,
    *,
    guess: float | None = None,
    excess: float = 1e-3,
    max_matvecs: int = 320,
    seed: int = 0,
    failure: float = FAILURE,
    progress: Progress = silent,
) -> tuple[float, int]:
    """Bound σ₁ from above by one Lanczos run of its own; return (bound, matvecs spent).

    The bound holds with probability ≥ 1 − failure. It exceeds σ₁ by 1–5 % after 80 matvecs, by 1e-3 to 1e-2 after
    200. No vectors are kept. See ``hochstenbach`` for why it holds.

    Args:
        A: The operator.
        guess: A lower bound on σ₁; the run ends early once its bound is within ``excess`` of it.
        excess: Relative excess over ``guess`` that is good enough.
        max_matvecs: Most applications of A plus of Aᵀ.
        seed: Enters the start vector beside the operator itself.
        failure: Probability that the bound does not hold.
        progress: Told once, at the end.
    """
    with exact_arithmetic(), torch.no_grad():
        gram = Gram(A)
        digest = fingerprint(A)
        if not begin(gram, generator(digest, seed, "scale")):
            return noise(gram) * gram.unit, gram.applications
        pairs = max(1, (max_matvecs - gram.applications) // 2)
        goal = 0.0 if guess is None else ((1.0 + excess) * guess / gram.unit) ** 2
        nothing = torch.empty(0, gram.size, dtype=gram.dtype)
        check, gram = bounded_run(
            gram,
            nothing,
            lambda suffix: generator(digest, seed, f"upper{suffix}"),
            above=1e300,
            goals=((goal, pairs),),
            failure=failure,
        )
        norm = math.sqrt(check.bound)
        bound = math.sqrt(check.bound + 2.0 * application_error(gram, norm) * norm) * gram.unit
    progress(Step("upper bound", matvecs=gram.applications))
    return bound, gram.applications
