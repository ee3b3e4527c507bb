"""The last step of every iterative solver: one Rayleigh–Ritz step in float64 with explicit residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spectool.spectrum.gram import wide
from spectool.spectrum.rounding import SAFETY, USUAL, is_hidden, noise, rounding_unit, sample_span

if TYPE_CHECKING:
    from spectool.spectrum.gram import Gram


PROMISE = 1e-6
"""Accuracy that is promised, relative to σ₁; what is smaller than this is as good as zero."""

_CHUNK = 1 << 15
"""Columns that are turned at a time."""


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
        accuracy: What is to be expected of that error; the bound itself where the arithmetic can be seen.
        noise: Part of ``rounding`` that a function's own arithmetic caused; 0 where that can be seen.
    """

    values: torch.Tensor
    right: torch.Tensor
    left: torch.Tensor
    remainder: torch.Tensor
    defect: torch.Tensor
    rounding: float
    accuracy: float
    noise: float


def polish(gram: Gram, vectors: torch.Tensor) -> Pairs:
    """Rotate ``vectors`` into singular vectors of M restricted to their span, and measure what is missing.

    Costs 2p matvecs in float64 (in the map's own type where it cannot change), for a function 8 more. Adds no
    direction: the span, and so any bound on its complement, stays.

    Args:
        gram: The operator in its highest precision (``Gram.double``).
        vectors: Linearly independent rows ``(p, size)``.
    """
    hidden = is_hidden(gram)
    basis = torch.linalg.qr(wide(vectors).to(gram.device).T).Q.T
    image = wide(gram.forward(basis))
    sample = sample_span(gram, basis, image, gram.forward) if hidden else 0.0
    # QR first: its Q is orthonormal even where M maps a vector to zero, which an SVD of the image alone is not
    # bound to be; the left vectors of zero singular values then really are orthogonal to the others.
    q, r = torch.linalg.qr(image.T)
    u, values, wt = torch.linalg.svd(r)
    left = _turned(q.T, u.T[: len(values)])
    defect = _distances(wt, image, values, left)
    del q, image  # on a large map every one of these is what memory is needed for
    right = _turned(basis, wt)
    back = wide(gram.backward(left))
    if hidden:
        sample = max(sample, sample_span(gram, left, back, gram.backward))
    remainder = torch.addcmul(back, values[:, None], right, value=-1.0)
    del back
    scale = float(values[0]) if len(values) else 0.0
    # One application for the image, one for the remainder, and O(p) rotations in float64.
    own = 16.0 * len(values) * torch.finfo(torch.float64).eps * scale
    if hidden:
        seen = SAFETY * sample
        # A sample holds the errors of p vectors and of a mixture as long as all of them.
        accuracy = own + USUAL * sample / math.sqrt(2.0 * len(values))
        rounding = rounding_unit(gram) * scale + own + seen
        return Pairs(values, right, left, remainder, defect, rounding, accuracy, seen)
    rounding = rounding_unit(gram) * scale + own + noise(gram)
    return Pairs(values, right, left, remainder, defect, rounding, rounding, 0.0)


def _turned(rows: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Return turn · rows, written over ``rows``."""
    for begin in range(0, rows.shape[1], _CHUNK):
        part = rows[:, begin : begin + _CHUNK]
        part[: len(turn)] = turn @ part
    return rows[: len(turn)]


def _distances(
    turn: torch.Tensor, image: torch.Tensor, values: torch.Tensor, left: torch.Tensor
) -> torch.Tensor:
    """Return the norms of the rows of turn · image − values · left."""
    squares = torch.zeros_like(values)
    for begin in range(0, image.shape[1], _CHUNK):
        part = slice(begin, begin + _CHUNK)
        squares += (turn @ image[:, part] - values[:, None] * left[:, part]).square().sum(dim=1)
    return squares.sqrt()
