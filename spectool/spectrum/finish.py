"""How an iterative solver ends: the polish, and everything back in the operator's own shapes and units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spectool.spectrum.estimate import Estimate
from spectool.spectrum.polish import polish

if TYPE_CHECKING:
    from spectool.linear import LinearMap
    from spectool.spectrum.gram import Gram


def finish(
    A: LinearMap,
    gram: Gram,
    vectors: torch.Tensor,
    k: int,
    tol: float,
    *,
    tau: float | None,
    converged: bool,
    note: str,
) -> Estimate:
    """Polish ``vectors`` and return the estimate they give."""
    pairs = polish(gram.double(), vectors)
    unit = 1.0 / gram.factor
    first = float(pairs.values[0])
    lengths = torch.linalg.vector_norm(pairs.remainder, dim=1)
    residuals = torch.maximum(lengths, pairs.defect)[:k] / first
    values = pairs.values[:k]
    near = max(1e-9 * first, 4.0 * first * float(residuals.max()) ** 2, 2.0 * pairs.rounding)
    right = pairs.right[:k].cpu().reshape(-1, *gram.map.in_shape)
    left = pairs.left[:k].cpu().reshape(-1, *gram.map.out_shape)
    if gram.flipped:
        left, right = right, left
    return Estimate(
        left=left,
        values=(values * unit).cpu(),
        right=right,
        residuals=residuals.cpu(),
        converged=converged and bool((residuals <= tol).all()),
        matvecs=gram.applications,
        tau=None if tau is None else tau * unit,
        note=note,
        rounding=pairs.rounding * unit,
        multiplicity=int((values >= first - near).sum()),
        ritz=(pairs.values * unit).cpu(),
        coupling=(pairs.remainder @ pairs.remainder.T).cpu() * unit**2,
    )


def zero(A, k, gram):
    raise NotImplementedError
