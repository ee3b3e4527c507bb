"""A bound for every input size: the supremum of the symbol over all frequencies, enclosed by branch and bound.

For unit vectors u, v the real part of uᴴH(θ)v, its taps centred, is along each axis a function of exponential
type d = (Q−1)/2 bounded by S = sup ‖H‖. By the Bernstein–Szegő inequality f′² + d²f² ≤ d²S², so arccos(f/S)
changes by at most d per unit of θ: from the maximum, where it is 0, to the centre of the cell (half-widths h_a)
that holds the maximum it grows to at most φ = Σ_a d_a·h_a. Hence

    σ(centre) ≥ S·cos φ   in the cell that holds the maximum, if φ < π/2.

It says nothing about other cells ([1, −1] has σ(0) = 0). A cell with σ(centre)/cos φ below the best value found
cannot hold the maximum; the largest σ(centre)/cos φ of the others is a bound on S.

For a *uniform* grid the maximum over all centres obeys the sharper S ≤ max σ / Π_a cos(d_a·h_a), by going to the
grid one axis at a time; it is used for the first grid.

**Source:** R. J. Duffin, A. C. Schaeffer, "Some properties of functions of exponential type", Bull. AMS 44 (1938).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import gcd, pi, prod

import torch
from torch import Tensor

from spectool.errors import OperatorError, UsageError
from spectool.linear import ConvGeometry, InfiniteConv
from spectool.spectrum.levels import EPS
from spectool.spectrum.symbol import LARGE_SIDE, Polynomial, frequency_work, polynomial
from spectool.spectrum.types import Spectrum

_EFFORT = 6e10  # flops, about four seconds of one core
_CHUNK_BYTES = 1 << 26
_FIRST_ANGLE = 0.55  # φ of a cell of the first grid, where the effort allows it
_FEWEST = 4.0  # samples per turn of the fastest wave, at least
_ROUND = 512  # cells refined at once


@dataclass(frozen=True)
class Enclosure:
    """lower ≤ sup ‖H‖ ≤ upper.

    Attributes:
        lower: The largest value found, rounded down.
        best: The largest value found.
        upper: The proven bound.
        evaluations: Frequencies that were judged.
        tight: Whether the tolerance was met within the effort.
    """

    lower: float
    best: float
    upper: float
    evaluations: int
    tight: bool


def supremum(conv: InfiniteConv, *, tol: float = 1e-6) -> Spectrum:
    """Return σ₁ of a convolution on the infinite grid: k = 1, enclosed.

    ``values`` and ``lower`` come from the best frequency found, ``upper`` from the branch and bound. ``upper``
    holds for the convolution at every input size with this stride and any zero padding (with stride 1 here: for
    every stride and dilation); ``lower`` only for the infinite grid. Costs no matvecs. Stops at about four
    seconds of one core with whatever interval it has.

    Args:
        conv: The convolution; with an unknown stride give stride 1.
        tol: Relative width of the interval at which to stop.

    Raises:
        UsageError: If ``tol`` is not between 0 and 1.
        OperatorError: If weights are NaN or infinite.
    """
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
        raise UsageError(f"tol must be between 0 and 1, got {tol!r}")
    bad = int((~torch.isfinite(conv.weight)).sum())
    if bad:
        raise OperatorError(f"{bad} of {conv.weight.numel()} weights are NaN or infinite")
    found = enclose_supremum(conv.weight, conv.geometry, tol=tol)
    return Spectrum(
        values=(found.best,),
        lower=(found.lower,),
        upper=(found.upper,),
        upper_kind="symbol-any-size",
        residuals=(),
        multiplicity=1,
        multiplicity_exact=False,
        converged=found.tight,
        matvecs=0,
        method="symbol",
        seed=0,
        why="the input size is unknown: supremum of the symbol on the infinite grid",
        note="" if found.tight else f"stopped after {found.evaluations} frequencies",
    )


def any_size(weight: Tensor, geometry: ConvGeometry, *, tol: float = 1e-4) -> float:
    """Return a proven bound on σ₁ of a convolution for every input size and zero padding.

    Args:
        weight: In torch's layout; transposed as ``geometry`` says.
        geometry: Stride, dilation and groups are used; padding means nothing here.
        tol: Relative slack at which refining stops.
    """
    return enclose_supremum(weight, geometry, tol=tol).upper


def enclose_supremum(weight: Tensor, geometry: ConvGeometry, *, tol: float, effort: float = _EFFORT) -> Enclosure:
    """Return an enclosure of sup ‖H(θ)‖ over all groups.

    Stride and dilation are first divided by their greatest common divisor; what dilation then remains only
    reorders positions. The symbol is that of the conv even if ``geometry`` is transposed.
    """
    scale = float(weight.detach().abs().max()) if weight.numel() else 0.0
    if scale == 0.0:
        return Enclosure(0.0, 0.0, 0.0, 0, True)
    stride = [s // gcd(s, d) for s, d in zip(geometry.stride, geometry.dilation, strict=True)]
    grouped = weight.detach().cpu().double().unflatten(0, (geometry.groups, -1)) / scale  # type: ignore[no-untyped-call]
    found = _search(polynomial(_trimmed(grouped), stride), tol, effort)
    lower, upper = found.lower * scale * (1 - 2 * EPS), found.upper * scale * (1 + 2 * EPS)
    return Enclosure(lower, found.best * scale, upper, found.evaluations, found.tight)


def _trimmed(weight: Tensor) -> Tensor:
    """Drop outer taps that are all zero: they would raise the degree for nothing."""
    for axis in range(3, weight.ndim):
        used = (weight.transpose(0, axis) != 0).flatten(1).any(dim=1).nonzero()
        weight = weight.narrow(axis, int(used[0]), int(used[-1] - used[0]) + 1)
    return weight


# --- branch and bound ---------------------------------------------------------------------------------------


@dataclass
class _Cells:
    """Cells still in question: ``group (n,)``, ``centre (n, D)``, ``half (n, D)``, ``bound (n,)``."""

    group: Tensor
    centre: Tensor
    half: Tensor
    bound: Tensor

    def take(self, index: Tensor) -> _Cells:
        return _Cells(self.group[index], self.centre[index], self.half[index], self.bound[index])


def _search(symbol: Polynomial, tol: float, effort: float) -> Enclosure:
    """Refine cells until the bound of every one is within ``tol`` of the best value, or the effort is spent."""
    degree = torch.tensor(symbol.degree, dtype=torch.float64)
    _, _, out, channels = symbol.coefficients.shape
    work = frequency_work(1, out, channels, prod(symbol.taps))
    budget = max(64.0, effort / work)
    counts = _first_grid(symbol.degree, budget / (3 * symbol.groups))
    cells = _initial(symbol.groups, counts)
    best, lower, spent = 0.0, 0.0, 0
    settled = 0.0  # largest bound of cells that are good enough
    ceiling = float((symbol.norms + symbol.rounding).max())
    first = True
    while len(cells.group):
        value, low, high = _judge(symbol, cells, lower * torch.cos(cells.half @ degree))
        spent += len(value)
        best, lower = max(best, float(value.max())), max(lower, float(low.max()))
        angle = cells.half @ degree * (1 + 4 * EPS)
        cells.bound = torch.where(angle < pi / 2, high / torch.cos(angle), math.inf).clamp_max(ceiling)
        if first:
            cosines = prod(math.cos(d * pi / c) for d, c in zip(symbol.degree, counts, strict=True))
            ceiling = min(ceiling, float(high.max()) / cosines * (1 + 8 * EPS))
            first = False
        if spent > budget:
            break
        target = lower * (1 + tol)
        good = cells.bound <= target
        if bool(good.any()):
            settled = max(settled, float(cells.bound[good].max()))
        cells = _halved(cells.take(~good), degree)
    open_ = float(cells.bound.max()) if len(cells.group) else 0.0
    upper = min(max(settled, open_, lower), ceiling)
    return Enclosure(lower, max(best, lower), max(upper, best), spent, upper <= lower * (1 + tol))


def _judge(symbol: Polynomial, cells: _Cells, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (value, lower, upper) of ‖H(centre)‖; where it is proven below ``level``, (0, 0, level)."""
    results = []
    each = 48 * max(prod(symbol.coefficients.shape[2:]), symbol.side**2)
    each += 8 * symbol.coefficients[0].numel() if symbol.groups > 1 else 0
    step = max(1, _CHUNK_BYTES // each)
    for start in range(0, len(cells.group), step):
        part = slice(start, start + step)
        theta, group, bar = cells.centre[part], cells.group[part], level[part]
        value, low, high = torch.zeros_like(bar), torch.zeros_like(bar), bar.clone()
        still = torch.ones_like(group, dtype=torch.bool)
        if symbol.side >= LARGE_SIDE and bool((bar > 0).all()):
            still = ~symbol.below(theta, group, bar)
        if bool(still.any()):
            triple = symbol.values(theta[still], group[still])
            value[still], low[still], high[still] = (entry[:, 0] for entry in triple)
        results.append((value, low, high))
    first, second, third = (torch.cat(column) for column in zip(*results, strict=True))
    return first, second, third


def _first_grid(degree: tuple[float, ...], most: float) -> list[int]:
    """Return cells per axis so that φ ≈ 0.55, fewer if half the product would exceed ``most``."""
    active = sum(d > 0 for d in degree)
    factor = 1.0
    while True:
        counts = [
            1 if d == 0 else max(math.ceil(_FEWEST * d) + 1, math.ceil(factor * d * active * pi / _FIRST_ANGLE))
            for d in degree
        ]
        if prod(counts) / 2 <= most or factor < 0.05:
            return counts
        factor *= 0.8


def _initial(groups: int, counts: list[int]) -> _Cells:
    """Cover half of the frequencies (σ(−θ) = σ(θ)) of every group by a uniform grid of centres 2πj/count."""
    first = next((a for a, count in enumerate(counts) if count > 1), 0)
    axes = [
        torch.arange(count // 2 + 1 if a == first else count, dtype=torch.float64) for a, count in enumerate(counts)
    ]
    spacing = torch.tensor([2 * pi / count for count in counts], dtype=torch.float64)
    centre = torch.cartesian_prod(*axes).reshape(-1, len(counts)) * spacing
    centre = torch.where(centre > pi, centre - 2 * pi, centre)
    # A hair wider than half the spacing: neighbours must overlap in spite of rounding.
    half = (spacing / 2 * (1 + 8 * EPS) + 8 * EPS).expand(len(centre), -1)
    group = torch.arange(groups).repeat_interleave(len(centre))
    return _Cells(group, centre.repeat(groups, 1), half.repeat(groups, 1), torch.full((len(group),), math.inf))


def _halved(cells: _Cells, degree: Tensor) -> _Cells:
    """Cut each cell in two along every axis that contributes at least half the largest d·h."""
    share = cells.half * degree
    for axis in range(cells.half.shape[1]):
        if not len(cells.group) or float(degree[axis]) == 0:
            continue
        wide = share[:, axis] >= 0.5 * share.amax(dim=1)
        kept, cut = cells.take(~wide), cells.take(wide)
        offset, half = torch.zeros_like(cut.half), cut.half.clone()
        offset[:, axis] = cut.half[:, axis] / 2
        half[:, axis] = cut.half[:, axis] / 2 * (1 + 8 * EPS) + 8 * EPS
        share = torch.cat([share[~wide], share[wide], share[wide]])
        cells = _Cells(
            torch.cat([kept.group, cut.group, cut.group]),
            torch.cat([kept.centre, cut.centre - offset, cut.centre + offset]),
            torch.cat([kept.half, half, half]),
            torch.cat([kept.bound, cut.bound, cut.bound]),
        )
    return cells
