"""A deterministic upper bound on σ₁ of a stored matrix by one Cholesky factorisation.

If c²I − AᵀA has a Cholesky factor, σ₁ ≤ c. In floating point: G is AᵀA up to an error that the summation bounds,
and a factorisation of M = (c² − δ)I − G that runs through proves that M is positive semidefinite up to a
backward error of at most 4(n+2)·eps·tr M; δ covers both.

**Source:** N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., theorem 10.3; S. M. Rump,
"Verification of positive definiteness", BIT 46 (2006).
"""

from __future__ import annotations

import math

import torch

from spectool.linear import MatrixMap
from spectool.spectrum.dense import gram, gram_rounding, row_blocks
from spectool.spectrum.levels import EPS

LARGEST_SIDE = 6144
"""Smaller side up to which the factorisation is worth its n³/3 flops."""

MOST_WORK = 1.5e12
"""Flops up to which a Gram matrix is formed for a certificate: about half a minute of one core."""

_STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)
_POWER_STEPS = 60


def proven_bound(A: MatrixMap, guess: float | None = None) -> float | None:
    """Return c ≥ σ₁ of a stored matrix, as close above ``guess`` as a factorisation proves; None if none does.

    Tries c = guess·(1 + 1e-6), then 1e-5 … 0.1 above. Costs 2·m·n² + n³/3 flops (n the smaller side), n² floats
    of memory and no matvecs. Does nothing for a smaller side above 6144, or above 1.5e12 flops.

    Args:
        A: The matrix, any stored type, on any device with float64.
        guess: An estimate of σ₁ from below, e.g. a Ritz value; None for 60 steps of power iteration on AᵀA.

    Example:
        >>> round(proven_bound(MatrixMap(torch.diag(torch.tensor([3.0, 1.0]))), 3.0), 4)
        3.0
    """
    m, n = A.weight.shape
    if min(m, n) == 0 or min(m, n) > LARGEST_SIDE or 2.0 * m * n * min(m, n) > MOST_WORK:
        return None
    square = gram(row_blocks(A.weight))
    if guess is None:
        guess = _power(square)
    if not math.isfinite(guess) or guess <= 0:
        return None
    rounding = gram_rounding(square, max(m, n))
    side = square.shape[0]
    for step in _STEPS:
        c = guess * (1 + step)
        delta = rounding + 8 * (side + 2) * EPS * (side * c * c)
        shifted = -square
        shifted.diagonal().add_(c * c - delta)
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return c * (1 + 2 * EPS)
    return None


def _power(square: torch.Tensor) -> float:
    """Return an estimate of σ₁ from below."""
    x = torch.randn(square.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.to(square.device)
    for _ in range(_POWER_STEPS):
        x = square @ (x / torch.linalg.vector_norm(x).clamp_min(1e-300))
    return math.sqrt(float(torch.linalg.vector_norm(x)))
