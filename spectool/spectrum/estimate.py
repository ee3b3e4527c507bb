"""What every iterative solver returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Estimate:
    """The k largest singular triplets as an iterative solver left them, with what is needed to enclose them.

    ``probabilistic.enclose`` turns it into intervals.

    Attributes:
        left: Left singular vectors ``(k, *out_shape)``, float64, on the CPU.
        values: σ̂₁ ≥ … ≥ σ̂_k ``(k,)``, float64, with multiplicity: Ritz values of ``right``.
        right: Right singular vectors ``(k, *in_shape)``, float64, on the CPU.
        residuals: max(‖Av−σu‖, ‖Aᵀu−σv‖)/σ₁ ``(k,)``, computed explicitly.
        converged: Every residual met the tolerance, and the verification bounded what is left by 1.05·σ̂_k
            and saw nothing above σ̂_k.
        matvecs: Single-vector applications of A plus of Aᵀ, everything included (a pair is 2).
        tau: Bound on the norm of A restricted to the complement of ``ritz``'s vectors, valid with probability
            ≥ 1 − 1e-9; None if no verification ran.
        note: Anything worth saying in words; empty otherwise.
        rounding: Absolute bound on the rounding error of ``values`` and of the residuals.
        multiplicity: How many values equal σ₁ to the accuracy of the values; a lower bound.
        ritz: All p ≥ k singular values of A restricted to the span that ``tau`` complements ``(p,)``.
        coupling: Gram matrix RRᵀ ``(p, p)`` of the residual rows R = UᵀA − diag(ritz)·Vᵀ of those p pairs.
        ceiling: Bound on ‖A‖ from the coefficients of the main run, valid with probability ≥ 1 − 1e-9 together
            with ``tau``; inf if there is none.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    residuals: torch.Tensor
    converged: bool
    matvecs: int
    tau: float | None
    note: str
    rounding: float
    multiplicity: int
    ritz: torch.Tensor
    coupling: torch.Tensor
    ceiling: float = math.inf
