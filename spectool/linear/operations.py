"""What can be asked of any map: dense matrix, adjoint test, norm, finiteness, scale."""

from __future__ import annotations

import math
from typing import Any

import torch

from spectool.linear.compose import Adjoint, Composed, Recast, Reshaped, Scaled, adjoint
from spectool.linear.fold import fold
from spectool.linear.protocol import LinearMap
from spectool.linear.scaling import power_below, power_product, to_double

_BATCH_ENTRIES = 1 << 22  # entries of a batch of vectors, in and out together: 32 MB in float64


def size(A: LinearMap) -> tuple[int, int]:
    """Return (m, n): entries of one output and of one input.

    Example:
        >>> from spectool.linear import MatrixMap
        >>> size(MatrixMap(torch.ones(2, 3)))
        (2, 3)
    """
    return math.prod(A.out_shape), math.prod(A.in_shape)


def normal_matvec(A: LinearMap, x: torch.Tensor) -> torch.Tensor:
    """Apply AᵀA to ``(b, *in_shape)``, reading the weights once where the map can.

    Costs 2b matvecs. The adjoint of a map gives AAᵀ.

    Example:
        >>> from spectool.linear import MatrixMap
        >>> normal_matvec(MatrixMap(torch.tensor([[3.0, 4.0]])), torch.tensor([[1.0, 0.0]])).tolist()
        [[9.0, 12.0]]
    """
    fused: Any = getattr(A, "normal_matvec", None)
    result: torch.Tensor = fused(x) if fused else A.rmatvec(A.matvec(x))
    return result


def frobenius(A: LinearMap) -> float | None:
    """Return ‖A‖_F from a closed form in float64, or None where there is none. Costs no matvecs.

    A composition has one only if it folds into a single map (a convolution and its batch norm).

    Example:
        >>> from spectool.linear import MatrixMap
        >>> frobenius(MatrixMap(torch.tensor([[3.0, 4.0]])))
        5.0
    """
    match A:
        case Adjoint() | Reshaped() | Recast():
            return frobenius(A.inner)
        case Scaled():
            inner = frobenius(A.inner)
            return None if inner is None else abs(A.factor) * inner
        case Composed():
            folded = fold(A)
            return None if isinstance(folded, Composed) else frobenius(folded)
    closed: Any = getattr(A, "frobenius", None)
    return None if closed is None else float(closed())


def all_finite(A: LinearMap) -> bool:
    """Return whether the map's weights hold no NaN and no infinity, without a copy of them.

    A map that does not show its weights is tried on one vector instead (2 matvecs).

    Example:
        >>> from spectool.linear import MatrixMap
        >>> all_finite(MatrixMap(torch.tensor([[1.0, float("nan")]])))
        False
    """
    match A:
        case Adjoint() | Reshaped() | Recast() | Scaled():
            return all_finite(A.inner)
        case Composed():
            return all(all_finite(part) for part in A.maps)
    own: Any = getattr(A, "all_finite", None)
    if own is not None:
        return bool(own())
    image = A.matvec(torch.ones((1, *A.in_shape), dtype=A.dtype, device=A.device))
    back = A.rmatvec(torch.ones_like(image))
    return bool(torch.isfinite(image).all()) and bool(torch.isfinite(back).all())


def prescale(A: LinearMap) -> tuple[LinearMap, float]:
    """Return (A', factor) with A = factor·A', the weights of A' of magnitude ~1, and factor a power of two.

    Float32 iterations on A' neither overflow nor fall into denormals, whatever the weights' scale. Kernels,
    diagonals and factors are divided in float64 before they are cast; a matrix is not copied (its vectors
    carry the factor) unless it lies outside float32 altogether; a function is wrapped by what one random vector
    shows. No norm is estimated: σ₁ of A' may still be some hundreds for a large operator. A zero map, and one
    with NaN or infinite weights, comes back with factor 1.

    Example:
        >>> from spectool.linear import MatrixMap
        >>> small, factor = prescale(MatrixMap(torch.tensor([[3e-33]])))
        >>> 0.5 < float(small.matvec(torch.ones(1, 1))) <= 2, factor < 1e-32
        (True, True)
    """
    match A:
        case Adjoint():
            inner, factor = prescale(A.inner)
            return adjoint(inner), factor
        case Reshaped():
            inner, factor = prescale(A.inner)
            return Reshaped(inner, in_shape=A.in_shape, out_shape=A.out_shape), factor
        case Recast():
            inner, factor = prescale(A.inner)
            return Recast(inner, A.dtype), factor
        case Scaled():
            inner, factor = prescale(A.inner)
            size = power_below(abs(A.factor))
            return Scaled(inner, A.factor / size), power_product((factor, size))
        case Composed():
            pairs = [prescale(part) for part in A.maps]
            return Composed(*(part for part, _ in pairs)), power_product(factor for _, factor in pairs)
    own: Any = getattr(A, "prescale", None)
    if own is not None:
        scaled, factor = own()
        return scaled, float(factor)
    x = _random(A.in_shape, A, seed=0)
    gain = float(to_double(A.matvec(x)).norm() / to_double(x).norm())
    factor = power_below(gain)
    return (A, 1.0) if factor == 1.0 else (Scaled(A, 1 / factor), factor)


def _random(shape: tuple[int, ...], A: LinearMap, *, seed: int) -> torch.Tensor:
    """Return one standard normal vector, drawn on the CPU in float64 so that devices agree."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((1, *shape), generator=generator, dtype=torch.float64)
    return x.to(A.dtype).to(A.device)


def to_dense(A: LinearMap, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the matrix ``(m, n)`` of A on its device, rows and columns in row-major order of the shapes.

    Costs min(m, n) matvecs, in batches, of A or of its adjoint. The arithmetic is done in ``dtype`` where the map
    can follow.

    Example:
        >>> from spectool.linear import DiagonalMap
        >>> to_dense(DiagonalMap(torch.tensor([2.0, 3.0]), (2,))).tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """
    on_cpu = A.device.type == "mps" and dtype == torch.float64  # which has no float64
    A = A.to(dtype=dtype, device="cpu" if on_cpu else None)
    m, n = size(A)
    by_columns = n <= m
    count = min(m, n)
    dense = torch.empty((m, n), dtype=dtype, device=A.device)
    batch = max(1, min(count, _BATCH_ENTRIES // (m + n)))
    for start in range(0, count, batch):
        stop = min(start + batch, count)
        basis = torch.zeros((stop - start, count), dtype=A.dtype, device=A.device)
        basis.diagonal(start).fill_(1)
        if by_columns:
            dense[:, start:stop] = A.matvec(basis.reshape(-1, *A.in_shape)).detach().reshape(-1, m).T
        else:
            dense[start:stop] = A.rmatvec(basis.reshape(-1, *A.out_shape)).detach().reshape(-1, n)
    return dense


def dot_test(A: LinearMap, *, seed: int = 0) -> float:
    """Return |⟨Ax, y⟩ − ⟨x, Aᵀy⟩| / max(‖Ax‖‖y‖, ‖x‖‖Aᵀy‖) for random x and y.

    Rounding (1e-7 in float32, 1e-16 in float64) if ``rmatvec`` is the adjoint of ``matvec``, and of order one over
    the root of the size if it is not. Costs 2 matvecs.

    Example:
        >>> from spectool.linear import MatrixMap
        >>> dot_test(MatrixMap(torch.ones(2, 3))) < 1e-6
        True
    """
    x, y = _random(A.in_shape, A, seed=seed), _random(A.out_shape, A, seed=seed + 1)
    image, back = A.matvec(x).detach(), A.rmatvec(y).detach()
    x, y, image, back = (vector.cpu().double() for vector in (x, y, image, back))
    size = max(float(image.norm() * y.norm()), float(x.norm() * back.norm()))
    defect = abs(float((image * y).sum() - (x * back).sum()))
    return defect / size if size > 0 else defect
