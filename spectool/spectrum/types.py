"""The result of every solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Method = Literal["auto", "exact", "lanczos", "power", "powerqr"]
UpperKind = Literal[
    "exact", "symbol", "symbol-any-size", "padding", "cholesky", "product", "probabilistic", "none"
]


@dataclass(frozen=True)
class Spectrum:
    """The k largest singular values of one operator, each enclosed.

    Attributes:
        values: σ̂₁ ≥ σ̂₂ ≥ …, with multiplicity; estimates.
        lower: ``lower[i] ≤ σ_{i+1}``, rounding included.
        upper: ``upper[i] ≥ σ_{i+1}``; inf where nothing is proven.
        upper_kind: What proves ``upper[0]``.
        residuals: max(‖Av−σu‖, ‖Aᵀu−σv‖)/σ₁ per value, computed explicitly; empty for structure theorems.
        multiplicity: How many singular values equal σ₁.
        multiplicity_exact: Whether that count is proven (structure or full spectrum) or a lower bound.
        converged: Whether every value met the tolerance and the verification saw nothing above them.
        matvecs: Single-vector applications of A plus of Aᵀ, everything included.
        method: What computed it, e.g. ``exact:non-overlapping``, ``dense``, ``lanczos``, ``power``, ``powerqr``.
        seed: Seed that was asked for.
        why: Why this method was chosen, in words.
        note: Anything worth saying in words (clamped k, zero operator…).
        fro: Frobenius norm of the operator; None where unknown.
        left: Left singular vectors ``(k, *out_shape)`` where asked for.
        right: Right singular vectors ``(k, *in_shape)`` where asked for.
    """

    values: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    upper_kind: UpperKind
    residuals: tuple[float, ...]
    multiplicity: int
    multiplicity_exact: bool
    converged: bool
    matvecs: int
    method: str
    seed: int
    why: str = ""
    note: str = ""
    fro: float | None = None
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
