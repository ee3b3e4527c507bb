"""How an iterative solver ends: the polish, and everything back in the operator's own shapes and units."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from spectool.spectrum.estimate import Estimate
from spectool.spectrum.gram import wide
from spectool.spectrum.hochstenbach import FAILURE
from spectool.spectrum.polish import PROMISE, polish
from spectool.spectrum.rounding import noise, reserve
from spectool.spectrum.starts import generator
from spectool.spectrum.verify import verify

if TYPE_CHECKING:
    from spectool.spectrum.gram import Gram
    from spectool.spectrum.polish import Pairs

SHARPENINGS = 10
"""Times that residuals are added to the span."""

EQUAL = 1e-9
"""Relative distance within which iterated values count as equal; the polish leaves errors of about 4e-10."""


def finish(
    gram: Gram,
    vectors: torch.Tensor,
    k: int,
    tol: float,
    *,
    tau: float,
    sure: float,
    ceiling: float,
    converged: bool,
    note: str,
    most: int = 0,
) -> Estimate:
    """Polish ``vectors`` and return the estimate they give. Costs 2 matvecs per vector.

    Where something next to the k-th value may be mixed into the vectors, their residuals are added to the span, up to
    ten times, as long as ``most`` allows.

    Args:
        gram: The scaled operator.
        vectors: Rows ``(p, size)``, p ≥ k.
        k: How many pairs to report.
        tol: Bound on the explicit residuals for ``converged``.
        tau: Bound on the norm on the complement of ``vectors``, in scaled units.
        sure: The same, wrong with probability 1e-2: decides whether the values are as accurate as is promised.
        ceiling: Bound on the norm of the whole operator, in scaled units.
        converged: What the solver and its verification say.
        note: Anything worth saying in words.
        most: Cap on the applications of the operator, those before included.
    """
    pairs = polish(gram.double(), vectors)
    wanted = max(PROMISE, 0.1 * tol)
    accurate = _accurate(pairs, k, sure, wanted)
    for _ in range(SHARPENINGS):
        room = 8 * len(vectors) + 2 * reserve(gram) <= most - gram.applications
        if accurate or not converged or not room:
            break
        pairs, leak = _sharpened(gram.double(), pairs)
        tau, sure = math.sqrt(tau**2 + leak), math.sqrt(sure**2 + leak)
        accurate = _accurate(pairs, k, sure, wanted)
    unit, first = gram.unit, float(pairs.values[0])
    lengths = torch.linalg.vector_norm(pairs.remainder, dim=1)
    residuals = torch.maximum(lengths, pairs.defect)[:k] / first if first else torch.zeros(k)
    values = pairs.values[:k]
    # Ritz values are accurate to about the square of the residual. Where that does not tell values 1e-9 apart, σ₁
    # alone is sure.
    near = EQUAL * first
    blurred = max(4.0 * first * float(residuals.max()) ** 2, 2.0 * pairs.accuracy) > near
    right = pairs.right[:k].cpu().reshape(-1, *gram.map.in_shape)
    left = pairs.left[:k].cpu().reshape(-1, *gram.map.out_shape)
    missed = ""
    if not bool((residuals <= tol).all()):
        missed = f"residual {float(residuals.max()):.1e} after the polish"
    elif pairs.accuracy > PROMISE * first:
        share = f"is about {pairs.accuracy / first:.1e} of σ₁" if first else "is all that is left"
        missed = f"rounding within the operator {share}"
    elif converged and not accurate:
        missed = f"residual {float(residuals.max()):.1e}, too large for values that are this close"
    # What the vectors show of a function's rounding, in the type the verification may have had.
    coarse = torch.finfo(gram.dtype).eps / torch.finfo(gram.double().dtype).eps
    extra = 2.0 * pairs.noise * coarse * first
    return Estimate(
        left=right if gram.flipped else left,
        values=(values * unit).cpu(),
        right=left if gram.flipped else right,
        residuals=residuals.cpu(),
        converged=converged and not missed,
        matvecs=gram.applications,
        tau=math.sqrt(tau**2 + extra) * unit,
        note=note or (missed and f"not converged: {missed}"),
        rounding=pairs.rounding * unit,
        multiplicity=1 if blurred else int((values >= first - near).sum()),
        ritz=(pairs.values * unit).cpu(),
        coupling=(pairs.remainder @ pairs.remainder.T).cpu() * unit**2,
        ceiling=math.sqrt(ceiling**2 + extra) * unit,
    )


def _first(pairs: Pairs, count: int) -> Pairs:
    names = ("values", "right", "left", "remainder", "defect")
    return replace(pairs, **{name: getattr(pairs, name)[:count] for name in names})


def _sharpened(gram: Gram, pairs: Pairs) -> tuple[Pairs, float]:
    """Let the residuals join the span, and keep as many of the largest pairs as there were: two steps of block Lanczos.

    Residuals that come from far away shrink by it. What comes from a value next to the wanted ones stays, and shows.

    Returns:
        The new pairs, and by how much the square of a bound on the old complement W grows for the new one. A unit
        vector of that is v + w, v in the old span V and w in W. ‖f·M·v‖ ≤ a = ‖S·O‖, O being what the old vectors
        have outside the new span; f·M·v and f·M·w have an inner product of at most a·‖R‖, R being what couples V and
        W. So the square grows by a² + 2a‖R‖ at most.
    """
    count, first = len(pairs.values), float(pairs.values[0])
    lengths = torch.linalg.vector_norm(pairs.remainder, dim=1)
    rows = pairs.remainder[lengths > 1e-14 * first]
    if not len(rows):
        return pairs, 0.0
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    more = wide(gram(gram.take(rows)))
    more = more / torch.linalg.vector_norm(more, dim=1, keepdim=True).clamp_min(1e-300)
    found = polish(gram, torch.cat([pairs.right, rows, more])[: gram.size])
    kept = _first(found, count)
    outside = pairs.right - (pairs.right @ kept.right.T) @ kept.right
    turned = float(torch.linalg.matrix_norm(pairs.values[:, None] * outside, 2))
    coupling = float(torch.linalg.matrix_norm(pairs.remainder, 2))
    return kept, turned**2 + 2.0 * turned * coupling + 16.0 * torch.finfo(torch.float64).eps * first**2


def _accurate(pairs: Pairs, k: int, sure: float, wanted: float) -> bool:
    """Return whether no singular value is above its estimate by more than ``wanted``·σ₁, given ``sure``.

    Vectors with small residuals may still be mixtures: of two values 1e-5 apart, one of them outside, each estimate is
    off by up to that. The argument is that of ``probabilistic.enclose``; residuals below ``wanted`` are good in any
    case: a mixture of two values is off by no more than its residual.
    """
    if float(torch.linalg.matrix_norm(pairs.remainder[:k], 2)) <= wanted * float(pairs.values[0]):
        return True
    squares, coupling = pairs.values.square(), pairs.remainder @ pairs.remainder.T
    error = wanted * float(pairs.values[0]) - pairs.accuracy
    for index in range(min(k, len(squares))):
        x = max(float(pairs.values[index]) + error, 0.0) ** 2
        if x <= sure**2:
            return False
        schur = torch.diag(squares) + coupling * (x / (x - sure**2))
        if float(torch.linalg.eigvalsh(schur)[-1 - index]) > x:
            return False
    return True


def conclude(
    gram: Gram,
    vectors: torch.Tensor,
    k: int,
    tol: float,
    worst: float,
    digest: bytes,
    seed: int,
    pairs: int,
) -> Estimate:
    """Verify and polish what a power method found; nothing that the verification sees is merged.

    Args:
        gram: The operator.
        vectors: Rows ``(k, size)``.
        k: How many.
        tol: Tolerance.
        worst: Largest relative residual the iteration saw.
        digest: Fingerprint of the operator.
        seed: Seed that was asked for.
        pairs: Budget of the whole run.
    """
    rows = torch.linalg.qr(wide(vectors).T).Q.T
    values = torch.linalg.svdvals(wide(gram.double().forward(rows))).square()
    verdict = verify(
        gram,
        rows,
        float(values[0]),
        float(values[k - 1]),
        lambda suffix: generator(digest, seed, f"verify{suffix}"),
        pairs=max(8, min(200, pairs - gram.applications // 2 - k - reserve(gram))),
        tight=True,
        tol=tol,
        failure=FAILURE,
    )
    note = ""
    if worst > tol:
        note = f"not converged: residual {worst:.1e}, tolerance {tol:.1e}"
    elif verdict.above:
        note = "not converged: the verification saw a larger value than the k-th"
    elif not verdict.proven or not verdict.complete:
        note = "not converged: the verification could not bound what is left within the budget"
    return finish(
        gram,
        rows,
        k,
        tol,
        tau=verdict.tau,
        sure=verdict.sure,
        ceiling=float("inf"),
        converged=not note,
        note=note,
        most=2 * pairs,
    )


def exhaust(gram: Gram, k: int, tol: float) -> Estimate:
    """Return the estimate of a small operator from all of its space. Costs 2·min(m, n) matvecs."""
    basis = torch.eye(gram.size, dtype=torch.float64)
    return finish(gram, basis, k, tol, tau=0.0, sure=0.0, ceiling=float("inf"), converged=True, note="")


def zero_estimate(gram: Gram, k: int) -> Estimate:
    """Return the estimate of the zero operator: zeros, with unit vectors. Costs nothing more."""
    spaces = (gram.map.out_shape, gram.map.in_shape)
    left, right = (
        torch.eye(k, max(k, int(torch.Size(shape).numel())), dtype=torch.float64).reshape(k, *shape)
        for shape in (reversed(spaces) if gram.flipped else spaces)
    )
    zeros = torch.zeros(k, dtype=torch.float64)
    # A composition may have lost everything to rounding: what bounds that bounds the operator.
    hidden = noise(gram) * gram.unit
    return Estimate(
        left=left,
        values=zeros,
        right=right,
        residuals=zeros.clone(),
        converged=hidden == 0.0,
        matvecs=gram.applications,
        tau=0.0,
        note="not converged: rounding within the operator leaves nothing of it"
        if hidden
        else "zero operator: a random vector is mapped to zero",
        rounding=hidden,
        multiplicity=1 if hidden else k,
        ritz=zeros.clone(),
        coupling=torch.zeros(k, k, dtype=torch.float64),
        ceiling=0.0,
    )
