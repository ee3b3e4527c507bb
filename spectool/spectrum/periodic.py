"""The symbol on a finite grid: exact for a circulant, a proven bound for a zero-padded convolution.

On a periodic grid the DFT makes a convolution block diagonal, one symbol H(2πf/M) per frequency. A zero-padded
convolution with n inputs, m outputs, k taps, stride s and p leading zeros is a compression of the periodic one of
any period N = s·M that keeps what it reads apart,

    N ≥ n + p   and   N ≥ s(m−1) − p + k,

because no position outside [0, n) is then identified with one inside; so its i-th singular value is at most the
periodic one's, for every i.

**Source:** for stride 1 and circular padding H. Sedghi, V. Gupta, P. M. Long, "The singular values of
convolutional layers", ICLR 2019; polyphase components as in filter banks; the compression is interlacing.
"""

from __future__ import annotations

from math import pi, prod

import numpy as np
import torch
from torch import Tensor

from spectool.spectrum.levels import Floats, Levels, keep, union
from spectool.spectrum.stencil import Stencil
from spectool.spectrum.symbol import LARGE_SIDE, Polynomial, frequency_work, polynomial

_CHUNK_BYTES = 1 << 26
_FIRST = 2048  # divided by the side: frequencies whose eigenvalues set the first level for the tests


def grid_levels(symbol: Polynomial, grid: tuple[int, ...], k: int) -> Levels:
    """Return the k largest singular values of the periodic operator with M = ``grid`` frequencies per axis.

    Real coefficients give f and −f the same values: half the frequencies are evaluated. Where H is large, a
    Cholesky test against the k-th largest value found so far spares most of the eigenvalue problems.
    """
    theta, count = _half_grid(grid)
    groups = symbol.groups
    place = torch.arange(len(theta) * groups)
    # Any beginning of this order is spread over the grid, so that the first level is a good one.
    order = torch.argsort((place.double() * 0.6180339887498949) % 1.0)
    bytes_each = 48 * max(prod(symbol.coefficients.shape[2:]), symbol.side**2)
    if symbol.groups > 1:
        bytes_each += 8 * symbol.coefficients[0].numel()
    most = max(1, _CHUNK_BYTES // bytes_each)
    tested = symbol.side >= LARGE_SIDE
    found, start, step = Levels.nothing(), 0, min(most, max(4, _FIRST // symbol.side)) if tested else most
    while start < len(order):
        chosen = order[start : start + step]
        start, step = start + step, min(most, 2 * step)
        at, group = chosen // groups, chosen % groups
        level = found.kth_lower(k)
        if tested and level > 0:
            still = ~symbol.below(theta[at], group, level)
            at, group = at[still], group[still]
        if len(at):
            values, lower, upper = symbol.values(theta[at], group)
            counts = count[at][:, None].expand(values.shape)
            found = keep(union([found, _levels(values, lower, upper, counts)]), k)
    return found


def _levels(values: Tensor, lower: Tensor, upper: Tensor, counts: Tensor) -> Levels:
    flat = values.flatten().numpy()
    order = np.argsort(-flat, kind="stable")
    return Levels(
        flat[order],
        lower.flatten().numpy()[order],
        upper.flatten().numpy()[order],
        counts.flatten().numpy()[order],
    )


def _half_grid(grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return frequencies ``(F, D)`` in [−π, π] and how many of the full grid each stands for."""
    first = torch.arange(grid[0] // 2 + 1)
    axes = [first, *(torch.arange(size) for size in grid[1:])]
    indices = torch.cartesian_prod(*axes).reshape(-1, len(grid))
    sizes = torch.tensor(grid)
    # Integers until here: an int tensor times a float would be float32, and f/M is to be rounded only once.
    centred = torch.where(2 * indices > sizes, indices - sizes, indices)
    theta = centred.double() * (2 * pi) / sizes.double()
    twice = (indices[:, 0] > 0) & (2 * indices[:, 0] < grid[0])
    return theta, torch.where(twice, 2, 1)


def periods(part: Stencil, extra: int = 0) -> tuple[int, ...]:
    """Return the smallest valid M = N/s per axis, plus ``extra``."""
    return tuple(
        max(-(-(n + p) // s), -(-(s * (m - 1) - p + k) // s)) + extra
        for n, m, s, p, k in zip(part.sizes, part.outputs, part.stride, part.lead, part.kernel, strict=True)
    )


def symbol_levels(part: Stencil, k: int, *, tries: int = 1) -> Levels:
    """Return proven upper bounds for the k largest singular values of a zero-padded, undilated stencil.

    Only ``upper`` means something; the groups' bounds are listed together.

    Args:
        part: One of ``stencil.split``'s parts, with at least one axis left.
        k: How many.
        tries: How many valid periods to try; the smallest bound counts, entry by entry.
    """
    symbol = polynomial(part.weight, part.stride)
    bounds = [grid_levels(symbol, periods(part, extra), k).expand(k)[2] for extra in range(max(1, tries))]
    best = np.minimum.reduce(bounds)
    return Levels(best, np.zeros_like(best), best, np.ones(len(best), dtype=np.int64))


def symbol_work(part: Stencil) -> float:
    """Estimate the flops of ``symbol_levels`` with one period, from the shapes alone."""
    groups, out, channels = part.weight.shape[:3]
    taps = prod(-(-k // s) for k, s in zip(part.kernel, part.stride, strict=True))
    phases = prod(min(k, s) for k, s in zip(part.kernel, part.stride, strict=True))
    return frequency_work(groups, out, channels * phases, taps) * prod(periods(part)) / 2


def group_bounds(part: Stencil) -> Floats:
    """Return a proven bound on σ₁ of every group ``(groups,)``, from the symbol at one period."""
    symbol = polynomial(part.weight, part.stride)
    theta, _ = _half_grid(periods(part))
    bounds = np.zeros(symbol.groups)
    step = max(1, _CHUNK_BYTES // (48 * prod(symbol.coefficients.shape[1:])))
    for index in range(symbol.groups):
        for start in range(0, len(theta), step):
            some = theta[start : start + step]
            upper = symbol.values(some, torch.full((len(some),), index))[2]
            bounds[index] = max(bounds[index], float(upper[:, 0].max()))
    return bounds
