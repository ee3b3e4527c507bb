"""Products of a tall and a wide matrix (low-rank adapters): the small matrix between their QR factors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from spectool.linear import Composed, DiagonalMap, MatrixMap
from spectool.spectrum.dense import Solved, matrix_levels
from spectool.spectrum.levels import EPS, Levels

_WORK = 1e12  # flops: a minute of one core
_WIDEST = 2048


def thin_product(A: Composed, k: int) -> Solved | None:
    """Return the singular values of B·A with a small inner dimension r, None for any other composition.

    B = Q₁R₁ and Aᵀ = Q₂R₂ give B·A = Q₁(R₁R₂ᵀ)Q₂ᵀ: the nonzero singular values are those of R₁R₂ᵀ, r × r, and the
    product is never formed. Householder QR is backward stable, so that the error is at most
    c·eps·(m + n + sizes)·Π‖factor‖_F, with c = 8 for the two factorisations and the products.

    Args:
        A: A chain of matrices and diagonals of vectors.
        k: How many are wanted.
    """
    if any(not isinstance(part, (MatrixMap, DiagonalMap)) or len(part.in_shape) != 1 for part in A.maps):
        return None
    m, n = prod(A.out_shape), prod(A.in_shape)
    inner = [prod(part.in_shape) for part in A.maps[:-1]]
    rank = min(inner)
    if 2 * rank >= min(m, n) or rank > _WIDEST or 8.0 * (m + n) * max(inner) * rank > _WORK:
        return None
    cut = inner.index(rank) + 1
    left, right = _product(A.maps[:cut]), _product(A.maps[cut:])
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T.contiguous(), mode="r").R.T
    norms = prod(float(torch.linalg.vector_norm(_factor(part).double())) for part in A.maps)
    rounding = 8 * EPS * (m + n + sum(inner)) * norms
    levels = matrix_levels(core, k)
    # The rank bounds how many are not zero; listing the zeros makes the spectrum complete.
    zeros = min(m, n) - int(levels.count.sum())
    wide = Levels(
        np.append(levels.values, 0.0),
        np.append((levels.lower - rounding).clip(min=0), 0.0),
        np.append(levels.upper + rounding, 0.0),
        np.append(levels.count, zeros),
    )
    return Solved(wide, "exact:low-rank", f"a product of rank {rank} at most: QR of its factors")


def _factor(part: object) -> Tensor:
    return part.weight.detach() if isinstance(part, MatrixMap) else part.full_scale()  # type: ignore[attr-defined]


def _product(maps: Sequence[object]) -> Tensor:
    """Multiply matrices and diagonals in float64."""
    total: Tensor | None = None
    for part in maps:
        factor = _factor(part).double()
        if isinstance(part, DiagonalMap):
            total = torch.diag(factor.flatten()) if total is None else total * factor.flatten()
        else:
            total = factor if total is None else total @ factor
    if total is None:
        raise ValueError("no factors")
    return total
