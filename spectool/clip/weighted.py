"""The nearest matrix within a limit where changes are measured by data, by alternating directions.

minimise ½‖(W − W₀)L‖² subject to ‖W‖₂ ≤ c. With W split into W and Z, ‖Z‖₂ ≤ c, and the multiplier Λ = ρY of W = Z:
W is a product, Z clips the singular values of W + Y, and what it clips off is the new Y. Any Λ gives a lower bound,
(⟨Λ, W₀⟩ − c‖Λ‖_*)/‖ΛL⁻ᵀ‖, of which the SVD that clips has made the parts already. Every Z obeys the limit.

A subspace of pairs, as the bundle has it, is too small where hundreds of values exceed the limit; this does not mind.

**Source:** S. Boyd et al., "Distributed optimization and statistical learning via the alternating direction method of
multipliers", Found. Trends Mach. Learn. 3 (2011), sections 3.3, 3.4.1 and 3.4.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectool.clip.bundle import Projection
from spectool.progress import Progress, Step, silent

WORK = 1 << 34
"""m·n·min(m, n) up to which it is done: minutes at 2048×4096."""

_TINY = 1e-3
"""Limit over σ₁ below which squares have lost too much."""

_ITERATIONS = 300
_RELAXED = 1.6
_BALANCE = 4.0
"""Ratio of the two residuals from which on ρ is changed, by its root."""


def nearest_matrix(
    start: Tensor, root: Tensor, limit: float, *, gap: float, progress: Progress = silent
) -> Projection:
    """Return W ``(m, n)`` with ‖W‖₂ ≤ ``limit`` nearest to ``start`` in ‖(W − W₀)L‖.

    Costs an eigenvalue decomposition of side min(m, n) and a product with an (n, n) matrix per iteration.

    Args:
        start: W₀ ``(m, n)``, float64.
        root: L ``(n, n)``, lower triangular, float64.
        limit: c, positive.
        gap: Relative distance between the change and its lower bound at which to stop.
        progress: Receives steps.

    Returns:
        W, not turned; ``lower`` bounds ‖(W′ − W₀)L‖.
    """
    covariance = root @ root.T
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(float(values.max()) * 1e-15)
    # In the eigenvectors of H every product with a function of H is a scaling; singular values do not change.
    old = start @ vectors
    weights = values.sqrt()
    rho = float(weights.mean()) ** 2
    z, _, _ = _clipped(old, limit)
    y = torch.zeros_like(old)
    best, nearest, lower, count = math.inf, z, 0.0, 0
    for count in range(1, _ITERATIONS + 1):
        w = (old * values + rho * (z - y)) / (values + rho)
        relaxed = _RELAXED * w + (1.0 - _RELAXED) * z
        before = z
        z, y, nuclear = _clipped(relaxed + y, limit)
        change = float(torch.linalg.vector_norm((z - old) * weights))
        if change < best:
            best, nearest = change, z
        length = float(torch.linalg.vector_norm(y / weights))
        if length > 0:
            lower = max(lower, (float((y * old).sum()) - limit * nuclear) / length)
        residual = best / lower - 1.0 if lower > 0 else math.inf
        progress(Step("alternating", residual=residual, message=f"iteration {count}"))
        if residual <= gap or best == 0.0:
            break
        primal = float(torch.linalg.vector_norm(w - z))
        dual = float(torch.linalg.vector_norm(z - before))
        if count % 5 == 0 and count < _ITERATIONS // 2 and primal > 0 and dual > 0:
            ratio = primal / dual
            if not 1.0 / _BALANCE < ratio < _BALANCE:
                factor = min(4.0, max(0.25, ratio**0.5))
                rho, y = rho * factor, y / factor
    note = "" if residual <= gap else f"stopped after {count} iterations"
    return Projection(nearest @ vectors.T, lower, "alternating directions", count, 2 * count, note)


def _clipped(matrix: Tensor, limit: float) -> tuple[Tensor, Tensor, float]:
    """Return (the matrix with its singular values at most ``limit``, what was clipped off, its nuclear norm).

    Only values above the limit are needed, and those the Gram matrix has to the last digits, unless the limit is tiny.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares, left = torch.linalg.eigh(wide @ wide.T)
    sizes = squares.clamp_min(0.0).sqrt()
    if limit < _TINY * float(sizes[-1]):
        left, sizes, _ = torch.linalg.svd(wide, full_matrices=False)
    above = sizes > limit
    left, sizes = left[:, above], sizes[above]
    off = (left * (1.0 - limit / sizes)) @ (left.T @ wide)
    off = off if wide is matrix else off.T
    return matrix - off, off, float((sizes - limit).sum())
