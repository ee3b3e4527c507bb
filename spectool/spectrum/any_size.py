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
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from math import gcd, pi, prod

import torch
from torch import Tensor

from spectool.errors import OperatorError, UsageError
from spectool.linear import ConvGeometry, InfiniteConv
from spectool.linear.memory import enough_memory
from spectool.linear.scaling import check_real, count_not_finite, largest
from spectool.progress import Progress, Step, silent
from spectool.spectrum.levels import EPS
from spectool.spectrum.stencil import grouped
from spectool.spectrum.symbol import LARGE_SIDE, Polynomial, polynomial
from spectool.spectrum.types import Spectrum

_EFFORT = 1e11  # flops, a few seconds of one core
_OVERHEAD = 6000.0  # what a frequency takes beside its flops, as many of them
_TEST_WORK, _VALUE_WORK = 6.0, 35.0  # flops per side³ of a Cholesky test and of eigenvalues, as measured
_CHUNK_BYTES = 1 << 26
_MOST_CELLS = 1 << 17  # that are cut at a time
_FIRST_ANGLE = 0.5  # φ of a cell of the first grid where H is large; twice that where values are cheap
_FEWEST = 2.5  # samples per turn of the fastest wave, at least


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


@enough_memory()
def supremum(conv: InfiniteConv, *, tol: float = 1e-6, progress: Progress = silent) -> Spectrum:
    """Return σ₁ of a convolution on the infinite grid: k = 1, enclosed.

    ``values`` and ``lower`` come from the best frequency found, ``upper`` from the branch and bound. ``upper``
    holds for the convolution at every input size with this stride and any zero padding (with stride 1 here: for
    every stride and dilation); ``lower`` only for the infinite grid. Costs no matvecs. Stops after a few seconds
    of one core with whatever interval it has (1024 channels that are all alike: 30 %, most others 1e-6).

    Args:
        conv: The convolution; with an unknown stride give stride 1.
        tol: Relative width of the interval at which to stop.
        progress: Is told how many frequencies were judged, and the interval so far.

    Raises:
        UsageError: If ``tol`` is not between 0 and 1.
        OperatorError: If weights are NaN, infinite or complex, or σ₁ is beyond float64's range.

    Example:
        >>> found = supremum(InfiniteConv(torch.tensor([[[1.0, -1.0]]]), ConvGeometry.plain(1)))
        >>> round(found.lower[0], 5), round(found.upper[0], 5)
        (2.0, 2.0)
    """
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
        raise UsageError(f"tol must be between 0 and 1, got {tol!r}")
    check_real(conv.weight)
    bad = count_not_finite(conv.weight)
    if bad:
        raise OperatorError(f"{bad} of {conv.weight.numel()} weights are NaN or infinite")
    found = enclose_supremum(conv.weight, conv.geometry, tol=tol, progress=progress)
    if not math.isfinite(found.best):
        raise OperatorError(
            "the largest singular value is beyond float64's range", hint="look at its weights"
        )
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

    Example:
        >>> stride_two = ConvGeometry((2,), ((0, 0),), (1,))
        >>> round(any_size(torch.ones(1, 1, 2), stride_two) ** 2, 3)
        2.0
    """
    return enclose_supremum(weight, geometry, tol=tol).upper


def enclose_supremum(
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    tol: float,
    effort: float = _EFFORT,
    progress: Progress = silent,
) -> Enclosure:
    """Return an enclosure of sup ‖H(θ)‖ over all groups.

    Stride and dilation are first divided by their greatest common divisor; what dilation then remains only
    reorders positions. The symbol is that of the conv even if ``geometry`` is transposed.
    """
    scale = largest(weight)
    if scale == 0.0:
        return Enclosure(0.0, 0.0, 0.0, 0, True)
    stride = [s // gcd(s, d) for s, d in zip(geometry.stride, geometry.dilation, strict=True)]
    kernel = grouped(weight, geometry.groups).double() / scale

    def told(count: int, low: float, high: float) -> None:
        low, high = low * scale * (1 - 2 * EPS), high * scale * (1 + 2 * EPS)
        progress(Step("symbol", message=f"{count} frequencies, σ₁ in {_outward(low, high)}"))

    found = _search(polynomial(_trimmed(kernel), stride), tol, effort, told)
    lower, upper = found.lower * scale * (1 - 2 * EPS), found.upper * scale * (1 + 2 * EPS)
    if upper < sys.float_info.min:  # down there rounding is no longer relative
        lower, upper = max(0.0, math.nextafter(lower, 0.0)), math.nextafter(upper, math.inf)
    return Enclosure(lower, found.best * scale, upper, found.evaluations, found.tight)


def _outward(low: float, high: float) -> str:
    """Return an interval with four digits, which holds the one given."""
    down, up = Context(prec=4, rounding=ROUND_FLOOR), Context(prec=4, rounding=ROUND_CEILING)
    return f"[{down.create_decimal(Decimal(low)):g}, {up.create_decimal(Decimal(high)):g}]"


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


@dataclass
class _Search:
    """State of one search: the best value, what is proven, and the flops spent."""

    symbol: Polynomial
    told: Callable[[int, float, float], None]
    upper: float
    lower: float = 0.0
    best: float = 0.0
    evaluations: int = 0
    work: float = 0.0

    def judge(self, cells: _Cells, cosine: Tensor) -> Tensor:
        """Return a bound on σ(centre) of every cell, raising ``lower`` and ``best`` on the way.

        Small symbols: their values. Large ones: a Cholesky test proves σ < lower·cos φ (the cell is out), a
        second one σ < lower; only what passes neither can raise ``lower`` and costs its eigenvalues.
        """
        symbol, bounds = self.symbol, []
        tested = symbol.side >= LARGE_SIDE
        each = 48 * max(prod(symbol.coefficients.shape[2:]), symbol.side**2)
        each += 24 * symbol.coefficients[0].numel() if symbol.groups > 1 else 0
        # A few at first, so that ``lower`` is worth testing against; then as memory allows.
        start, step = 0, 4 if tested and not self.lower else max(1, _CHUNK_BYTES // each)
        while start < len(cells.group):
            part = slice(start, start + step)
            theta, group = cells.centre[part], cells.group[part]
            start, step = start + step, min(2 * step, max(1, _CHUNK_BYTES // each))
            bound = torch.full_like(theta[:, 0], self.lower)
            still = torch.ones_like(group, dtype=torch.bool)
            if tested and self.lower:
                out = symbol.below(theta, group, self.lower * cosine[part])
                bound[out] = self.lower * cosine[part][out]
                still = ~out
                if bool(still.any()):
                    still[still.clone()] = ~symbol.below(theta[still], group[still], self.lower)
                self.work += _TEST_WORK * symbol.side**3 * (len(group) + int((~out).sum()))
            if bool(still.any()):
                values, low, high = symbol.values(theta[still], group[still])
                bound[still] = high[:, 0]
                self.best = max(self.best, float(values[:, 0].max()))
                self.lower = max(self.lower, float(low[:, 0].max()))
                self.work += self._value_work * int(still.sum())
            self.evaluations += len(group)
            self.told(self.evaluations, self.lower, max(self.upper, self.lower))
            bounds.append(bound)
        return torch.cat(bounds)

    @property
    def _value_work(self) -> float:
        _, taps, out, channels = self.symbol.coefficients.shape
        return 8.0 * taps * out * channels + _OVERHEAD + _VALUE_WORK * channels**3 * (channels > 1)


def _search(
    symbol: Polynomial, tol: float, effort: float, told: Callable[[int, float, float], None]
) -> Enclosure:
    """Refine cells until the bound of every one is within ``tol`` of the best value, or the effort is spent."""
    degree = torch.tensor(symbol.degree, dtype=torch.float64)
    ceiling = float(((symbol.norms + symbol.rounding) * symbol.units).max())
    state = _Search(symbol, told, ceiling)
    large = symbol.side >= LARGE_SIDE
    work = _TEST_WORK * symbol.side**3 if large else state._value_work
    angle = _FIRST_ANGLE if large else 2 * _FIRST_ANGLE
    counts = _first_grid(symbol.degree, angle, max(24.0, 0.7 * effort / work / symbol.groups))
    cells = _initial(symbol.groups, counts)
    waiting: list[_Cells] = []
    settled = 0.0
    while True:
        phi = cells.half @ degree * (1 + 4 * EPS)
        cosine = torch.where(phi < pi / 2, torch.cos(phi), 0.0)
        high = state.judge(cells, cosine)
        cells.bound = torch.where(cosine > 0, high / cosine, math.inf).clamp_max(ceiling)
        if state.evaluations == len(high):  # the uniform grid
            cosines = prod(math.cos(d * pi / c) for d, c in zip(symbol.degree, counts, strict=True))
            ceiling = min(ceiling, float(high.max()) / cosines * (1 + 8 * EPS))
        # A cell below ``lower`` is out: it cannot hold the maximum. One within ``tol`` is good enough.
        good = cells.bound <= state.lower * (1 + tol)
        if bool(good.any()):
            settled = max(settled, float(cells.bound[good].max()))
        cells = cells.take(~good)
        state.upper = min(_highest((cells, *waiting), settled, state.lower), ceiling)
        if state.work > effort or ceiling <= state.lower * (1 + tol):
            break
        # Where the symbol is nearly flat no cell goes out early: then some at a time, or they fill gigabytes.
        waiting.append(cells)
        cells = cells.take(torch.arange(0))
        while not len(cells.group) and waiting:
            cells = waiting.pop()
            good = cells.bound <= state.lower * (1 + tol)
            settled = max([settled, *cells.bound[good].tolist()])
            cells = cells.take(~good)
            if len(cells.group) > _MOST_CELLS:
                waiting.append(cells.take(torch.arange(_MOST_CELLS, len(cells.group))))
                cells = cells.take(torch.arange(_MOST_CELLS))
        if not len(cells.group):
            break
        cells = _halved(cells, degree)
    upper = min(_highest((cells, *waiting), settled, state.lower), ceiling)
    best = max(state.best, state.lower)
    return Enclosure(state.lower, best, max(upper, best), state.evaluations, upper <= state.lower * (1 + tol))


def _highest(parts: Sequence[_Cells], settled: float, lower: float) -> float:
    """Return what no value exceeds, by the cells still in question and those that are settled."""
    return max([settled, lower, *(float(part.bound.max()) for part in parts if len(part.group))])


def _first_grid(degree: tuple[float, ...], angle: float, most: float) -> list[int]:
    """Return cells per axis so that φ ≈ ``angle``, fewer if half their product would exceed ``most``."""
    active = sum(d > 0 for d in degree)
    factor = 1.0
    while True:
        counts = [
            1 if d == 0 else max(math.ceil(_FEWEST * d) + 1, math.ceil(factor * d * active * pi / angle))
            for d in degree
        ]
        if prod(counts) / 2 <= most or factor < 0.05:
            return counts
        factor *= 0.8


def _initial(groups: int, counts: list[int]) -> _Cells:
    """Cover half of the frequencies (σ(−θ) = σ(θ)) of every group by a uniform grid of centres 2πj/count."""
    first = next((a for a, count in enumerate(counts) if count > 1), 0)
    axes = [
        torch.arange(count // 2 + 1 if a == first else count, dtype=torch.float64)
        for a, count in enumerate(counts)
    ]
    spacing = torch.tensor([2 * pi / count for count in counts], dtype=torch.float64)
    centre = torch.cartesian_prod(*axes).reshape(-1, len(counts)) * spacing
    centre = torch.where(centre > pi, centre - 2 * pi, centre)
    # A hair wider than half the spacing: neighbours must overlap in spite of rounding.
    half = (spacing / 2 * (1 + 8 * EPS) + 8 * EPS).expand(len(centre), -1)
    group = torch.arange(groups).repeat_interleave(len(centre))
    return _Cells(
        group, centre.repeat(groups, 1), half.repeat(groups, 1), torch.full((len(group),), math.inf)
    )


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
