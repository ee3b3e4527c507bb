"""What can be asked of any map: dense matrix, adjoint test, norm, size."""

from __future__ import annotations

import math
from typing import Any

import torch

from spectool.linear.protocol import LinearMap


def size(A: LinearMap) -> tuple[int, int]:
    """Return (m, n): entries of one output and of one input.

    Example:
        >>> from spectool.linear import MatrixMap
        >>> size(MatrixMap(torch.ones(2, 3)))
        (2, 3)
    """
    return math.prod(A.out_shape), math.prod(A.in_shape)


def normal_matvec(A: LinearMap, x: torch.Tensor) -> torch.Tensor:
    """Apply AᵀA to ``(b, *in_shape)``, reading the weights once where the map can. Costs 2b matvecs."""
    fused = getattr(A, "normal_matvec", None)
    result: torch.Tensor = fused(x) if fused else A.rmatvec(A.matvec(x))
    return result


def frobenius(A: LinearMap) -> float | None:
    """Return ‖A‖_F from a closed form in float64, or None where there is none. Costs no matvecs."""
    closed: Any = getattr(A, "frobenius", None)
    return None if closed is None else closed()


def all_finite(A: LinearMap) -> bool:
    """Return whether the map's weights hold no NaN and no infinity; without a copy of them."""
    own: Any = getattr(A, "all_finite", None)
    if own is not None:
        return bool(own())
    probe = torch.ones((1, *A.in_shape), dtype=A.dtype, device=A.device)
    image = A.matvec(probe)
    return bool(torch.isfinite(image).all())


def to_dense(A: LinearMap, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the matrix ``(m, n)`` of A on its device, rows and columns in row-major order of the shapes.

    Costs min(m, n) matvecs, in batches. The arithmetic is done in ``dtype`` where the map can follow.
    """
    A = A.to(dtype=dtype)
    m, n = size(A)
    dense = torch.empty((m, n), dtype=dtype, device=A.device)
    short = min(m, n)
    batch = max(1, min(short, (1 << 23) // max(m + n, 1)))
    for start in range(0, short, batch):
        count = min(batch, short - start)
        basis = torch.zeros((count, short), dtype=A.dtype, device=A.device)
        basis[torch.arange(count), torch.arange(start, start + count)] = 1
        if n <= m:
            image = A.matvec(basis.reshape(count, *A.in_shape))
            dense[:, start : start + count] = image.detach().reshape(count, m).T
        else:
            image = A.rmatvec(basis.reshape(count, *A.out_shape))
            dense[start : start + count] = image.detach().reshape(count, n)
    return dense


def dot_test(A: LinearMap, *, seed: int = 0) -> float:
    """Return |⟨Ax, y⟩ − ⟨x, Aᵀy⟩| relative to ‖Ax‖‖y‖ for random x, y: rounding if ``rmatvec`` is the adjoint."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((1, *A.in_shape), generator=generator, dtype=torch.float64)
    y = torch.randn((1, *A.out_shape), generator=generator, dtype=torch.float64)
    ax = A.matvec(x.to(A.dtype).to(A.device)).detach().cpu().double()
    aty = A.rmatvec(y.to(A.dtype).to(A.device)).detach().cpu().double()
    x, y = x.to(A.dtype).double(), y.to(A.dtype).double()
    scale = max(float(ax.norm() * y.norm()), float(x.norm() * aty.norm()))
    defect = abs(float((ax * y).sum() - (x * aty).sum()))
    return defect / scale if scale > 0 else defect


def prescale(A: LinearMap) -> tuple[LinearMap, float]:
    """Return (A', factor) with A = factor·A' and the entries of A' of magnitude ~1; factor is a power of two."""
    own: Any = getattr(A, "prescale", None)
    if own is not None:
        scaled, factor = own()
        return scaled, float(factor)
    return A, 1.0
