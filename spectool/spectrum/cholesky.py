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

_STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def proven_bound(A: MatrixMap, guess: float) -> float | None:
    """Return c ≥ σ₁ of a stored matrix, as close above ``guess`` as a factorisation proves; None if none does.

    Tries c = guess·(1 + 1e-6), then 1e-5 … 1e-2 above. Costs 2·m·n² + n³/3 flops (n the smaller side), n² floats
    of memory and no matvecs. Does nothing for a smaller side above 6144.

    Args:
        A: The matrix, any stored type, on any device with float64.
        guess: An estimate of σ₁ from below, e.g. a Ritz value.
    """
    m, n = A.weight.shape
    if min(m, n) > LARGEST_SIDE or min(m, n) == 0 or not math.isfinite(guess) or guess <= 0:
        return None
    square = gram(row_blocks(A.weight))
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
