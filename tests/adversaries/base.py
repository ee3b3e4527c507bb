"""What an adversary is, and where its decisions come from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import mpmath
import numpy as np
import torch
from dense import Matrix

from spectool.linear import InfiniteConv, LinearMap

T = TypeVar("T")
EPS = 2.0**-52
DIGITS = 120  # of mpmath's arithmetic: gradings over 60 decades, squared by nobody
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Draw:
    """Decisions as numbers in [0, 1): given ones first, random ones after; ``taken`` replays or mutates them."""

    def __init__(self, given: Sequence[float] = (), seed: int = 0) -> None:
        self._given, self._rest = list(given), random.Random(seed)
        self.taken: list[float] = []

    def unit(self) -> float:
        place = len(self.taken)
        self.taken.append(self._given[place] if place < len(self._given) else self._rest.random())
        return self.taken[-1]

    def choice(self, options: Sequence[T]) -> T:
        return options[min(int(self.unit() * len(options)), len(options) - 1)]

    def integer(self, low: int, high: int) -> int:
        return low + min(int(self.unit() * (high - low + 1)), high - low)

    def chance(self, share: float) -> bool:
        return self.unit() < share

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.integer(0, 1 << 20))


@dataclass(frozen=True)
class Adversary:
    """An operator and its true singular values.

    Attributes:
        text: What it is.
        build: Makes the map for an arithmetic type.
        sigma: All min(m, n) values, descending.
        low: Below the true values, by what the truth itself may be off.
        high: Above them.
        matrix: Dense matrix, where float64 holds it well.
        iterate: Whether the slow methods are worth trying on it.
    """

    text: str
    build: Callable[[torch.dtype], LinearMap | InfiniteConv]
    sigma: Matrix
    low: Matrix
    high: Matrix
    matrix: Matrix | None = field(default=None, repr=False)
    iterate: bool = True

    def __repr__(self) -> str:
        return self.text


def exactly(text: str, build: Callable[[torch.dtype], LinearMap], sigma: Matrix, **more: object) -> Adversary:
    """An operator whose values are known to the last bit (or to ``ulps`` of each)."""
    ulps = float(more.pop("ulps", 0.0))
    sigma = np.sort(np.asarray(sigma, dtype=np.float64))[::-1]
    return Adversary(text, build, sigma, sigma * (1 - ulps * EPS), sigma * (1 + ulps * EPS), **more)


def by_numpy(
    text: str, build: Callable[[torch.dtype], LinearMap], blocks: Sequence[Matrix], **more: object
) -> Adversary:
    """A block-diagonal operator: each block's values by numpy, each with its block's own rounding, 1e-12."""
    ends: list[list[Matrix]] = [[], [], []]
    for block in blocks:
        peak = float(np.abs(block).max(initial=0.0))
        exponent = int(np.frexp(peak)[1]) if peak else 0
        found = np.linalg.svd(np.ldexp(block, -exponent), compute_uv=False)
        error = 1e-12 * found.max(initial=0.0)
        for end, values in zip(ends, (found, np.maximum(found - error, 0), found + error), strict=True):
            with np.errstate(over="ignore"):
                end.append(np.ldexp(values, exponent))
    # The i-th largest of all lower ends is below the i-th largest value, whichever block that is from.
    sigma, low, high = (np.sort(np.concatenate(end))[::-1] for end in ends)
    return Adversary(text, build, sigma, np.maximum(low - 1e-322, 0), high + 1e-322, **more)


def by_mpmath(text: str, build: Callable[[torch.dtype], LinearMap], matrix: mpmath.matrix) -> Adversary:
    """A small operator whose exact matrix is given; its values with 120 digits, rounded once."""
    with mpmath.workdps(DIGITS):
        sigma = np.array([float(value) for value in mpmath.svd_r(matrix, compute_uv=False)])
    return exactly(text, build, sigma, ulps=1.0)


def precise(matrix: Matrix | torch.Tensor) -> mpmath.matrix:
    """The same numbers in mpmath."""
    rows = matrix.double().tolist() if isinstance(matrix, torch.Tensor) else matrix.tolist()
    with mpmath.workdps(DIGITS):
        return mpmath.matrix(rows)


def working(draw: Draw) -> torch.dtype:
    return draw.choice((torch.float32, torch.float64))
