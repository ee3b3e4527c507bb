"""Singular values of small operators from a dense factorisation in float64, rounding enclosed.

Two routes. An SVD is accurate to c·eps·σ₁ in every value. The eigenvalues of the Gram matrix on the smaller side
are accurate to c·eps·σ₁² in σ², hence only to c·eps·σ₁²/σ in σ: it serves where the matrix is large and only
large values are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spectool.errors import OperatorError
from spectool.linear import (
    LinearMap,
    MatrixMap,
    Recast,
    adjoint,
    is_single,
    magnitude,
    normal_matvec,
    size,
    to_dense,
)
from spectool.spectrum.levels import EPS, TINY, Levels
from spectool.spectrum.rounding import PROBES, SAFETY, USUAL
from spectool.spectrum.starts import Stream

if TYPE_CHECKING:
    from spectool.spectrum.types import UpperKind

SMALL_SIDE = 1024
"""Smaller side up to which ``auto`` takes an operator apart densely."""

SVD_ENTRIES = 1 << 20
"""Number of entries up to which an SVD is preferred to a Gram matrix."""

_AUTO_WORK = 1e11  # flops of the Gram product: about ten seconds of one core
_AUTO_ENTRIES = 1 << 26  # 512 MiB of float64
_STREAM_BYTES = 1 << 28  # of one block of rows while a Gram matrix is summed
_EXACT_BYTES = 16 << 30  # what --method exact may need for one Gram matrix
_ROWS = 512  # rows per partial sum: bounds the rounding of the sum


@dataclass(frozen=True, eq=False)
class Solved:
    """One operator solved by some method, before the result is put in its public form.

    Attributes:
        levels: Its largest singular values, enclosed.
        method: As ``Spectrum.method``.
        why: As ``Spectrum.why``.
        kind: What proves the upper ends.
        exact: Whether multiplicities are proven and everything above the last level is listed.
        converged: As ``Spectrum.converged``.
        matvecs: Operator applications spent.
        residuals: Relative residuals, if there are vectors.
        note: Anything worth saying in words.
        left: Left singular vectors ``(k, *out_shape)``.
        right: Right singular vectors ``(k, *in_shape)``.
        multiplicity: As ``Spectrum.multiplicity``; 0 to count the levels.
        accuracy: What error of the values is to be expected; None for the half-width of their intervals.
    """

    levels: Levels
    method: str
    why: str
    kind: UpperKind = "exact"
    exact: bool = True
    converged: bool = True
    matvecs: int = 0
    residuals: tuple[float, ...] = ()
    note: str = ""
    left: Tensor | None = None
    right: Tensor | None = None
    multiplicity: int = 0
    accuracy: float | None = None


def matrix_levels(matrices: Tensor, k: int) -> Levels:
    """Return the singular values of one matrix or a batch ``(…, m, n)``, at least the k largest of all.

    Each value is enclosed: ∓ 2·eps·(m+n+8)·σ₁ for an SVD (LAPACK is backward stable with a small constant;
    the factor is generous), see ``gram_levels`` for the other route.

    Args:
        matrices: Float64 on any device.
        k: How many are wanted; decides whether a Gram matrix is accurate enough.
    """
    m, n = matrices.shape[-2:]
    if min(m, n) == 0 or matrices.numel() == 0:
        return Levels.nothing()
    if min(m, n) == 1:
        norms = _norms(matrices.reshape(-1, m * n))
        return Levels.around(norms, EPS * (max(m, n) + 8) * norms + 4 * TINY * (norms > 0))
    if m * n > SVD_ENTRIES and matrices.ndim == 2:
        levels = gram_levels(gram(row_blocks(matrices)), max(m, n))
        if _accurate(levels, k):
            return levels
    values = torch.linalg.svdvals(matrices).cpu().numpy()
    # LAPACK scales tiny matrices up and the values down again, to the nearest subnormal number.
    error = 2 * EPS * (m + n + 8) * values[..., :1] + 4 * TINY * (values[..., :1] > 0)
    return Levels.around(values, np.broadcast_to(error, values.shape).reshape(-1))


def _norms(rows: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the norms of ``(b, n)``, without overflow or underflow of the squares."""
    peak = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    norms = torch.linalg.vector_norm(rows / peak, dim=1) * peak[:, 0]
    result: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = norms.cpu().numpy()
    return result


def gram(blocks: Iterator[Tensor]) -> Tensor:
    """Return Σ BᵀB over blocks of rows in float64, summed in slices of 512 rows.

    The rounding error of the sum is then at most (512 + number of slices)·eps·‖A‖_F², far below m·eps.
    """
    total: Tensor | None = None
    for block in blocks:
        for start in range(0, block.shape[0], _ROWS):
            rows = block[start : start + _ROWS].double()
            part = rows.T @ rows
            total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("no rows")
    return total


def gram_rounding(matrix: Tensor, rows: int) -> float:
    """Return a bound on the error of a Gram matrix that ``gram`` summed over ``rows`` rows, in norm."""
    return EPS * (520 + rows / _ROWS) * float(matrix.diagonal().sum())


def gram_levels(matrix: Tensor, rows: int) -> Levels:
    """Return singular values from a Gram matrix ``(n, n)`` that was summed over ``rows`` rows.

    λ is wrong by at most δ: ``gram_rounding``, and 16·n·eps·λ₁ for the eigenvalues. σ then lies in
    [sqrt(λ−δ), sqrt(λ+δ)], which widens for small σ as it must.
    """
    n = matrix.shape[0]
    eigenvalues = torch.linalg.eigvalsh(matrix).flip(0).cpu().numpy()
    delta = gram_rounding(matrix, rows) + EPS * 16 * n * max(float(eigenvalues[0]), 0.0)
    delta += 4 * TINY * rows * (delta > 0)  # squares may underflow
    values = np.sqrt(np.maximum(eigenvalues, 0.0))
    lower = np.sqrt(np.maximum(eigenvalues - delta, 0.0)) * (1 - EPS)
    upper = np.sqrt(np.maximum(eigenvalues, 0.0) + delta) * (1 + EPS)
    return Levels(values, lower, upper, np.ones(n, dtype=np.int64))


def _accurate(levels: Levels, k: int) -> bool:
    """Whether the k largest values of a Gram matrix are known to 1e-9 of σ₁."""
    last = min(k, len(levels.values)) - 1
    return bool(levels.upper[last] - levels.lower[last] <= 1e-9 * levels.values[0])


def row_blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Yield the longer axis of a stored matrix in blocks, so that a Gram matrix has the smaller side."""
    long = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    step = max(1, _STREAM_BYTES // (8 * max(1, long.shape[1])))
    for start in range(0, long.shape[0], step):
        yield long[start : start + step].detach()


def on_host(A: LinearMap) -> LinearMap:
    """Return A where float64 exists: on the CPU if its device is one that lacks it (MPS)."""
    return A.to(device="cpu") if A.device.type == "mps" else A


# --- deciding ------------------------------------------------------------------------------------------------


def affordable(A: LinearMap, work: float = 0.0) -> bool:
    """Whether ``auto`` takes A apart densely: smaller side ≤ 1024, memory and time sensible.

    Args:
        A: The map.
        work: Flops of one application, where known; they count where A has to be applied.
    """
    m, n = size(A)
    short, long = min(m, n), max(m, n)
    if short > SMALL_SIDE or 2.0 * short * short * long > _AUTO_WORK:
        return False
    return isinstance(A, MatrixMap) or (m * n <= _AUTO_ENTRIES and short * work <= _AUTO_WORK)


def dense(A: LinearMap, k: int, *, vectors: bool = False) -> Solved:
    """Return the singular values of A from its dense matrix or its Gram matrix.

    Costs no matvecs for a stored matrix, min(m, n) for any other map (4 more for a function), 2·min(m, n) where it
    does not fit in memory. Arithmetic is float64 where the map allows it.

    Raises:
        OperatorError: If the factorisation would need more than 16 GiB, or the operator has entries that are NaN
            or infinite.
    """
    A = on_host(A)
    m, n = size(A)
    short = min(m, n)
    if 8 * short * short > _EXACT_BYTES or (vectors and 16 * m * n > _EXACT_BYTES):
        raise OperatorError(
            f"a dense factorisation of this {m} × {n} operator needs {8e-9 * short * short:.0f} GB",
            hint="use --method lanczos, which needs only products with the operator",
        )
    why = f"the smaller side of {m} × {n} is {short}"
    matvecs, sample = 0 if isinstance(A, MatrixMap) else short, 0.0
    if vectors:
        return _with_vectors(A, k, why, matvecs)
    if isinstance(A, MatrixMap) and 8 * m * n > _STREAM_BYTES:
        levels = gram_levels(gram(row_blocks(A.weight)), max(m, n))
        if not _accurate(levels, k) and 8 * m * n <= _EXACT_BYTES // 8:
            levels = matrix_levels(A.weight.detach().double(), short)
    elif isinstance(A, MatrixMap):
        levels = matrix_levels(A.weight.detach().double(), k)
    elif 8 * m * n <= _EXACT_BYTES // 8:
        matrix = _finite(to_dense(A))
        levels = matrix_levels(matrix, k)
        sample, spent = _sample(A, matrix)
        matvecs += spent
    else:
        matvecs = 2 * short
        levels = gram_levels(_applied_gram(A), max(m, n))
    return _enclosed(levels, A, sample, Solved(levels, "dense", why, matvecs=matvecs))


def _with_vectors(A: LinearMap, k: int, why: str, matvecs: int) -> Solved:
    matrix = A.weight.detach().double() if isinstance(A, MatrixMap) else _finite(to_dense(A))
    m, n = matrix.shape
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = s.cpu().numpy()
    levels = Levels.around(values, 2 * EPS * (m + n + 8) * values[0])
    sample, spent = (0.0, 0) if isinstance(A, MatrixMap) else _sample(A, matrix)
    top = float(s[0]) or 1.0
    left, right = u[:, :k].T, vh[:k]
    forward = torch.linalg.vector_norm(right @ matrix.T - s[:k, None] * left, dim=1)
    backward = torch.linalg.vector_norm(left @ matrix - s[:k, None] * right, dim=1)
    residuals = tuple(float(r) / top for r in torch.maximum(forward, backward))
    solved = Solved(
        levels,
        "dense",
        why,
        matvecs=matvecs + spent,
        residuals=residuals,
        left=left.reshape(-1, *A.out_shape).cpu(),
        right=right.reshape(-1, *A.in_shape).cpu(),
    )
    return _enclosed(levels, A, sample, solved)


def _applied_gram(A: LinearMap) -> Tensor:
    """Return AᵀA or AAᵀ on the smaller side from applications to unit vectors, in float64 where A can."""
    m, n = size(A)
    double = (A if n <= m else adjoint(A)).to(dtype=torch.float64)
    short = min(m, n)
    result = torch.empty((short, short), dtype=torch.float64, device=double.device)
    step = max(1, _STREAM_BYTES // (16 * (m + n)))
    for start in range(0, short, step):
        stop = min(short, start + step)
        basis = torch.zeros((stop - start, short), dtype=double.dtype, device=double.device)
        basis[torch.arange(stop - start), torch.arange(start, stop)] = 1
        image = normal_matvec(double, basis.reshape(-1, *double.in_shape))
        result[start:stop] = image.detach().reshape(stop - start, short).double()
    return (result + result.T) / 2


def _finite(matrix: Tensor) -> Tensor:
    if not bool(torch.isfinite(matrix).all()):
        bad = int((~torch.isfinite(matrix)).sum())
        raise OperatorError(f"{bad} of {matrix.numel()} entries of the operator are NaN or infinite")
    return matrix


def arithmetic_eps(A: LinearMap) -> float:
    """Return the unit roundoff that A's applications can reach: float64's, or float32's where A is stuck there."""
    double = A.to(dtype=torch.float64)
    stuck = double.inner if isinstance(double, Recast) else double
    return float(torch.finfo(stuck.dtype).eps)


def _sample(A: LinearMap, matrix: Tensor) -> tuple[float, int]:
    """Measure the rounding in the dense matrix D of a function: the largest ‖Dx − Ax‖ over normal x.

    That is ‖E‖_F on average, E the errors of D, and the error of Ax itself on top.

    Returns:
        The sample, and the matvecs it cost; zeros where the arithmetic can be seen.
    """
    double = A.to(dtype=torch.float64)
    if is_single(double) or magnitude(double) is not None:
        return 0.0, 0
    x = Stream(0).normal(PROBES, matrix.shape[1]).to(double.dtype).to(matrix.device)
    image = double.matvec(x.reshape(-1, *A.in_shape)).detach().reshape(PROBES, -1).to(matrix.dtype)
    difference = torch.linalg.vector_norm(image - x.to(matrix.dtype) @ matrix.T, dim=1)
    return float(difference.max()), PROBES


def _enclosed(levels: Levels, A: LinearMap, sample: float, solved: Solved) -> Solved:
    """Widen the intervals of an operator by the rounding of its own applications.

    One stored operator: each entry came out of a few float64 sums whose terms the operator's norm bounds. A
    composition: entry by entry, E ≤ γ·|A₁||A₂|…, γ = eps·Σ(length + 2) (``linear.magnitude``). A function: what it
    shows (``_sample``), and its type's roundoff at least.
    """
    if isinstance(A, MatrixMap) or not len(levels.values):
        return solved
    double = A.to(dtype=torch.float64)
    bulk = None if is_single(double) else magnitude(double)
    eps, first, accuracy = arithmetic_eps(A), float(levels.values[0]), None
    if bulk is not None:
        extra = EPS * (16 * first + bulk.total * bulk.norm())
    else:
        total = math.sqrt(float((levels.values**2 * levels.count).sum())) if eps > EPS else 2.0 * first
        extra = 8 * eps * total + SAFETY * sample
        if not is_single(double):
            accuracy = 16 * EPS * first + USUAL * sample / math.sqrt(2.0 * min(size(A)))
    widened = Levels(levels.values, np.maximum(levels.lower - extra, 0.0), levels.upper + extra, levels.count)
    return replace(solved, levels=widened, accuracy=accuracy)
