"""|A₁|·|A₂|·…: what bounds the rounding of a composition entry by entry.

A product of maps can be far smaller than the product of their sizes: projections that nearly miss each other, sums
that cancel, scales that undo each other. Rounding knows the factors, not the product: computing A₁(A₂(…x)) is wrong
by at most γ·|A₁||A₂|…|x| in every entry, γ a rounding unit for each stage.

**Source:** N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from spectool.linear.compose import Adjoint, Composed, Reshaped, Scaled, adjoint
from spectool.linear.conv import ConvMap
from spectool.linear.diagonal import DiagonalMap
from spectool.linear.matrix import MatrixMap
from spectool.linear.protocol import LinearMap
from spectool.linear.separable import SeparableMap


@dataclass(frozen=True)
class Magnitude:
    """The entrywise magnitude of a map that is a product of known factors.

    Attributes:
        map: |A₁|·|A₂|·… in float64.
        lengths: Most products that one entry sums in each stage, forwards or backwards.
    """

    map: LinearMap
    lengths: tuple[int, ...]

    def norm(self) -> float:
        """Return a bound on ‖|A₁|·|A₂|·…‖₂; inf if it leaves float64. Costs one application of each factor twice.

        P ≥ 0, so ‖P‖₂² = ρ(PᵀP) is at most the largest row sum of PᵀP, an entry of Pᵀ(P·1). Sums of numbers ≥ 0 are
        computed to a relative (Σ lengths)·eps.
        """
        ones = torch.ones((1, *self.map.in_shape), dtype=torch.float64, device=self.map.device)
        largest = float(self.map.rmatvec(self.map.matvec(ones)).max())
        slack = 2.0 * torch.finfo(torch.float64).eps * (sum(self.lengths) + 4)
        return math.sqrt(largest) * (1.0 + slack) if math.isfinite(largest) else math.inf

    @property
    def roots(self) -> float:
        """Σ √length, what independent rounding errors of mean zero add up to."""
        return sum(math.sqrt(length) for length in self.lengths)

    @property
    def total(self) -> int:
        """Σ (length + 2), what rounding errors can add up to at worst."""
        return sum(length + 2 for length in self.lengths)


def magnitude(A: LinearMap) -> Magnitude | None:
    """Return the entrywise magnitude of A, or None if some of its arithmetic cannot be seen (a function).

    Example:
        >>> parts = MatrixMap(torch.tensor([[1.0, -1.0]])), MatrixMap(torch.tensor([[1.0], [1.0]]))
        >>> cancelling = magnitude(Composed(*parts))
        >>> cancelling.lengths, round(cancelling.norm(), 9)
        ((2, 2), 2.0)
    """
    match A:
        case MatrixMap():
            return Magnitude(
                MatrixMap(_absolute(A.weight), dtype=torch.float64, device=A.device), (max(A.weight.shape),)
            )
        case ConvMap():
            weight = _absolute(A.weight)
            conv = ConvMap(weight, A.in_shape, A.geometry, dtype=torch.float64, device=A.device)
            return Magnitude(conv, (_reach(A),))
        case DiagonalMap():
            scale = _absolute(A.scale)
            diagonal = DiagonalMap(scale, A.in_shape, axis=A.axis, dtype=torch.float64, device=A.device)
            return Magnitude(diagonal, (1,))
        case SeparableMap():
            factors = tuple(_absolute(factor) for factor in A.factors)
            separable = SeparableMap(A.channels, factors, dtype=torch.float64, device=A.device)
            return Magnitude(separable, tuple(max(factor.shape) for factor in factors))
        case Scaled() | Adjoint() | Reshaped():
            inner = magnitude(A.inner)
            return None if inner is None else Magnitude(_wrapped(A, inner.map), (*inner.lengths, 1))
        case Composed():
            parts = [magnitude(part) for part in A.maps]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None
            return Magnitude(
                Composed(*(part.map for part in known)), tuple(n for part in known for n in part.lengths)
            )
    return None


def factors(A: LinearMap) -> tuple[float, tuple[LinearMap, ...]]:
    """Return (c, maps) such that c·A₁·A₂·… has the norm of A, adjoints and shapes of the whole left out."""
    if isinstance(A, (Adjoint, Reshaped)):
        return factors(A.inner)
    if isinstance(A, Scaled):
        c, maps = factors(A.inner)
        return abs(A.factor) * c, maps
    return 1.0, A.maps if isinstance(A, Composed) else (A,)


def is_single(A: LinearMap) -> bool:
    """Return whether A is one stored operator, whose own norm bounds its rounding."""
    if isinstance(A, (Adjoint, Reshaped, Scaled)):
        return is_single(A.inner)
    if isinstance(A, Composed):
        return len(A.maps) == 1 and is_single(A.maps[0])
    return isinstance(A, (MatrixMap, ConvMap, DiagonalMap, SeparableMap))


def _wrapped(A: Scaled | Adjoint | Reshaped, inner: LinearMap) -> LinearMap:
    if isinstance(A, Scaled):
        return Scaled(inner, abs(A.factor))
    if isinstance(A, Adjoint):
        return adjoint(inner)
    return Reshaped(inner, in_shape=A.in_shape, out_shape=A.out_shape)


def _absolute(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    return weight.abs() if weight.dtype.itemsize > 1 else weight.float().abs()


def _reach(A: ConvMap) -> int:
    """Return the most taps that one output, or backwards one pixel, sums over; copies by the padding included."""
    geometry, (first, second, *kernel) = A.geometry, A.weight.shape
    spatial = A.out_shape[1:] if geometry.transposed else A.in_shape[1:]
    copies = 1
    if geometry.padding_mode != "zeros":
        copies = math.prod(
            1 - (-max(0, sum(pads)) // n) for n, pads in zip(spatial, geometry.padding, strict=True)
        )
    return max(int(first) // geometry.groups, int(second)) * math.prod(kernel) * copies
