"""Lists of enclosed singular values with repeats, and how independent problems are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EPS = float(np.finfo(np.float64).eps)

TINY = float(np.finfo(np.float64).smallest_subnormal)

EQUAL = 1e-10
"""Relative distance below which two exactly computed singular values count as equal."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Levels:
    """The largest singular values of one operator, repeats counted instead of listed.

    What is not listed lies below the last entry. ``values`` descend; so do the others once ``expand`` made a
    list of them.

    Attributes:
        values: Estimates ``(r,)``.
        lower: Proven lower ends ``(r,)``.
        upper: Proven upper ends ``(r,)``.
        count: How often each occurs ``(r,)``.
    """

    values: Floats
    lower: Floats
    upper: Floats
    count: Counts

    @staticmethod
    def around(values: Floats, error: Floats | float, count: Counts | int = 1) -> Levels:
        """Enclose ``values`` by ∓ ``error`` and sort them."""
        values = np.asarray(values, dtype=np.float64).reshape(-1)
        spread = np.broadcast_to(np.asarray(error, dtype=np.float64), values.shape)
        counts = np.broadcast_to(np.asarray(count, dtype=np.int64), values.shape)
        order = np.argsort(-values, kind="stable")
        values, spread, counts = values[order], spread[order], counts[order]
        return Levels(values, np.maximum(values - spread, 0.0), values + spread, counts)

    @staticmethod
    def nothing() -> Levels:
        """Return the empty list: an operator without nonzero singular values."""
        return Levels.around(np.zeros(0), 0.0)

    def repeated(self, count: int) -> Levels:
        """Return the same values, each ``count`` times as often."""
        return Levels(self.values, self.lower, self.upper, self.count * count)

    def scaled(self, factor: float) -> Levels:
        """Return the levels of factor·A, factor > 0."""
        return Levels(self.values * factor, self.lower * factor, self.upper * factor, self.count)

    def top(self, k: int) -> Levels:
        """Drop what lies below the k largest."""
        enough = int(np.searchsorted(np.cumsum(self.count), k)) + 1
        return Levels(self.values[:enough], self.lower[:enough], self.upper[:enough], self.count[:enough])

    def multiplicity(self) -> int:
        """Return how many of the listed values equal the largest as far as float64 can tell.

        Values within 1e-10 count, unless their intervals prove them smaller. Where intervals are too wide to tell,
        only the repeats of the largest itself count.
        """
        if not len(self.values):
            return 0
        if not self.resolved():
            return int(self.count[self.values.argmax()])
        equal = (self.values >= self.values[0] * (1 - EQUAL)) & (self.upper >= self.lower.max())
        return int(self.count[equal].sum())

    def resolved(self) -> bool:
        """Return whether the largest value is known well enough to say which others equal it."""
        if not len(self.values):
            return True
        top = int(self.values.argmax())
        return bool(self.upper[top] - self.lower[top] <= 2 * EQUAL * self.values[top])

    def kth_lower(self, k: int) -> float:
        """Return a lower bound on the k-th largest singular value; 0 if fewer are listed."""
        order = np.argsort(-self.lower, kind="stable")
        reached = np.cumsum(self.count[order])
        place = int(np.searchsorted(reached, k))
        return float(self.lower[order][place]) if place < len(order) else 0.0

    def expand(self, k: int) -> tuple[Floats, Floats, Floats]:
        """Return ``values, lower, upper`` of the k largest, repeats listed, zeros where the list ends.

        The i-th largest of the lower ends bounds σ_i from below, the i-th largest upper end from above: each of
        the three lists is sorted by itself.
        """
        lists = []
        for entries in (self.values, self.lower, self.upper):
            order = np.argsort(-entries, kind="stable")
            counts = np.minimum(self.count[order], k)
            # Counts can be millions of positions; only k entries are ever listed.
            needed = int(np.searchsorted(np.cumsum(counts), k)) + 1
            listed = np.repeat(entries[order][:needed], counts[:needed])[:k]
            lists.append(np.concatenate([listed, np.zeros(k - len(listed))]))
        return lists[0], lists[1], lists[2]


def union(parts: Sequence[Levels]) -> Levels:
    """Return the levels of a block-diagonal operator from those of its blocks.

    If every block lists its k largest, the union's k largest are right: what a block leaves out lies below k
    entries of its own.
    """
    if not parts:
        return Levels.nothing()
    values = np.concatenate([part.values for part in parts])
    order = np.argsort(-values, kind="stable")

    def joined(name: str) -> NDArray[np.generic]:
        merged: NDArray[np.generic] = np.concatenate([getattr(part, name) for part in parts])[order]
        return merged

    lower, upper = joined("lower").astype(np.float64), joined("upper").astype(np.float64)
    return Levels(values[order], lower, upper, joined("count").astype(np.int64))


def products(factors: Sequence[Levels], k: int) -> Levels:
    """Return the k largest levels of a Kronecker product, multiplicities multiplied.

    Each step keeps the k largest of the partial product: a product that is among the k largest uses a partial
    product that is.
    """
    result = Levels.around(np.ones(1), 0.0)
    for factor in factors:

        def outer(name: str, result: Levels = result, factor: Levels = factor) -> Floats:
            return np.outer(getattr(result, name), getattr(factor, name)).reshape(-1)

        values = outer("values")
        order = np.argsort(-values, kind="stable")
        upper, lower = outer("upper")[order] * (1 + 2 * EPS), outer("lower")[order] * (1 - 2 * EPS)
        positive = np.outer(result.upper > 0, factor.upper > 0).reshape(-1)[order]
        upper, lower = upper + positive * TINY, np.maximum(lower - TINY, 0.0)  # products may underflow
        count = np.outer(result.count, factor.count).reshape(-1)[order]
        result = keep(Levels(values[order], lower, upper, count), k)
    return result


def keep(levels: Levels, k: int) -> Levels:
    """Keep what can be among the k largest, and every value equal to the last of them."""
    threshold = levels.kth_lower(k)
    keep = levels.upper >= threshold
    return Levels(levels.values[keep], levels.lower[keep], levels.upper[keep], levels.count[keep])
