"""The last step of every iterative solver: one Rayleigh–Ritz step in float64 with explicit residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spectool.spectrum.gram import wide

if TYPE_CHECKING:
    from spectool.spectrum.gram import Gram


PROMISE = 1e-6
"""Accuracy that is promised, relative to σ₁; what is smaller than this is as good as zero."""


@dataclass(frozen=True)
class Pairs:
    """p approximate singular triplets of a scaled operator f·M, float64.

    Attributes:
        values: Singular values of f·M restricted to the span of ``right``, descending ``(p,)``.
        right: Orthonormal rows ``(p, size)``.
        left: Orthonormal rows ``(p, other size)``; f·M·right = values·left to rounding.
        remainder: R = left·f·M − values·right ``(p, size)``, computed explicitly.
        defect: ‖f·M·right − values·left‖ per row ``(p,)``, computed explicitly (rounding only).
        rounding: Bound on the rounding error of ``values``, ``remainder`` and ``defect``.
    """

    values: torch.Tensor
    right: torch.Tensor
    left: torch.Tensor
    remainder: torch.Tensor
    defect: torch.Tensor
    rounding: float


def rounding_unit(gram: Gram) -> float:
    """Return the relative rounding error of one application of M, in units of ‖M‖.

    An entry of M·x is a sum of at most L = max(m, n) products. Rounding errors of mean zero move it by at most
    λ·u·sqrt(L)·(Σ m²x²)^½ with probability ≥ 1 − 2·exp(−λ²/2) (u the unit roundoff of the type the map really
    computes in); summed over the entries that is λ·u·sqrt(L) times the largest column norm of M, at most ‖M‖.
    λ = 8 makes the failure probability 3e-14. Fused or blocked sums only do better.

    **Source:** N. J. Higham and T. Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci.
    Comput. 41 (2019), theorem 2.4.
    """
    length = max(math.prod(gram.map.in_shape), math.prod(gram.map.out_shape))
    return 4.0 * torch.finfo(gram.dtype).eps * math.sqrt(length)


def polish(gram: Gram, vectors: torch.Tensor) -> Pairs:
    """Rotate ``vectors`` into singular vectors of M restricted to their span, and measure what is missing.

    Costs 2p matvecs in float64 (in the map's own type where it cannot change). Adds no direction: the span, and
    so any bound on its complement, stays.

    Args:
        gram: The operator in its highest precision (``Gram.double``).
        vectors: Linearly independent rows ``(p, size)``.
    """
    rows = wide(vectors).to(gram.device)
    basis = torch.linalg.qr(rows.T).Q
    image = wide(gram.forward(basis.T))
    # QR first: its Q is orthonormal even where M maps a vector to zero, which an SVD of the image alone is not
    # bound to be; the left vectors of zero singular values then really are orthogonal to the others.
    q, r = torch.linalg.qr(image.T)
    u, values, wt = torch.linalg.svd(r)
    left = (q @ u[:, : len(values)]).T
    right = (basis @ wt.T).T
    remainder = wide(gram.backward(left)) - values[:, None] * right
    defect = torch.linalg.vector_norm(wt @ image - values[:, None] * left, dim=1)
    scale = float(values[0]) if len(values) else 0.0
    # One application for the image, one for the remainder, and O(p) rotations in float64.
    slack = rounding_unit(gram) + 16.0 * len(values) * torch.finfo(torch.float64).eps
    return Pairs(values, right, left, remainder, defect, slack * scale)
