"""Products and sums far smaller than their parts: what rounding of the parts does to them."""

from __future__ import annotations

from collections.abc import Sequence

import mpmath
import numpy as np
import torch
from dense import Matrix

from adversaries.base import DIGITS, Adversary, Draw, by_mpmath, exactly, precise
from spectool.linear import (
    Composed,
    ConvGeometry,
    ConvMap,
    DiagonalMap,
    FunctionMap,
    LinearMap,
    MatrixMap,
    SeparableMap,
)


def _orthogonal(rng: np.random.Generator, n: int) -> Matrix:
    return np.asarray(np.linalg.qr(rng.standard_normal((n, n)))[0])


def _product(matrices: Sequence[Matrix]) -> mpmath.matrix:
    with mpmath.workdps(DIGITS):
        result = precise(matrices[0])
        for matrix in matrices[1:]:
            result = result * precise(matrix)
        return result


def products(draw: Draw) -> Adversary | None:
    """Matrices that undo each other: projections, gradings, scales of 1e±20, powers of nilpotent ones."""
    n, rng = draw.integer(2, 6), draw.rng()
    parts: list[Matrix]
    match draw.choice(("overlap", "scales", "gradings", "nilpotent", "inverse", "extreme", "zeros")):
        case "overlap":
            q, size = _orthogonal(rng, 2 * n), 10.0 ** -draw.integer(0, 18)
            parts = [q[:n], (q[n:] + size * q[:n]).T.copy()]
        case "scales":
            power = draw.integer(0, 30)
            parts = [rng.standard_normal((n, n)) * 10.0**power, rng.standard_normal((n, n)) * 10.0**-power]
        case "gradings":
            d = np.logspace(-draw.integer(0, 12), draw.integer(0, 12), n)
            parts = [rng.standard_normal((n, n)) * d, rng.standard_normal((n, n)) / d[:, None]]
        case "nilpotent":
            parts = [np.diag(rng.standard_normal(n - 1) * 10.0 ** draw.integer(0, 5), 1)] * draw.integer(2, n)
        case "inverse":
            a = rng.standard_normal((n, n)) @ np.diag(np.logspace(0, -draw.integer(0, 8), n))
            parts = [a, np.linalg.inv(a), _orthogonal(rng, n)]
        case "extreme":
            a = 10.0 ** draw.integer(50, 250)
            parts = [rng.standard_normal((n, n)) * x for x in (1 / a, 1 / a, a, a)][draw.integer(0, 2) :]
        case _:
            parts = [rng.standard_normal((n, n)), np.zeros((n, n)), rng.standard_normal((n, n))]
    stored = (
        torch.float32 if draw.chance(0.4) and max(np.abs(p).max() for p in parts) < 1e30 else torch.float64
    )
    tensors = [torch.from_numpy(np.ascontiguousarray(part)).to(stored) for part in parts]
    exact = _product([tensor.double().numpy() for tensor in tensors])
    with mpmath.workdps(DIGITS):
        if not 1e-290 < max(abs(x) for x in exact) + mpmath.mpf(1e-280) < 1e290:
            return None

    def build(working: torch.dtype) -> LinearMap:
        return Composed(*(MatrixMap(tensor, dtype=working) for tensor in tensors))

    return by_mpmath(f"product of {len(parts)} {n}×{n} {stored}", build, exact)


def sums(draw: Draw) -> Adversary | None:
    """x ↦ Ax + (−A + εB)x: nothing but ε·B is left."""
    n, rng = draw.integer(2, 6), draw.rng()
    a, b = rng.standard_normal((n, n)), rng.standard_normal((n, n))
    stored = draw.choice((torch.float32, torch.float64))
    # Below the ulp of A nothing of B is left in the weights.
    size = 10.0 ** -draw.integer(0, 7 if stored == torch.float32 else 14)
    first, second = torch.from_numpy(a).to(stored), torch.from_numpy(-a + size * b).to(stored)
    stuck = draw.chance(0.3)

    def make(working: torch.dtype, device: object = None) -> object:
        one, two = first.to(working), second.to(working)
        return lambda x: x @ one.T + x @ two.T

    def build(working: torch.dtype) -> LinearMap:
        working = stored if stuck else working
        if stored == torch.float64:
            working = torch.float64  # a cast of the weights would be another operator
        return FunctionMap(make(working), (n,), dtype=working, remake=None if stuck else make)

    with mpmath.workdps(DIGITS):
        exact = precise(first) + precise(second)
    return by_mpmath(f"sum that cancels to {size:.0e}, {stored}, stuck {stuck}", build, exact)


def separables(draw: Draw) -> Adversary | None:
    """Differences behind averages, axis by axis."""
    n, rng = draw.integer(2, 6), draw.rng()
    smooth = np.full((n, n), 1.0 / 16) + 10.0 ** -draw.integer(1, 16) * rng.standard_normal((n, n))
    rough = np.eye(n) - np.eye(n, k=1)
    rough[-1, 0] = -1.0
    factors = [torch.from_numpy(part) for part in (rough, smooth)]
    channels = draw.integer(1, 3)

    def build(working: torch.dtype) -> LinearMap:
        return Composed(*(SeparableMap(channels, (factor,), dtype=working) for factor in factors))

    one = by_mpmath("", build, _product([rough, smooth]))
    return exactly(f"separable of {n}, {channels} channels", build, np.repeat(one.sigma, channels), ulps=1.0)


def chains(draw: Draw) -> Adversary | None:
    """1×1 convolutions and batch norms whose scales undo the kernels': variances of 1e-30, γ of either sign or 0."""
    n, channels, rng = draw.integer(1, 4), draw.integer(1, 5), draw.rng()
    power = draw.integer(0, 15)
    gamma = rng.choice([1.0, -1.0, 0.0, 1e-3], channels)
    scale = gamma * 10.0 ** (power * rng.choice([1.0, 0.0, -1.0], channels))
    with np.errstate(divide="ignore"):
        weight = rng.standard_normal((channels, channels)) / np.where(scale == 0, 1.0, scale)[:, None]
    after = rng.standard_normal((channels, channels))
    tensors = [torch.from_numpy(x) for x in (after, scale, weight)]
    shape, plain = (channels, n, n), ConvGeometry.plain(2)
    folded = draw.chance(0.5)

    def build(working: torch.dtype) -> LinearMap:
        first = ConvMap(tensors[2][:, :, None, None], shape, plain, dtype=working)
        norm = DiagonalMap(tensors[1], shape, dtype=working)
        last = ConvMap(tensors[0][:, :, None, None], shape, plain, dtype=working)
        return Composed(norm, first) if folded else Composed(last, norm, first)

    matrices = [np.diag(scale), weight] if folded else [after, np.diag(scale), weight]
    one = by_mpmath("", build, _product(matrices))
    return exactly(f"1×1 chain, scales 1e±{power}", build, np.repeat(one.sigma, n * n), ulps=1.0)


FAMILIES = (products, sums, separables, chains)
