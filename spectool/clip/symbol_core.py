"""The projection on the symbol's values at given frequencies, without geometry: start, descent, certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.clip.symbol_map import SymbolMap, product
from spectool.clip.symbol_solve import Factored
from spectool.spectrum.periodic import grid_levels
from spectool.spectrum.symbol import polynomial

_ROUND = 30  # steps between two looks at the symbol's values
_MOST = 600  # steps in all
_SPARE = 2  # columns beyond the values above the limit
_BYTES = 1 << 28
_DIRECT = 96  # side up to which all values of H_f are computed at the start
_TESTED = 64  # side from which Cholesky tests find the grid's maximum


def project_on(
    made: SymbolMap, kernel: Tensor, limit: float, *, tol: float, gap: float, seed: int
) -> tuple[Tensor, float, float, int]:
    """Project a grouped kernel on the frequencies of ``made``.

    Returns:
        The kernel, the lower bound on ‖w′ − w₀‖, the largest value left, the descent steps.
    """
    result = kernel.clone()
    step = max(1, _BYTES // (32 * made.frequencies * math.prod(made.sides)))
    square, top, iterations = 0.0, 0.0, 0
    for first in range(0, len(kernel), step):
        components = made.split(kernel[first : first + step])
        before = tops(made, components)
        over = before > limit
        if not bool(over.all()):
            top = max(top, float(before[~over].max()))
        if bool(over.any()):
            # In units of the limit: the descent is in float32.
            found = _solve(made, components[over] / limit, before[over] / limit, 1.0, tol, gap, seed)
            result[first : first + step][over] = made.join(found.components) * limit
            square += float(found.lower.square().sum()) * limit**2
            top = max(top, float(found.tops.max()) * limit)
            iterations = max(iterations, found.iterations)
    return result, math.sqrt(square), top, iterations


@dataclass(frozen=True)
class _Found:
    components: Tensor
    lower: Tensor
    tops: Tensor
    iterations: int


def _solve(
    made: SymbolMap, components: Tensor, before: Tensor, limit: float, tol: float, gap: float, seed: int
) -> _Found:
    """Project groups whose largest values, ``before``, all exceed the limit; at worst they are scaled."""
    groups = len(components)
    left, right = _start(made, components, limit, seed)
    state = Factored(made, components.float(), limit, left, right)
    best = components / _wide(before, components)
    change = torch.linalg.vector_norm((best - components).flatten(1), dim=1)
    lower, top = torch.zeros_like(change), torch.full_like(change, limit)
    still = torch.arange(groups)
    while True:
        taken = state.iterations
        state.run(_ROUND, 0.1 * tol)
        start = components[still]
        image, bound = _certificate(start, limit, state)
        lower[still] = torch.maximum(lower[still], bound)
        candidate = start - image
        reached = tops(made, candidate)
        excess = (reached / limit).clamp_min(1.0)
        candidate = candidate / _wide(excess, candidate)
        moved = torch.linalg.vector_norm((candidate - start).flatten(1), dim=1)
        better = moved < change[still]
        best[still[better]], change[still[better]] = candidate[better], moved[better]
        top[still[better]] = (reached / excess)[better]
        loss = change[still] / lower[still].clamp_min(1e-300) - 1
        done = ((loss <= gap) & (excess <= 1 + tol)) | (loss <= 0.1 * gap)
        if bool(done.all()) or state.iterations == taken or state.iterations >= _MOST:
            return _Found(best, lower, top, state.iterations)
        if bool(done.any()):
            state.keep(~done)
            still = still[~done]
        state.compress()


def _start(made: SymbolMap, components: Tensor, limit: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return P, Q from the leading singular vectors of every H_f, weighted by what is above the limit."""
    symbols = made.values(components.float())
    values, left, right = _triplets(symbols, limit, seed)
    above = (values - limit).clamp_min(0.0)
    faint = 1e-2 * above.amax(dim=(1, 2), keepdim=True)
    root = torch.maximum(above, faint).sqrt()[:, :, None, :]
    return left * root, right * root


def _triplets(symbols: Tensor, limit: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return values ``(g, F, r)``, left and right vectors: all that exceed the limit, and a few."""
    flipped = symbols.shape[2] < symbols.shape[3]
    tall = symbols.mH if flipped else symbols
    side = tall.shape[3]
    if side <= _DIRECT:
        eigenvalues, vectors = torch.linalg.eigh(tall.mH @ tall)
        values = eigenvalues.clamp_min(0).sqrt().flip(-1)
        count = min(side, int((values > limit).sum(dim=-1).max()) + _SPARE)
        right = vectors.flip(-1)[..., :count]
        wide = product(tall, right)
    else:
        source = torch.Generator().manual_seed(seed)
        count = 16
        while True:
            count = min(count, side)
            right = torch.randn(*tall.shape[:2], side, count, generator=source, dtype=torch.complex64)
            for _ in range(4):
                right = torch.linalg.qr(tall.mH @ (tall @ right)).Q
            wide = tall @ right
            _, turn = torch.linalg.eigh(wide.mH @ wide)
            right, wide = right @ turn.flip(-1), wide @ turn.flip(-1)
            above = int((torch.linalg.vector_norm(wide, dim=2) > limit).sum(dim=-1).max())
            if above + _SPARE <= count or count == side:
                count = min(count, above + _SPARE)
                right, wide = right[..., :count], wide[..., :count]
                break
            count *= 2
    values = torch.linalg.vector_norm(wide, dim=2)
    left = wide / values.clamp_min(1e-30)[:, :, None]
    return (values, right, left) if flipped else (values, left, right)


def _certificate(start: Tensor, limit: float, state: Factored) -> tuple[Tensor, Tensor]:
    """Return L*Z and (⟨Z, H(w₀)⟩ − c‖Z‖_*)/‖L*Z‖ per group, in float64.

    ⟨L*Z, w₀ − w⟩ ≥ ⟨Z, H(w₀)⟩ − c‖Z‖_* for every w that obeys the limit; Cauchy and Schwarz do the rest.
    """
    image, nuclear = state.dual()
    gain = (image * start).flatten(1).sum(dim=1) - limit * nuclear
    norm = torch.linalg.vector_norm(image.flatten(1), dim=1)
    return image, (gain / norm.clamp_min(1e-300)).clamp_min(0.0)


def tops(made: SymbolMap, components: Tensor) -> Tensor:
    """Return the largest value of the symbol at the frequencies of ``made`` ``(groups,)``."""
    if len(components) == 1 and min(made.sides) >= _TESTED:
        symbol = polynomial(made.join(components), made.stride)
        top = float(grid_levels(symbol, made.grid, 1).values[0])
        if len(made.extra):
            values, _, _ = symbol.values(made.extra, torch.zeros(len(made.extra), dtype=torch.long))
            top = max(top, float(values.max()))
        return torch.tensor([top], dtype=torch.float64)
    symbols = made.values(components)
    if min(made.sides) == 1:
        found: Tensor = torch.linalg.vector_norm(symbols.flatten(2), dim=2).amax(dim=1)
        return found
    if made.sides[0] < made.sides[1]:
        symbols = symbols.mH
    largest: Tensor = torch.linalg.eigvalsh(symbols.mH @ symbols)[..., -1].amax(dim=1)
    return largest.clamp_min(0).sqrt()


def _wide(a: Tensor, like: Tensor) -> Tensor:
    return a.reshape(-1, *(1,) * (like.ndim - 1))
