"""What training needs: singular rows that follow a weight from step to step, and projections that start from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from spectool.clip.bundle import _Dual
from spectool.clip.family import Family, flat
from spectool.clip.leading import Leading, leading
from spectool.linear import LinearMap, MatrixMap

_BLOCK = 6
_PAIRS = 16
_SMALL = 20_000
_ROUGH = 6
_COLD = 4


@dataclass(frozen=True)
class Warm:
    """A weight near the nearest one that obeys the limit.

    Attributes:
        weight: w, with ‖A(w)‖₂ at the limit or, to what was found, below it.
        rows: Leading right singular rows of A(w).
        gap: How far its change is above the least possible one, relatively; infinite where that is not known.
        rounds: Rounds taken.
        applications: Operator applications and gradients.
    """

    weight: Tensor
    rows: Tensor
    gap: float
    rounds: int
    applications: int


def follow(A: LinearMap, rows: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return (estimates of the leading singular values, new rows) after some steps of block power iteration.

    Costs 2·steps applications per row. Estimates are Rayleigh–Ritz values of the rows as they were before the last
    step, hence lower bounds up to rounding. Where the weight is not finite, so are they, and the rows stay.

    Args:
        A: The map as it is now.
        rows: Orthonormal rows ``(b, size)``, b ≤ size.
        steps: At least 1.

    **Source:** A. Ebrahimpour Boroojeny, M. Telgarsky, H. Sundaram, AISTATS 2024: one warm step per batch; here
    with AᵀA alone, whose rate does not depend on the weight's scale, and a Ritz step, which needs no signs.
    """
    start, values = rows, rows.new_zeros(len(rows))
    for _ in range(steps):
        images = A.matvec(rows.reshape(-1, *A.in_shape)).reshape(len(rows), -1)
        gram = (images @ images.T).double()
        if not bool(torch.isfinite(gram).all()):
            return torch.full_like(values, float("nan")), start
        squares, turn = torch.linalg.eigh(0.5 * (gram + gram.T))
        values = squares.flip(0).clamp_min(0).sqrt().to(rows.dtype)
        images = turn.flip(1).T.to(rows.dtype) @ images
        pulled = A.rmatvec(images.reshape(-1, *A.out_shape)).reshape(len(rows), -1)
        top = float(values[0])
        if top == 0.0:
            return values, turn.flip(1).T.to(rows.dtype) @ rows
        rows = torch.linalg.qr((pulled / top).T).Q.T.contiguous()
    return values, rows


def first_rows(A: LinearMap, count: int, source: torch.Generator) -> Tensor:
    """Return random orthonormal rows to start from."""
    n = prod(A.in_shape)
    drawn = torch.randn(n, min(count, n), generator=source, dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(drawn).Q.T.contiguous()
    return rows.to(dtype=A.dtype, device=A.device)


def warm_bundle(
    family: Family,
    limit: float,
    rows: Tensor,
    source: torch.Generator,
    *,
    gap: float = 0.05,
    rounds: int = 10,
    block: int = _BLOCK,
) -> Warm | None:
    """Return a weight that obeys a limit, close to the nearest, starting from rows that were kept.

    The bundle of ``clip.bundle``, with fewer pairs per round, a loose gap and a warm start: between two clips of a
    training run few values rise above the limit, and they are those that were followed. None where they are many
    and the kernel is large: then the symbol is the quicker way.

    Args:
        family: The operators; scaling the weight must scale them.
        limit: c.
        rows: Right singular rows of the present operator, as far as known.
        source: Of the random rows that join them.
        gap: Relative distance between the change and its lower bound at which to stop.
        rounds: Most rounds.
        block: Pairs that join per round.
    """
    start = family.start
    spent = family.applications
    found = leading(family.at(start), block, source, start=rows[: block - 1], level=limit, tol=1e-2)
    if start.numel() > _SMALL and bool((found.values > limit).all()):
        family.applications += found.applications
        return None
    spent = found.applications - spent
    dual = _Dual(family, limit)
    nearest, kept, best, lower, count = start, rows, float("inf"), 0.0, 0
    while count < rounds:
        count += 1
        dual.extend(found, _PAIRS - block)
        weight, bound = dual.solve()
        lower = max(lower, bound)
        # Rough pairs are cuts as good as exact ones; in a cluster at the limit exact ones take ten times as long.
        found = _rough(family.at(weight), flat(found.right), limit, source)
        spent += found.applications
        # Scaled down it obeys, to what was found: a candidate in every round.
        candidate = weight * (limit / max(limit, float(found.values[0])))
        change = float(torch.linalg.vector_norm(candidate - start))
        if change < best:
            best, nearest, kept = change, candidate, flat(found.right)
        if best > lower * (1 + gap) and count < rounds:
            continue
        found = thorough(family.at(nearest), flat(found.right), source, block)
        spent += found.applications
        nearest, kept = nearest * (limit / max(limit, float(found.values[0]))), flat(found.right)
        best = float(torch.linalg.vector_norm(nearest - start))
        if best <= lower * (1 + gap):
            break
    reached = best / lower - 1.0 if lower > 0 else float("inf")
    return Warm(nearest, kept, reached, count, spent + family.applications)


def _rough(A: LinearMap, rows: Tensor, limit: float, source: torch.Generator) -> Leading:
    """Return about the leading triplets, from rows that were and a random one."""
    count = len(rows)
    return leading(
        A, count, source, start=rows[: count - 1], level=limit, tol=1e-2, excess=0.1, blocks=_ROUGH
    )


def thorough(A: LinearMap, rows: Tensor, source: torch.Generator, count: int) -> Leading:
    """Return leading triplets, the first to 1e-4 also within a cluster, from kept rows and from a cold start.

    Kept rows that have converged would end an iteration before a random row beside them has come anywhere; what
    rose above them since (1 % was seen) would be missed. So a few random rows converge on their own first.

    Args:
        A: The map.
        rows: Kept right singular rows.
        source: Of the random rows.
        count: How many to return.
    """
    # A level that none reaches: only the first has to converge.
    level = float("inf")
    cold = leading(A, _COLD, source, level=level, tol=3e-4)
    start = torch.cat([flat(cold.right), rows.to(cold.right)])
    found = leading(A, len(start), source, start=start, level=level, tol=1e-4)
    kept = slice(0, count)
    return replace(
        found,
        values=found.values[kept],
        left=found.left[kept],
        right=found.right[kept],
        applications=cold.applications + found.applications,
    )


def warm_svd(
    matrix: Tensor, limit: float, rows: Tensor, source: torch.Generator, *, extra: int = 4
) -> tuple[Tensor, int] | None:
    """Return (the nearest matrix with norm at most c, applications), or None if too many values exceed c.

    Only the triplets above c are computed, from rows that were kept; the projection is exact where they are all.

    Args:
        matrix: ``(m, n)``.
        limit: c.
        rows: Right singular rows as far as known ``(b, n)``.
        source: Of the random rows that join them.
        extra: How many join.
    """
    weight, spent = matrix.float().clone(), 0
    for _ in range(4):
        count = len(rows) + extra
        found = leading(
            MatrixMap(weight), count, source, start=rows, level=limit, tol=1e-5, excess=1e-2, blocks=200
        )
        spent += found.applications
        over = found.values > limit * (1 + 2e-6)
        if bool(over.all()):
            return None
        if not bool(over.any()):
            return weight, spent
        u, v = flat(found.left)[over], flat(found.right)[over]
        weight -= (u * (found.values[over] - limit)[:, None]).T @ v
        rows = flat(found.right)[:-extra]
    return weight, spent
