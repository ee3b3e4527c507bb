"""Deterministic upper bounds for any map that has one: which theorem applies, and what it would cost."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from spectool.linear import (
    Adjoint,
    Composed,
    ConvMap,
    DiagonalMap,
    LinearMap,
    MatrixMap,
    Reshaped,
    Scaled,
    SeparableMap,
    fold,
)
from spectool.spectrum.any_size import any_size
from spectool.spectrum.cholesky import LARGEST_SIDE, proven_bound
from spectool.spectrum.dense import matrix_levels
from spectool.spectrum.exact import closed_form
from spectool.spectrum.levels import EPS, Floats, Levels, union
from spectool.spectrum.padding import is_copying, padding_norm, unpadded
from spectool.spectrum.periodic import symbol_levels, symbol_work
from spectool.spectrum.stencil import Stencil, convolution_of, split, stencil_of
from spectool.spectrum.types import UpperKind

_SYMBOL_WORK = 1e12  # flops above which the finite grid gives way to the bound for any size
_SEVERAL_PERIODS = 2e9  # flops per period up to which three are tried


@dataclass(frozen=True, eq=False)
class Bound:
    """Proven upper ends.

    Attributes:
        upper: ``upper[i] ≥ σ_{i+1}`` ``(k,)``, descending.
        kind: What proves them.
    """

    upper: Floats
    kind: UpperKind


def deterministic(A: LinearMap, k: int, *, guess: float | None = None) -> Bound | None:
    """Return the deterministic bound on σ₁ … σ_k that A's kind has, or None if it has none.

    Structure theorem, else symbol (zero padding), valid convolution times padding norm (other padding), Cholesky
    (stored matrix), product of the parts' bounds (chain). Costs no matvecs.

    Args:
        A: The map.
        k: How many.
        guess: An estimate of σ₁ from below, from which the Cholesky test starts.

    Example:
        >>> import torch
        >>> from spectool.linear import ConvGeometry
        >>> same = ConvGeometry((1, 1), ((1, 1), (1, 1)), (1, 1))
        >>> bound = deterministic(ConvMap(torch.ones(1, 1, 3, 3) + torch.eye(3), (1, 50, 50), same), 1)
        >>> bound.kind, round(float(bound.upper[0]), 6)
        ('symbol', 12.0)
    """
    A = fold(A)
    if isinstance(A, (Adjoint, Reshaped)):
        return deterministic(A.inner, k, guess=guess)
    exact = closed_form(A, k)
    if exact is not None:
        return Bound(exact.levels.expand(k)[2], exact.kind)
    conv = convolution_of(A)
    if conv is not None:
        return _convolution(conv, k)
    if isinstance(A, Scaled):
        factor = abs(A.factor)
        inner = deterministic(A.inner, k, guess=guess / factor if guess and factor else None)
        return None if inner is None else Bound(inner.upper * (factor * (1 + EPS)), inner.kind)
    if isinstance(A, MatrixMap):
        return _matrix(A, k, guess)
    if isinstance(A, Composed):
        return _product(A, k)
    return None


def cost(A: LinearMap) -> float:
    """Estimate the flops of ``deterministic``; infinite where there is no bound, 0 where it is a theorem."""
    conv = convolution_of(A)
    if conv is not None:
        whole = unpadded(conv) if is_copying(conv) else stencil_of(conv)
        return _work(whole) if whole is not None else np.inf
    if isinstance(A, (Adjoint, Reshaped, Scaled)):
        return cost(A.inner)
    if isinstance(A, MatrixMap):
        m, n = A.weight.shape
        short = min(m, n)
        return np.inf if short > LARGEST_SIDE else 2.0 * m * n * short + short**3 / 3
    if isinstance(A, Composed):
        return sum(cost(part) for part in A.maps)
    return 0.0 if isinstance(A, (DiagonalMap, SeparableMap)) else np.inf


def _work(whole: Stencil) -> float:
    return sum(symbol_work(part) if part.kernel else float(part.weight.numel()) for part, _ in split(whole))


def _convolution(conv: ConvMap, k: int) -> Bound:
    if is_copying(conv):
        whole, norm, kind = unpadded(conv), padding_norm(conv), "padding"
    else:
        found = stencil_of(conv)
        if found is None:
            raise TypeError("a convolution that pads with zeros has a stencil")
        whole, norm, kind = found, 1.0, "symbol"
    if _work(whole) > _SYMBOL_WORK:
        level = any_size(conv.weight, conv.geometry)
        return Bound(np.full(k, level * norm), "padding" if kind == "padding" else "symbol-any-size")
    upper = stencil_bound(whole, k).expand(k)[2] * (norm * (1 + 2 * EPS))
    return Bound(upper, "padding" if kind == "padding" else "symbol")


def stencil_bound(whole: Stencil, k: int) -> Levels:
    """Return proven upper ends of a zero-padded stencil's k largest singular values: the union of its parts'."""
    bounds = []
    for part, count in split(whole):
        wanted = -(-k // count)
        if part.kernel:
            tries = 3 if symbol_work(part) <= _SEVERAL_PERIODS else 1
            levels = symbol_levels(part, wanted, tries=tries)
        else:
            levels = matrix_levels(part.weight.double(), wanted)
        bounds.append(levels.repeated(count))
    return union(bounds)


def _matrix(A: MatrixMap, k: int, guess: float | None) -> Bound | None:
    level = proven_bound(A, guess)
    return None if level is None else Bound(np.full(k, level), "cholesky")


def _product(A: Composed, k: int) -> Bound | None:
    """Bound σ_i(A₁A₂…) by min_j σ_i(A_j)·Π_{l≠j} σ₁(A_l)."""
    uppers = []
    for part in A.maps:
        wanted = min(k, prod(part.in_shape), prod(part.out_shape))
        bound = deterministic(part, wanted)
        if bound is None:
            return None
        # Beyond the smaller side there is nothing.
        uppers.append(np.concatenate([bound.upper, np.zeros(k - wanted)]))
    first = prod(float(upper[0]) for upper in uppers)
    if first == 0.0:
        return Bound(np.zeros(k), "product")
    ratios = np.minimum.reduce([upper / upper[0] for upper in uppers])
    return Bound(first * ratios * (1 + 4 * len(uppers) * EPS), "product")
