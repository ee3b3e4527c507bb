"""How an iterative solver ends: the polish, and everything back in the operator's own shapes and units."""

from __future__ import annotations

import math
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

EQUAL = 1e-9
"""Relative distance within which iterated values count as equal; the polish leaves errors of about 4e-10."""


def finish(
    gram: Gram,
    vectors: torch.Tensor,
    k: int,
    tol: float,
    *,
    tau: float,
    ceiling: float,
    converged: bool,
    note: str,
) -> Estimate:
    """Polish ``vectors`` and return the estimate they give. Costs 2 matvecs per vector.

    Args:
        gram: The scaled operator.
        vectors: Rows ``(p, size)``, p ≥ k.
        k: How many pairs to report.
        tol: Bound on the explicit residuals for ``converged``.
        tau: Bound on the norm on the complement of ``vectors``, in scaled units.
        ceiling: Bound on the norm of the whole operator, in scaled units.
        converged: What the solver and its verification say.
        note: Anything worth saying in words.
    """
    pairs = polish(gram.double(), vectors)
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
        missed = f"rounding within the operator, about {pairs.accuracy / first:.1e} of σ₁"
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
        ceiling=float("inf"),
        converged=not note,
        note=note,
    )


def exhaust(gram: Gram, k: int, tol: float) -> Estimate:
    """Return the estimate of a small operator from all of its space. Costs 2·min(m, n) matvecs."""
    basis = torch.eye(gram.size, dtype=torch.float64)
    return finish(gram, basis, k, tol, tau=0.0, ceiling=float("inf"), converged=True, note="")


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
