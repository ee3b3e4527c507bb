"""Matrices with exactly known values, and small ones whose values mpmath knows."""

from __future__ import annotations

import numpy as np
import torch
from dense import Matrix

from adversaries.base import TYPES, Adversary, Draw, by_mpmath, by_numpy, exactly, precise
from adversaries.spectra import SCALES, dyadic, spectrum
from spectool.linear import FunctionMap, LinearMap, MatrixMap


def as_map(weight: torch.Tensor, kind: str, dtype: torch.dtype) -> LinearMap:
    """A matrix as it is, or as a function that can or cannot go over to float64."""
    if kind == "matrix":
        return MatrixMap(weight, dtype=dtype)

    def make(working: torch.dtype, device: object = None) -> object:
        copy = weight.to(working)
        return lambda x: x @ copy.T

    remake = make if kind == "function" else None
    return FunctionMap(make(dtype), (weight.shape[1],), dtype=dtype, remake=remake)


def _kind(draw: Draw, weight: torch.Tensor) -> str:
    # A function without ``remake`` would have its float64 weight cast: another operator.
    return draw.choice(
        ("matrix", "matrix", "function", "stuck") if weight.dtype == torch.float32 else ("matrix",)
    )


def _scaled(draw: Draw, values: Matrix, dtype: torch.dtype) -> torch.Tensor | None:
    with np.errstate(over="ignore"):
        weight = torch.from_numpy(np.ldexp(values, draw.choice(SCALES))).to(dtype)
    return weight if bool(torch.isfinite(weight).all()) else None


def permuted(draw: Draw) -> Adversary | None:
    """A diagonal with rows and columns permuted and padded: σ are the stored entries themselves."""
    n = draw.choice((2, 5, 12, 40, 90, 150, 260))
    dtype = draw.choice(TYPES)
    values = _scaled(draw, spectrum(draw, n), dtype)
    if values is None:
        return None
    rng = draw.rng()
    m = n + draw.choice((0, 0, 1, 30))
    weight = torch.zeros(m, n, dtype=dtype)
    weight[torch.from_numpy(rng.permutation(m)[:n]), torch.from_numpy(rng.permutation(n))] = (
        values * torch.from_numpy(rng.choice([1.0, -1.0], n)).to(dtype)
    )
    weight = weight.T.contiguous() if draw.chance(0.5) else weight
    kind = _kind(draw, weight)
    sigma = values.double().numpy()
    return exactly(
        f"permuted diagonal {m}×{n} {dtype} as {kind}",
        lambda working: as_map(weight, kind, working),
        sigma,
        matrix=weight.double().numpy() if 1e-100 < sigma.max() < 1e100 else None,
    )


def hadamard(draw: Draw) -> Adversary | None:
    """2^-2j·H·D·H with the Hadamard matrix of order 4^j: dense, and exact for values of few bits."""
    j = draw.choice((1, 2, 3))
    n = 4**j
    values = dyadic(spectrum(draw, n), draw.choice((10, 20, 38)))
    h = np.ones((1, 1))
    for _ in range(2 * j):
        h = np.kron(h, np.array([[1.0, 1.0], [1.0, -1.0]]))
    rng = draw.rng()
    left, right = h[rng.permutation(n)] * 2.0**-j, h[:, rng.permutation(n)] * 2.0**-j
    exponent = draw.choice((0, 0, -300, 300, -1000, 990))
    weight = torch.from_numpy(np.ldexp((left * values) @ right, exponent))
    return exactly(
        f"Hadamard {n} times 2^{exponent}",
        lambda working: MatrixMap(weight, dtype=working),
        np.ldexp(values, exponent),
        matrix=weight.numpy() if abs(exponent) <= 300 else None,
    )


def rotations(draw: Draw) -> Adversary | None:
    """Pairs turned by (3, 4)/5 and (5, 12)/13 on both sides, without the denominators: σ = 65·d exactly."""
    n = draw.choice((4, 20, 60, 130))
    values = dyadic(spectrum(draw, n), 30)
    first, second = np.array([[3.0, -4.0], [4.0, 3.0]]), np.array([[5.0, -12.0], [12.0, 5.0]])
    rng = draw.rng()
    left, right = np.kron(np.eye(n // 2), first), np.kron(np.eye(n // 2), second)
    weight = torch.from_numpy((left * values[rng.permutation(n)]) @ right[rng.permutation(n)])
    return exactly(
        f"Pythagorean rotations {n}",
        lambda working: MatrixMap(weight, dtype=working),
        65.0 * values,
        matrix=weight.numpy(),
    )


def small(draw: Draw) -> Adversary | None:
    """Anything of a few rows, with gradings and non-normality that float64's own SVD gets wrong."""
    m, n = draw.integer(1, 7), draw.integer(1, 7)
    rng, dtype = draw.rng(), draw.choice(TYPES)
    values = rng.standard_normal((m, n))
    match draw.choice(
        ("rows", "both", "nilpotent", "companion", "zeros", "rank", "signs", "pascal", "plain")
    ):
        case "rows":
            values *= np.logspace(0, -draw.choice((6, 20, 40)), m)[:, None]
        case "both":
            values *= np.logspace(0, -draw.choice((6, 20)), m)[:, None] * np.logspace(
                0, -draw.choice((6, 20)), n
            )
        case "nilpotent":
            values = np.triu(values * 10.0 ** draw.integer(0, 8), 1)
        case "companion":
            values = np.eye(m, n, 1) + 1e8 * (np.arange(m)[:, None] == m - 1) * values
        case "zeros":
            values[rng.random(m) < 0.4] = 0.0
            values[:, rng.random(n) < 0.4] = 0.0
        case "rank":
            values = np.outer(values[:, 0], values[0]) + draw.choice((0.0, 1e-8, 1e-15)) * values
        case "signs":
            values = np.sign(values)
        case "pascal":
            values = np.array(
                [
                    [
                        float(np.prod(np.arange(i + 1, i + j + 1)) / max(1, np.prod(np.arange(1, j + 1))))
                        for j in range(n)
                    ]
                    for i in range(m)
                ]
            )
    weight = _scaled(draw, values, dtype)
    if weight is None:
        return None
    kind = _kind(draw, weight)
    return by_mpmath(
        f"small {m}×{n} {dtype} as {kind}", lambda working: as_map(weight, kind, working), precise(weight)
    )


def blocks(draw: Draw) -> Adversary | None:
    """A tiny block that holds σ₁, or nearly, hidden among others: no row or column of one reads another's."""
    rng = draw.rng()
    sizes = [(draw.integer(1, 4), draw.integer(1, 4)) for _ in range(draw.integer(1, 3))]
    sizes.append((draw.choice((5, 40, 120)), draw.choice((5, 40, 120))))
    parts = [rng.standard_normal(size) for size in sizes]
    for i in range(len(parts) - 1):
        factor = 1.0 + draw.choice((1.0, 1e-2, 1e-5, 1e-8, -1e-8, -1e-3))
        parts[i] *= np.linalg.norm(parts[-1], 2) / np.linalg.norm(parts[i], 2) * factor
    weight = torch.zeros(sum(s[0] for s in sizes), sum(s[1] for s in sizes), dtype=torch.float64)
    rows, columns = (rng.permutation(size) for size in weight.shape)
    down = across = 0
    for part in parts:
        at = np.ix_(rows[down : down + part.shape[0]], columns[across : across + part.shape[1]])
        weight[at] = torch.from_numpy(part)
        down, across = down + part.shape[0], across + part.shape[1]
    return by_numpy(
        f"blocks {sizes}",
        lambda working: MatrixMap(weight, dtype=working),
        [*parts, np.zeros((max(0, min(weight.shape) - sum(min(s) for s in sizes)),) * 2)],
        matrix=weight.numpy(),
    )


FAMILIES = (permuted, hadamard, rotations, small, blocks)
