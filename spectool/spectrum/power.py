"""Power iteration with deflation, and PowerQR: slow, simple, and honest about convergence.

Both iterate on B = AᵀA = ∇½‖Ax‖². For a map known only as a function, A and Aᵀ are its derivative and the
pull-back of that gradient, both by automatic differentiation; a convolution or a matrix uses its closed form.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from spectool.linear import exact_arithmetic
from spectool.progress import Progress, Step, silent
from spectool.spectrum.finish import conclude, exhaust, zero_estimate
from spectool.spectrum.gram import Gram, inner, length, wide
from spectool.spectrum.rounding import begin, reserve
from spectool.spectrum.starts import fingerprint, generator

if TYPE_CHECKING:
    from spectool.linear import LinearMap
    from spectool.spectrum.estimate import Estimate
    from spectool.spectrum.starts import Stream

SHIFT = 1e-6
"""μ of PowerQR in units of σ₁². It keeps R regular and only slows the iteration down; the paper's μ = 1 in absolute
units makes the rate depend on the scale of the weights."""

NOISE = 4.0
"""Rounding of one application of B, in units of eps·θ₁."""

CLOSING = 64
"""Pairs set aside for the verification."""


def power(
    A: LinearMap,
    k: int,
    *,
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Estimate:
    """Compute the k largest singular triplets by power iteration, one vector at a time, with deflation.

    x ← (I−VVᵀ)Bx/‖·‖, V the vectors found before, until ‖Bx − θx‖/(σσ₁) ≤ tol; then a verification from a fresh
    random vector and one Rayleigh–Ritz step in float64. The error of a vector shrinks by (σ_{i+1}/σ_i)² a pair, so
    clusters, which layers have, take thousands of pairs and often end *not converged*; about 20 times the
    applications of ``lanczos`` to reach 1e-3.

    Args:
        A: The operator.
        k: How many, with multiplicity; clamped to min(m, n).
        tol: Bound on ‖r‖/σ₁ of every pair for ``converged``.
        max_matvecs: Most applications of A plus of Aᵀ; default 2·(2000 + 1000k), shared by the k vectors.
        seed: Enters the start vectors beside the operator itself.
        progress: Told every 16 pairs.
    """
    with exact_arithmetic(), torch.no_grad():
        gram = Gram(A)
        k = min(k, gram.size)
        pairs = (max_matvecs if max_matvecs is not None else 2 * (2000 + 1000 * k)) // 2
        digest = fingerprint(A)
        if not begin(gram, generator(digest, seed, "scale")):
            return zero_estimate(gram, k)
        if gram.size <= 2 * k:
            return exhaust(gram, k, tol)
        source = generator(digest, seed, "power")
        vectors = torch.empty(0, gram.size, dtype=gram.dtype, device=gram.device)
        largest, worst = 0.0, 0.0
        for index in range(k):
            left = pairs - gram.applications // 2 - _closing(pairs, k, gram)
            share = max(1, left // (k - index))
            gram, row, value, residual = _one(gram, vectors, largest, tol, share, source, progress)
            vectors = torch.cat([gram.take(vectors), row])
            largest, worst = max(largest, value), max(worst, residual)
        return conclude(gram, vectors, k, tol, worst, digest, seed, pairs)


def powerqr(
    A: LinearMap,
    k: int,
    *,
    iterations: int | None = None,
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    shift: float = SHIFT,
) -> Estimate:
    """Compute the k largest singular triplets by the paper's PowerQR, mended and verified.

    X ← qr(μX + BX): orthogonal iteration on B + μI, with σ_i = sqrt(|R_ii| − μ). Mended: |R_ii| instead of R_ii
    (QR may return a negative one), μ relative to σ₁² instead of 1 (else the rate depends on the scale of the
    weights), Ritz values in float64 at the end (else float32 leaves a floor of 1e-3 under small values), a
    residual test instead of a fixed count. Column i converges by (σ_{i+1}² + μ)/(σ_i² + μ) an iteration, the
    subspace by (σ_{k+1}² + μ)/(σ_k² + μ).

    Costs k pairs an iteration.

    Args:
        A: The operator.
        k: How many, with multiplicity; clamped to min(m, n).
        iterations: Most iterations; None leaves it to ``tol`` and ``max_matvecs``.
        tol: Bound on ‖r‖/σ₁ of every pair for ``converged``.
        max_matvecs: Most applications of A plus of Aᵀ; default 2·(2000 + 1000k).
        seed: Enters the start vectors beside the operator itself.
        progress: Told about every convergence test.
        shift: μ in units of σ̂₁².

    **Source:** Ebrahimpour Boroojeny, Telgarsky and Sundaram, "Spectrum extraction and clipping for implicitly
    linear layers", AISTATS 2024, algorithm 1.
    """
    with exact_arithmetic(), torch.no_grad():
        gram = Gram(A)
        k = min(k, gram.size)
        pairs = (max_matvecs if max_matvecs is not None else 2 * (2000 + 1000 * k)) // 2
        digest = fingerprint(A)
        if not begin(gram, generator(digest, seed, "scale")):
            return zero_estimate(gram, k)
        if gram.size <= 2 * k:
            return exhaust(gram, k, tol)
        x = gram.random(k, generator(digest, seed, "powerqr"))
        x, largest, worst, count = torch.linalg.qr(x.T).Q.T, 0.0, math.inf, 0
        while worst > 0.9 * tol:
            # Invariant: x has orthonormal rows; worst is their largest relative residual one step earlier.
            left = pairs - gram.applications // 2 - _closing(pairs, k, gram)
            if left < k or (iterations is not None and count == iterations):
                break
            image = gram(x)
            worst, largest, least = _residual(x, image)
            x = torch.linalg.qr((shift * largest * x + image).T).Q.T
            count += 1
            progress(Step("powerqr", index=count, matvecs=gram.applications, residual=worst))
            if _exhausted(gram, worst, largest, least, tol):
                gram, worst = gram.double(), math.inf
                x = gram.take(x)
        return conclude(gram, x, k, tol, worst, digest, seed, pairs)


def powerqr_published(
    A: LinearMap, k: int, iterations: int, seed: int = 0, *, absolute: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run PowerQR exactly as its authors published it; return (values ``(k,)``, vectors ``(k, *in_shape)``).

    For comparisons only. Reports sqrt(|R_ii − 1|): where QR returns R_ii < 0 that is sqrt(σ² + 2). No scaling, μ = 1,
    a fixed count, no residual, values in the order of the columns. Costs k pairs an iteration.

    Args:
        A: The operator.
        k: How many.
        iterations: How many iterations; at least 1.
        seed: Of the Gaussian start.
        absolute: Mend the sign only: report sqrt(|R_ii| − 1).
    """
    start = torch.randn(k, math.prod(A.in_shape), generator=torch.Generator().manual_seed(seed))
    x = start.to(device=A.device, dtype=A.dtype)
    r = torch.zeros(k, k)
    for _ in range(iterations):
        shaped = x.reshape(k, *A.in_shape)
        gradient = A.rmatvec(A.matvec(shaped)).reshape(k, -1)
        q, r = torch.linalg.qr((x + gradient).T)
        x = q.T
    diagonal = r.diagonal()
    squares = (diagonal.abs() - 1.0).clamp(min=0.0) if absolute else (diagonal - 1.0).abs()
    return squares.sqrt(), x.reshape(k, *A.in_shape)


def _one(
    gram: Gram,
    vectors: torch.Tensor,
    largest: float,
    tol: float,
    pairs: int,
    source: Stream,
    progress: Progress,
) -> tuple[Gram, torch.Tensor, float, float]:
    """Iterate one vector on the complement of ``vectors``.

    Returns:
        The operator (in float64 from where float32 did not reach), the row, its Ritz value, its relative residual.
    """
    x = gram.random(1, source)
    for _ in range(2):
        x = x - (x @ vectors.T) @ vectors
        x = x / torch.linalg.vector_norm(x)
    value, residual = 0.0, math.inf
    for count in range(1, pairs + 1):
        # Invariant: x is a unit row of the complement; value and residual belong to the row one step earlier.
        y = gram(x)
        y = y - (y @ vectors.T) @ vectors
        value, norm = float(inner(x, y)), length(y)
        first = max(value, largest)
        if norm <= NOISE * torch.finfo(gram.dtype).eps * first and gram.double() is gram:
            return gram, x, 0.0, 0.0
        floor = torch.finfo(torch.float64).eps * first
        residual = length(y - value * x) / math.sqrt(max(value, floor) * first) if first > 0.0 else 0.0
        if count % 16 == 0:
            progress(Step("power", index=len(vectors), matvecs=gram.applications, residual=residual))
        if first == 0.0:
            break
        if _exhausted(gram, residual, first, value, tol):
            gram, residual = gram.double(), math.inf
            x, vectors = gram.take(x), gram.take(vectors)
            continue
        # Deflation and rounding leave a trace of the first vectors that the iteration would grow again.
        x = y / norm
        x = x - (x @ vectors.T) @ vectors
        # The Rayleigh–Ritz step at the end mixes the residuals of all vectors.
        if residual <= 0.7 * tol:
            break
    return gram, x / torch.linalg.vector_norm(x), value, residual


def _residual(x: torch.Tensor, image: torch.Tensor) -> tuple[float, float, float]:
    """Return (largest relative residual of the Ritz pairs in the span of ``x``, largest and least Ritz value)."""
    projected = inner(x, image)
    values, turn = torch.linalg.eigh(0.5 * (projected + projected.T))
    turn, largest = turn.T, float(values[-1])
    errors = torch.linalg.vector_norm(
        turn @ wide(image).cpu() - values[:, None] * (turn @ wide(x).cpu()), dim=1
    )
    floor = torch.finfo(torch.float64).eps * largest
    return float((errors / (values.clamp(min=floor) * largest).sqrt()).max()), largest, float(values[0])


def _exhausted(gram: Gram, residual: float, first: float, value: float, tol: float) -> bool:
    """Whether the residual is down to rounding, that is more than the tolerance, and float64 is to be had."""
    unit = NOISE * torch.finfo(gram.dtype).eps
    reach = unit * math.sqrt(first / max(value, unit * first))
    return reach > 0.5 * tol and residual <= 16.0 * reach and gram.double() is not gram


def _closing(pairs: int, k: int, gram: Gram) -> int:
    """Pairs set aside for the verification and the polish."""
    return k + min(CLOSING, pairs // 4) + reserve(gram)
