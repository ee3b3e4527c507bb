"""The projection of a matrix on the ball of spectral norm c: its singular values above c become c.

W′ = W − W V diag(1 − c/σ) Vᵀ over the right singular vectors V of the values above c: left vectors are not needed,
and of a large matrix only the leading triplets, if few exceed c.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from spectool.clip.bundle import Projection
from spectool.clip.leading import leading
from spectool.errors import UsageError
from spectool.linear import MatrixMap

_DENSE = 256  # smaller side up to which an SVD is computed directly
_FULL = 1024  # smaller side up to which all eigenvalues of the Gram matrix are computed at once
_GRAM = 6144  # ... and up to which that is quicker than iterating, in float32
_FEW = 24  # values above c that are found by iteration beyond that
_SLAB = 1 << 21  # entries of a slab
_PASSES = 3
_CLOSE = 2e-6


def svd_clip(matrix: Tensor, limit: float, *, seed: int = 0) -> Projection:
    """Return the nearest matrix with spectral norm at most ``limit``: exact.

    A smaller side up to 1024 is treated in float64. Beyond, arithmetic and result are float32: one symmetric
    eigenvalue problem of the smaller side (4096: 15 s of one core), or beyond 6144 the leading triplets if no more
    than two dozen values exceed the limit. A matrix that obeys is returned as it was, in that type.

    Args:
        matrix: ``(m, n)``, or ``(b, m, n)`` for b independent problems; any float type.
        limit: c > 0.
        seed: Of the start vectors for large matrices.

    Raises:
        UsageError: If the limit is not a positive number.

    Example:
        >>> svd_clip(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 2.0).weight.tolist()
        [[2.0, 0.0], [0.0, 1.0]]
    """
    if not (limit > 0 and math.isfinite(limit)):
        raise UsageError(f"a limit must be a positive number, got {limit!r}")
    matrix = matrix.detach()
    if matrix.ndim == 3:
        if min(matrix.shape[1:]) <= _DENSE:
            return _batched(matrix, limit)
        parts = [svd_clip(part, limit, seed=seed) for part in matrix]
        lower = math.sqrt(sum(part.lower**2 for part in parts))
        return Projection(
            torch.stack([part.weight for part in parts]),
            lower,
            "svd",
            sum(part.iterations for part in parts),
            sum(part.applications for part in parts),
        )
    if matrix.shape[0] < matrix.shape[1]:
        found = svd_clip(matrix.T, limit, seed=seed)
        return replace(found, weight=found.weight.T.contiguous())
    if matrix.shape[1] <= _DENSE and matrix.numel() <= _SLAB:
        found = _batched(matrix[None], limit)
        return replace(found, weight=found.weight[0])
    if matrix.shape[1] <= _FULL:
        weight = matrix.double()
        weight = weight.clone() if weight is matrix else weight
        return _by_gram(weight, limit, torch.float64, 0)
    return _large(matrix, limit, seed)


def _batched(matrix: Tensor, limit: float) -> Projection:
    """Clip ``(b, m, n)`` by singular value decompositions."""
    weight = matrix.double().clone()
    values = torch.linalg.svdvals(weight)
    over = (values[:, 0] > limit).nonzero()[:, 0]
    if len(over):
        left, values, right = torch.linalg.svd(weight[over], full_matrices=False)
        excess = (values - limit).clamp_min(0)
        weight[over] -= left @ (excess[:, :, None] * right)
        square = float(excess.square().sum())
    else:
        square = 0.0
    return Projection(weight, math.sqrt(square), "svd", 1, 0)


def _by_gram(weight: Tensor, limit: float, dtype: torch.dtype, spent: int) -> Projection:
    """Clip a tall matrix in place by the eigenvectors of WᵀW; in ``dtype``, slab by slab.

    Squaring loses digits only of values far below σ₁; none is looked at but those above c.
    """
    n = weight.shape[1]
    slabs = torch.split(weight, max(1, _SLAB // n))
    gram = torch.zeros(n, n, dtype=dtype)
    for slab in slabs:
        gram.addmm_(slab.to(dtype).T, slab.to(dtype))
    eigenvalues, vectors = torch.linalg.eigh(gram)
    del gram
    values = eigenvalues.double().clamp_min(0).sqrt()
    over = values > limit
    if not bool(over.any()):
        return Projection(weight, 0.0, "svd", 1, spent)
    right = vectors[:, over]
    del vectors
    shares = (1 - limit / values[over]).to(dtype)
    for slab in slabs:
        block = slab.to(dtype)
        slab -= (((block @ right) * shares) @ right.T).to(slab.dtype)
    change = float(torch.linalg.vector_norm(values[over] - limit))
    return Projection(weight, change * (1 - 16 * torch.finfo(dtype).eps), "svd", 1, spent)


def _large(matrix: Tensor, limit: float, seed: int) -> Projection:
    """Clip a tall matrix by its leading triplets, or by all if many exceed the limit; float32."""
    source = torch.Generator().manual_seed(seed)
    A = MatrixMap(matrix, dtype=torch.float32)
    found = leading(A, _FEW, source, level=limit, tol=0.05)
    spent = found.applications
    if float(found.values[0]) * 1.5 < limit:  # nowhere near: a Ritz value to 5 %
        return Projection(_copy(matrix), 0.0, "svd", 1, spent)
    if matrix.shape[1] <= _GRAM or float(found.values[-1]) > limit:
        top = float(found.values[0])
        # Float32 eigenvalues of WᵀW are good to 1e-6·σ₁²: enough unless c is far below σ₁.
        dtype = torch.float32 if limit > 0.03 * top else torch.float64
        return _by_gram(_copy(matrix), limit, dtype, spent)
    weight = _copy(matrix)
    left, right, sizes = found.left[:0], found.right[:0], found.values[:0]
    for _ in range(_PASSES):
        # Later passes take what the first left above c: the triplets of a cluster are never all exact.
        found = leading(
            MatrixMap(weight),
            _FEW,
            source,
            start=found.right,
            level=limit * (1 - _CLOSE),
            tol=1e-6,
            blocks=200,
        )
        spent += found.applications
        over = found.values > limit * (1 + _CLOSE)
        if not bool(over.any()):
            break
        u, v, excess = found.left[over], found.right[over], found.values[over] - limit
        for slab, rows in zip(
            torch.split(weight, 1024), torch.split(u * excess[:, None], 1024, dim=1), strict=True
        ):
            slab -= rows.T @ v
        left, right, sizes = torch.cat([left, u]), torch.cat([right, v]), torch.cat([sizes, excess])
    return Projection(weight, _bound(A, left, right, sizes, limit), "svd", 1, spent)


def _bound(A: MatrixMap, left: Tensor, right: Tensor, sizes: Tensor, limit: float) -> float:
    """Return (⟨Z, W⟩ − c‖Z‖_*)/‖Z‖ of Z = Σ sizes·u vᵀ: a lower bound on every change that suffices."""
    if not len(sizes):
        return 0.0
    images = A.to(dtype=torch.float64).matvec(right.double())
    left, right, sizes = left.double(), right.double(), sizes.double()
    gain = float((images * left).sum(dim=1) @ sizes)
    core = torch.linalg.qr(left.T).R @ (sizes[:, None] * torch.linalg.qr(right.T).R.T)
    values = torch.linalg.svdvals(core)
    return max(0.0, (gain - limit * float(values.sum())) / float(torch.linalg.vector_norm(values)))


def _copy(matrix: Tensor) -> Tensor:
    copy = matrix.float()
    return copy.clone() if copy is matrix else copy
