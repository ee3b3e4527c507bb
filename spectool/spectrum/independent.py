"""Operators that are many independent problems at once: solve those that matter, prove the others away.

Groups of channels, classes of a dilation and windows that do not overlap are blocks of a block-diagonal operator.
Its k largest singular values come from few of them: blocks are taken in the order of a proven bound on their σ₁,
and as soon as the next bound is below the k-th largest value found, the rest is out. 512 depthwise channels
usually cost a handful of small factorisations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from spectool.linear import LinearMap
from spectool.spectrum.dense import SMALL_SIDE, Solved, matrix_levels
from spectool.spectrum.levels import Levels, keep, products, union
from spectool.spectrum.padding import padding_norm
from spectool.spectrum.parts import BATCH_BYTES, Part, line_factors
from spectool.spectrum.stencil import Stencil

Iterate = Callable[[LinearMap, int], Solved]

_MOST_ITERATIVE = 6  # blocks that are worth a solver run of their own
_PLAIN_WORK = 2e9  # flops below which all blocks are simply factorised


@dataclass
class _Union:
    """What is known of the whole so far."""

    k: int
    levels: Levels
    runs: list[Solved]

    def add(self, levels: Levels, count: int) -> None:
        self.levels = keep(union([self.levels, levels.repeated(count)]), self.k)


def solve_parts(
    parts: list[Part],
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    iterate: Iterate | None = None,
) -> Solved | None:
    """Return the k largest singular values of the union of ``parts``, or None where that is not worth it.

    Small blocks are factorised, products of one-dimensional kernels taken apart, the rest is given to
    ``iterate`` (at most six runs; each adds its own 1e-9 to the probability that a probabilistic bound fails).

    Args:
        parts: From ``parts_of``.
        k: How many.
        dtype: Arithmetic of the iterated blocks.
        device: Where they are iterated.
        iterate: Solves one block; without it None is returned if a block needs it.
    """
    whole = _Union(k, Levels.nothing(), [])
    direct, open_ = [], []
    separable = False
    for part in parts:
        factors = _product_levels(part, k)
        if factors is not None:
            whole.add(factors, part.count)
            separable = True
        elif part.is_small:
            direct.append(part)
        else:
            open_.append(part)
    if open_ and iterate is None:
        return None
    for part in direct:
        _factorise(part, whole)
    if open_ and iterate is not None and not _iterate(open_, whole, iterate, dtype, device):
        return None
    # A block's residuals are relative to its own σ₁, which is at most the whole's.
    worst = max((residual for run in whole.runs for residual in run.residuals), default=0.0)
    kinds = [run for run in whole.runs if len(run.levels.upper)]
    top = max(kinds, key=lambda run: float(run.levels.upper[0]), default=None)
    proven = 0.0 if top is None else float(top.levels.upper[0])
    kind = top.kind if top is not None and proven >= whole.levels.expand(1)[2][0] else "exact"
    return Solved(
        whole.levels,
        "lanczos" if whole.runs else _name(parts, separable),
        _why(parts),
        kind=kind,
        exact=not whole.runs,
        converged=all(run.converged for run in whole.runs),
        matvecs=sum(run.matvecs for run in whole.runs),
        residuals=(worst,) * k if whole.runs else (),
        note="; ".join(sorted({run.note for run in whole.runs if run.note})),
    )


def _factorise(part: Part, whole: _Union) -> None:
    """Factorise the blocks of one shape, those with the largest bounds first, until the rest is out."""
    groups, (m, n) = part.stencil.groups, part.shape
    k = -(-whole.k // part.count)
    work = groups * (10.0 * m * n * min(m, n) + 1e5)
    bounds = np.full(groups, np.inf)
    if part.stencil.kernel and groups > 1 and work > _PLAIN_WORK:
        bounds = part.bounds()
    order = np.argsort(-bounds, kind="stable")
    batch = max(1, min(groups, BATCH_BYTES // (8 * m * n)))
    if np.isfinite(bounds).all():  # few at a time: the next may be out already
        batch = max(1, min(batch, 8, int(_PLAIN_WORK * groups / work)))
    for start in range(0, groups, batch):
        chosen = order[start : start + batch]
        if bounds[chosen[0]] < whole.levels.kth_lower(whole.k):
            break
        matrices = part.matrices(torch.from_numpy(chosen))
        levels = matrix_levels(matrices[0] if len(matrices) == 1 else matrices, k)
        whole.add(levels, part.count)


def _iterate(
    parts: list[Part], whole: _Union, iterate: Iterate, dtype: torch.dtype, device: torch.device | str
) -> bool:
    """Iterate the blocks that can matter; False if they are too many."""
    jobs: list[tuple[float, Part, int]] = []
    for part in parts:
        alone = len(parts) * part.stencil.groups <= 2
        bounds = np.full(part.stencil.groups, np.inf) if alone or not part.stencil.kernel else part.bounds()
        jobs.extend((float(bound), part, index) for index, bound in enumerate(bounds))
    jobs.sort(key=lambda job: -job[0])
    for done, (bound, part, index) in enumerate(jobs):
        level = whole.levels.kth_lower(whole.k)
        if bound < level:
            break
        if done >= _MOST_ITERATIVE or (done == 0 and _hopeless(jobs, whole.k)):
            return False
        wanted = min(-(-whole.k // part.count), *part.shape)
        run = iterate(part.to_map(index, dtype=dtype, device=device), wanted)
        whole.runs.append(run)
        whole.add(run.levels, part.count)
    return True


def _hopeless(jobs: list[tuple[float, Part, int]], k: int) -> bool:
    """Whether many blocks must matter: their bounds lie within a percent of the best."""
    best = jobs[0][0]
    if not np.isfinite(best):
        return len(jobs) > _MOST_ITERATIVE
    close = [part.count for bound, part, _ in jobs if bound >= 0.99 * best]
    return len(close) > _MOST_ITERATIVE and sum(close) > k


def _product_levels(part: Part, k: int) -> Levels | None:
    """Return the levels of blocks that are M ⊗ T₁ ⊗ T₂…, the kernel being a product over its axes; else None."""
    stencil = part.stencil
    if len(stencil.kernel) < 2 or stencil.groups > 16 or (part.is_small and max(part.shape) <= 256):
        return None
    found = []
    for index in range(stencil.groups):
        factors = line_factors(stencil.weight[index].detach().double())
        if factors is None:
            return None
        channels, lines, remainder = factors
        if min(channels.shape) > SMALL_SIDE or max(*stencil.sizes, *stencil.outputs) > 2 * SMALL_SIDE:
            return None
        pieces = [matrix_levels(channels, min(channels.shape))]
        copies = part.copies()
        for axis, line in enumerate(lines):
            one = Stencil(
                line[None, None, None],
                (stencil.sizes[axis],),
                (stencil.outputs[axis],),
                (stencil.stride[axis],),
                (stencil.dilation[axis],),
                (stencil.lead[axis],),
            ).to_matrices()[0]
            pieces.append(matrix_levels(one @ copies[axis] if copies else one, min(one.shape)))
        levels = products(pieces, k)
        extra = remainder * (padding_norm(part.conv) if part.conv is not None else 1.0)
        found.append(
            Levels(levels.values, np.maximum(levels.lower - extra, 0), levels.upper + extra, levels.count)
        )
    return union(found)


def _name(parts: list[Part], separable: bool) -> str:
    if all(not part.stencil.kernel for part in parts):
        return "exact:non-overlapping"
    if separable:
        return "exact:separable"
    if max(part.stencil.groups * part.count for part in parts) > 1 or len(parts) > 1:
        return "exact:independent"
    return "dense"


def _why(parts: list[Part]) -> str:
    if len(parts) == 1 and parts[0].stencil.groups * parts[0].count == 1 and parts[0].stencil.kernel:
        m, n = parts[0].shape
        return f"the smaller side of {m} × {n} is {min(m, n)}"
    blocks = sum(part.count * part.stencil.groups for part in parts)
    kinds = sum(part.stencil.groups for part in parts)
    if all(not part.stencil.kernel for part in parts):
        return f"windows do not overlap: {kinds} small matrices, {blocks} counted with repeats"
    return f"{blocks} independent problems, {kinds} of them different"
