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
from spectool.spectrum.gram import Gram, wide
from spectool.spectrum.starts import fingerprint, generator

if TYPE_CHECKING:
    from spectool.linear import LinearMap
    from spectool.spectrum.estimate import Estimate

SHIFT = 0.01
"""μ of PowerQR in units of σ₁². The paper's μ = 1 in absolute units makes the rate depend on the weights' scale."""

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
        if not gram.prescale(generator(digest, seed, "scale")):
            return zero_estimate(gram, k)
        if gram.size <= 2 * k:
            return exhaust(gram, k, tol)
        gram = _resolving(gram, tol)
        source = generator(digest, seed, "power")
        vectors = torch.empty(0, gram.size, dtype=gram.dtype, device=gram.device)
        largest, worst = 0.0, 0.0
        for index in range(k):
            left = pairs - gram.applications // 2 - _closing(pairs, k)
            row, value, residual = _one(
                gram, vectors, largest, tol, max(1, left // (k - index)), source, progress
            )
            vectors = torch.cat([vectors, row])
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
        if not gram.prescale(generator(digest, seed, "scale")):
            return zero_estimate(gram, k)
        if gram.size <= 2 * k:
            return exhaust(gram, k, tol)
        gram = _resolving(gram, tol)
        x = gram.random(k, generator(digest, seed, "powerqr"))
        x, largest, worst, count = torch.linalg.qr(x.T).Q.T, 0.0, math.inf, 0
        while worst > 0.9 * tol:
            # Invariant: x has orthonormal rows; worst is their largest relative residual one step earlier.
            left = pairs - gram.applications // 2 - _closing(pairs, k)
            if left < k or (iterations is not None and count == iterations):
                break
            image = gram(x)
            worst, largest = _residual(x, image)
            x = torch.linalg.qr((shift * largest * x + image).T).Q.T
            count += 1
            progress(Step("powerqr", index=count, matvecs=gram.applications, residual=worst))
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
    source: torch.Generator,
    progress: Progress,
) -> tuple[torch.Tensor, float, float]:
    """Iterate one vector on the complement of ``vectors``; return (row, Ritz value, relative residual)."""
    x = gram.random(1, source)
    for _ in range(2):
        x = x - (x @ vectors.T) @ vectors
        x = x / torch.linalg.vector_norm(x)
    value, residual = 0.0, math.inf
    for count in range(1, pairs + 1):
        # Invariant: x is a unit row of the complement; value and residual belong to the row one step earlier.
        y = gram(x)
        y = y - (y @ vectors.T) @ vectors
        value = float(torch.linalg.vecdot(x, y)[0])
        scale = max(value, largest)
        norm = float(torch.linalg.vector_norm(y))
        if scale <= 0.0 or norm <= torch.finfo(y.dtype).eps * scale:
            return x, 0.0, 0.0
        error = float(torch.linalg.vector_norm(y - value * x))
        residual = error / math.sqrt(value * scale)
        if count % 16 == 0:
            progress(Step("power", index=len(vectors), matvecs=gram.applications, residual=residual))
        x = y / norm
        # Deflation and rounding leave a trace of the first vectors that the iteration would grow again.
        x = x - (x @ vectors.T) @ vectors
        # The Rayleigh–Ritz step at the end mixes the residuals of all vectors.
        if residual <= 0.7 * tol:
            break
    return x / torch.linalg.vector_norm(x), value, residual


def _residual(x: torch.Tensor, image: torch.Tensor) -> tuple[float, float]:
    """Return (largest relative residual of the Ritz pairs in the span of ``x``, largest Ritz value)."""
    projected = wide(x @ image.T)
    values, turn = torch.linalg.eigh(0.5 * (projected + projected.T))
    turn = turn.T
    errors = torch.linalg.vector_norm(turn @ wide(image) - values[:, None] * (turn @ wide(x)), dim=1)
    largest = float(values[-1])
    floor = torch.finfo(torch.float64).eps * largest
    return float((errors / (values.clamp(min=floor) * largest).sqrt()).max()), largest


def _resolving(gram: Gram, tol: float) -> Gram:
    """Return the operator in float64 if float32 cannot reach ``tol``."""
    return gram.double() if tol < 16.0 * torch.finfo(gram.dtype).eps else gram


def _closing(pairs: int, k: int) -> int:
    """Pairs set aside for the verification and the polish."""
    return k + min(CLOSING, pairs // 4)
