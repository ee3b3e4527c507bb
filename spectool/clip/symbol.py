"""The nearest kernel whose symbol obeys a bound: exact for circular padding, near for every other conv.

The norm of a circular convolution is the largest norm of its symbol on a grid, and the symbol is linear in the
kernel: the projection becomes a semidefinite programme with one small matrix per frequency, which is solved in
its factored dual (``symbol_solve``). On an infinite grid the same bound holds for every input size and any zero
padding, so a kernel obtained from a grid of 12–16 frequencies per axis is near the nearest one for zero padding.

Stride and dilation are divided by their greatest common divisor, a stride that is left gives polyphase
components, what dilation is left does not change the norms. Groups are independent problems, solved side by side.

Between the grid's frequencies the symbol is a little larger. For a bound that holds for every input size the worst
frequencies of a finer grid are added as constraints, and what is left is proven and scaled away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectool.clip.symbol_core import project_on
from spectool.clip.symbol_map import SymbolMap, exact_grid, half_grid, reduced_stride
from spectool.errors import UsageError
from spectool.linear import ConvGeometry
from spectool.spectrum.any_size import enclose_supremum
from spectool.spectrum.stencil import grouped
from spectool.spectrum.symbol import polynomial

__all__ = [
    "SymbolProjection",
    "default_grid",
    "exact_grid",
    "project_any_size",
    "project_measured",
    "project_symbol",
]

_GRID = {1: 64, 2: 14, 3: 8}
_FINER = 3  # of the grid on which frequencies to add are looked for
_ADDED = 96  # most frequencies added per round
_ROUNDS = 3
_CHUNK = 256


@dataclass(frozen=True)
class SymbolProjection:
    """A kernel whose symbol obeys the limit on a grid.

    Attributes:
        weight: Float64, in the stored layout; groups that obeyed already are as they were.
        lower: Lower bound on ‖w′ − w₀‖ over all w′ that obey the limit on the grid; a bound for the operator
            only if the grid is its ``exact_grid`` (else None where the caller gave no grid).
        sup_on_grid: The largest value of the symbol of ``weight`` on the grid.
        iterations: Descent steps.
    """

    weight: Tensor
    lower: float | None
    sup_on_grid: float
    iterations: int


def default_grid(weight: Tensor, geometry: ConvGeometry) -> tuple[int, ...]:
    """Return frequencies per axis for a convolution that is not circular: 14 for small kernels in 2-d."""
    stride = reduced_stride(geometry)
    least = _GRID.get(geometry.dims, 8)
    return tuple(
        1 if k <= s else max(least, 3 * -(-k // s)) for k, s in zip(weight.shape[2:], stride, strict=True)
    )


def project_symbol(
    weight: Tensor,
    geometry: ConvGeometry,
    limit: float,
    *,
    grid: tuple[int, ...] | None = None,
    tol: float = 3e-4,
    gap: float = 3e-3,
    seed: int = 0,
) -> SymbolProjection:
    """Return the nearest kernel with ‖H(θ)‖ ≤ ``limit`` on a grid of frequencies.

    Costs no operator applications; a step takes five batched products of the size of the symbol times the
    number of values above the limit. Of groups that obey the limit already not a bit changes.

    Args:
        weight: In torch's layout, transposed as ``geometry`` says; any float type.
        geometry: Stride, dilation and groups are used; padding means nothing here.
        limit: c > 0.
        grid: Frequencies per axis; ``exact_grid`` for a circular convolution, else 12–16 do.
        tol: Relative excess over the limit at which to stop; it is then taken away by scaling.
        gap: Relative distance of the change from its lower bound at which to stop.
        seed: Of the start where a singular subspace is found by iteration.

    Raises:
        UsageError: If the limit is not a positive number.
    """
    if not (limit > 0 and math.isfinite(limit)):
        raise UsageError(f"a limit must be a positive number, got {limit!r}")
    kernel = grouped(weight, geometry.groups).double()
    chosen = default_grid(weight, geometry) if grid is None else grid
    made = SymbolMap(kernel.shape, reduced_stride(geometry), chosen)
    found, lower, top, iterations = project_on(made, kernel, limit, tol=tol, gap=gap, seed=seed)
    return SymbolProjection(found.reshape(weight.shape), None if grid is None else lower, top, iterations)


def project_any_size(
    weight: Tensor, geometry: ConvGeometry, limit: float, *, tol: float = 1e-3, seed: int = 0
) -> SymbolProjection:
    """Return the nearest kernel whose norm is at most ``limit`` for every input size and zero padding.

    The result's ``any_size`` bound is at most ``limit``, proven; ``lower`` bounds the change of every kernel for
    which that holds. Groups that obey already are untouched.

    Args:
        weight: In torch's layout, transposed as ``geometry`` says.
        geometry: Stride, dilation and groups are used; padding means nothing here.
        limit: c > 0.
        tol: Relative excess of the proven bound over the limit at which no more frequencies are added.
        seed: Of the start.

    Raises:
        UsageError: If the limit is not a positive number.
    """
    if not (limit > 0 and math.isfinite(limit)):
        raise UsageError(f"a limit must be a positive number, got {limit!r}")
    kernel = grouped(weight, geometry.groups).double()
    one = replace(geometry, groups=1)
    proven = _suprema(kernel, one, limit)
    over = proven > limit
    if not bool(over.any()):
        return SymbolProjection(weight.detach().double().clone(), 0.0, float(proven.max()), 0)
    part, stride = kernel[over], reduced_stride(geometry)
    grid = tuple(m if m == 1 else m + 2 for m in default_grid(weight, geometry))
    if len(part) > 1:  # groups share the frequencies: a finer grid serves all of them
        grid = tuple(m if m == 1 else 2 * m for m in grid)
    extra = torch.zeros(0, geometry.dims, dtype=torch.float64)
    lower, iterations, best, change = 0.0, 0, part, math.inf
    for _ in range(_ROUNDS):
        made = SymbolMap(part.shape, stride, grid, extra)
        found, bound, _, count = project_on(made, part, limit, tol=3e-4, gap=3e-3, seed=seed)
        lower, iterations = max(lower, bound), iterations + count
        tops = _suprema(found, one, limit)
        excess = (tops / limit).clamp_min(1.0) * (1 + 1e-12)
        found = torch.where(_wide(tops > limit, found), found / _wide(excess, found), found)
        moved = float(torch.linalg.vector_norm(found - part))
        if moved < change:
            best, change = found, moved
        if float(excess.max()) <= 1 + tol or len(part) > 1:
            break
        added = _worst(made, found * float(excess.max()), limit)
        if not len(added):
            break
        extra = torch.cat([extra, added])
    result = kernel.clone()
    result[over] = best
    top = float(_suprema(result, one, limit).max())
    return SymbolProjection(result.reshape(weight.shape), lower, top, iterations)


def project_measured(
    weight: Tensor,
    geometry: ConvGeometry,
    limit: float,
    measure: Callable[[Tensor], float],
    *,
    grid: tuple[int, ...] | None = None,
    tol: float = 3e-4,
    solves: int = 2,
    seed: int = 0,
) -> SymbolProjection:
    """Return a kernel near the nearest one with ``measure(w)`` = σ₁ of the real operator ≤ ``limit``.

    The symbol exceeds σ₁ by a little that hardly depends on the kernel: the second solve is at a level raised by
    as much, so that the final scaling (up or down) is small. Where few values exceed the limit this matters:
    scaling by 2 % costs more than the projection.

    Args:
        weight: In torch's layout.
        geometry: Of the convolution.
        limit: c.
        measure: σ₁ of the operator for a weight; must be positively homogeneous.
        grid: Frequencies per axis.
        tol: As in ``project_symbol``.
        solves: Most projections.
        seed: Of the start.
    """
    start = weight.detach().double()
    level, change, best, iterations = limit, math.inf, start.clone(), 0
    for _ in range(solves):
        found = project_symbol(weight, geometry, level, grid=grid, tol=tol, seed=seed)
        iterations += found.iterations
        if found.iterations == 0 and bool(torch.equal(found.weight, start)):
            break
        top = measure(found.weight)
        candidate = found.weight * (limit / top)
        moved = float(torch.linalg.vector_norm(candidate - start))
        if moved < change:
            best, change = candidate, moved
        if abs(top / limit - 1) <= 1e-3:
            break
        level *= limit / top
    if math.isinf(change) and (top := measure(start)) > limit:
        best = start * (limit / top)
    return SymbolProjection(best, None, limit, iterations)


def _suprema(kernel: Tensor, one: ConvGeometry, limit: float) -> Tensor:
    """Return the proven supremum of every group's symbol; a cheap bound where that suffices."""
    result = torch.zeros(len(kernel), dtype=torch.float64)
    for index, part in enumerate(kernel):
        easy = float(torch.linalg.vector_norm(part.flatten(2), dim=(0, 1)).sum())
        result[index] = easy if easy <= limit else enclose_supremum(part, one, tol=1e-4).upper
    return result


def _worst(made: SymbolMap, kernel: Tensor, limit: float) -> Tensor:
    """Return frequencies of a finer grid at which one group exceeds the limit, no two of them close."""
    symbol = polynomial(kernel, made.stride)
    angles = half_grid([m if m == 1 else _FINER * m for m in made.grid])
    over, values = [], []
    for part in torch.split(angles, _CHUNK):
        part = part[~symbol.below(part, torch.zeros(len(part), dtype=torch.long), limit * (1 + 1e-5))]
        if len(part):
            over.append(part)
            values.append(symbol.values(part, torch.zeros(len(part), dtype=torch.long))[0][:, 0])
    if not over:
        return angles[:0]
    found, order = torch.cat(over), torch.cat(values).argsort(descending=True)
    spacing = torch.tensor([2 * math.pi / m for m in made.grid], dtype=torch.float64)
    chosen: list[int] = []
    for index in order.tolist():
        apart = (found[chosen] - found[index]).abs() if chosen else found[:0]
        apart = torch.minimum(apart, 2 * math.pi - apart) / spacing
        if not len(apart) or float(apart.amax(dim=1).min()) > 0.4:
            chosen.append(index)
        if len(chosen) == _ADDED:
            break
    return found[chosen]


def _wide(a: Tensor, like: Tensor) -> Tensor:
    return a.reshape(-1, *(1,) * (like.ndim - 1))
