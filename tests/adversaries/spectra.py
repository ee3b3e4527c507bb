"""Lists of singular values that solvers like least: gaps, clusters, copies, gradings, ends of the number range."""

from __future__ import annotations

import numpy as np
from dense import Matrix

from adversaries.base import Draw

SCALES = (0, 0, 0, -126, -140, -100, 60, 120, 127, -500, -1000, -1060, 500, 1000, 1020)
"""Powers of two by which a whole operator is multiplied."""


def spectrum(draw: Draw, n: int) -> Matrix:
    """n nonnegative values around 1, in no order."""
    k = draw.integer(1, min(20, n))
    gap = 10.0 ** -draw.choice((3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))
    rest = np.linspace(draw.choice((0.999, 0.95, 0.9, 0.5)), draw.choice((0.9, 0.1, 1e-3, 0.0)), n)
    match draw.choice(
        (
            "top gap",
            "gap at k",
            "cluster",
            "copies",
            "copies and gap",
            "graded",
            "decades",
            "few",
            "flat",
            "one",
            "edge",
        )
    ):
        case "top gap":
            rest[:2] = 1.0, 1.0 - gap
        case "gap at k":  # the k-th and the next nearly equal, the first well above
            rest = np.r_[np.linspace(2.0, 1.5, k), rest][:n]
            rest[min(k, n - 1)] = rest[min(k, n - 1) - 1] * (1.0 - gap)
        case "cluster":
            count = draw.integer(2, min(n, 40))
            rest[:count] = 1.0 - gap * np.arange(count)
        case "copies":
            rest[: draw.integer(2, min(n, 100))] = 1.0
        case "copies and gap":
            count = draw.integer(1, min(n, 40))
            rest[:count], rest[min(count, n - 1)] = 1.0, 1.0 - gap
        case "graded":
            rest = np.logspace(0, -draw.choice((6, 12, 20, 35, 60)), n)
        case "decades":
            rest = 10.0 ** -(np.arange(n) // draw.integer(1, 12)).astype(float)
        case "few":
            rest[k:] = 0.0
        case "flat":
            rest = 1.0 - draw.choice((1e-2, 1e-4, 1e-6)) * np.sort(draw.rng().random(n))
        case "one":
            rest = np.r_[1.0, np.full(n - 1, draw.choice((0.0, 1e-30, 1e-8, 1e-3, 0.999, 1 - 1e-6)))]
        case "edge":
            rest = 1.0 - np.linspace(0, 1, n) ** draw.choice((2, 4, 8))
    return np.maximum(rest, 0.0)


def dyadic(values: Matrix, bits: int) -> Matrix:
    """The values rounded to multiples of 2^-bits: sums of a few of them are exact."""
    return np.asarray(np.round(np.ldexp(values, bits)) * 2.0**-bits)
