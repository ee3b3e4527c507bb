"""Structure theorems: operators whose singular values need no iteration."""

from __future__ import annotations

import math
from functools import singledispatch
from math import gcd, prod

import numpy as np
import torch
from torch import Tensor

from spectool.linear import (
    Adjoint,
    Composed,
    ConvMap,
    DiagonalMap,
    LinearMap,
    MatrixMap,
    Reshaped,
    Scaled,
    SeparableMap,
    magnitude,
)
from spectool.spectrum.dense import Solved, affordable, dense, matrix_levels
from spectool.spectrum.independent import solve_parts
from spectool.spectrum.levels import EPS, Levels, products
from spectool.spectrum.padding import is_copying
from spectool.spectrum.parts import parts_of
from spectool.spectrum.periodic import grid_levels
from spectool.spectrum.stencil import convolution_of
from spectool.spectrum.symbol import frequency_work, polynomial
from spectool.spectrum.thin import thin_product

_CIRCULAR_WORK = 2e11


@singledispatch
def closed_form(A: LinearMap, k: int) -> Solved | None:
    """Return the k largest singular values of A by a structure theorem, or None if none applies.

    Costs no matvecs. Rounding is enclosed: each value ∓ c·eps·size·σ₁, c between 2 and 8 (``dense``, ``symbol``
    and ``levels`` state theirs). A theorem never lists fewer than the k largest, and counts repeats.

    ====================================  =====================================================================
    map                                   theorem
    ====================================  =====================================================================
    ``MatrixMap``, small                  dense factorisation
    ``DiagonalMap``                       |scale|, once per entry
    ``SeparableMap``                      products of the factors' singular values, once per channel
    ``ConvMap``, transposed or not        circulant: symbol on the FFT grid; otherwise cut into independent
                                          problems (groups, classes of the dilation, windows that do not
                                          overlap) if all are small or products
    ``Scaled``, ``Adjoint``, ``Reshaped``  those of the inner map
    ``Composed``                          chains that fold into one of the above; a chain of matrices with a
                                          small inner dimension by QR of its factors
    ====================================  =====================================================================

    Args:
        A: The map.
        k: How many, at most min(m, n).

    Example:
        >>> solved = closed_form(DiagonalMap(torch.tensor([2.0, -3.0]), (2, 4, 4)), 3)
        >>> solved.method, solved.levels.values.tolist(), solved.levels.count.tolist()
        ('exact:diagonal', [3.0, 2.0], [16, 16])
    """
    return None


@closed_form.register
def _matrix(A: MatrixMap, k: int) -> Solved | None:
    return dense(A, k) if affordable(A) else None


@closed_form.register
def _diagonal(A: DiagonalMap, k: int) -> Solved | None:
    scale = A.scale.detach().double().abs().flatten().cpu().numpy()
    repeats = prod(A.in_shape) // max(1, scale.size)
    values, counts = np.unique(scale, return_counts=True)
    # A batch norm's scale was computed: var + eps, the root, its inverse and γ times it, each rounded by eps/2.
    levels = Levels.around(values, values * (3 * EPS), counts * repeats)
    return Solved(levels, "exact:diagonal", "a diagonal operator: its entries")


@closed_form.register
def _separable(A: SeparableMap, k: int) -> Solved | None:
    ones = Levels.around(np.ones(1), 0.0, A.channels)
    return _kronecker(ones, [factor.detach().double() for factor in A.factors], k)


@closed_form.register
def _scaled(A: Scaled, k: int) -> Solved | None:
    inner = closed_form(A.inner, k)
    if inner is None:
        return None
    scaled = inner.levels.scaled(abs(A.factor))
    widened = Levels(scaled.values, scaled.lower * (1 - EPS), scaled.upper * (1 + EPS), scaled.count)
    return Solved(widened, inner.method, inner.why, matvecs=inner.matvecs)


@closed_form.register(Adjoint)
@closed_form.register(Reshaped)
def _inner(A: Adjoint | Reshaped, k: int) -> Solved | None:
    return closed_form(A.inner, k)


@closed_form.register
def _composed(A: Composed, k: int) -> Solved | None:
    if len(A.maps) == 1:
        return closed_form(A.maps[0], k)
    conv = convolution_of(A)
    if conv is not None:
        return closed_form(conv, k)
    thin = thin_product(A, k)
    if thin is not None:
        return thin
    matrix = _product_of_matrices(A)
    if matrix is not None:
        product, rounding = matrix
        levels = matrix_levels(product, k)
        wide = Levels(
            levels.values, np.maximum(levels.lower - rounding, 0), levels.upper + rounding, levels.count
        )
        return Solved(
            wide, "dense", f"a chain of matrices: one {product.shape[0]} × {product.shape[1]} matrix"
        )
    return _chain_of_products(A, k)


@closed_form.register
def _convolution(A: ConvMap, k: int) -> Solved | None:
    circular = _circulant(A, k)
    if circular is not None:
        return circular
    parts = parts_of(A)
    if not parts and not is_copying(A):
        return Solved(Levels.nothing(), "exact:zero", "every tap that reads a pixel is zero")
    return solve_parts(parts, k)


# --- circulant -----------------------------------------------------------------------------------------------


def _circulant(A: ConvMap, k: int) -> Solved | None:
    """Solve a convolution on a torus: circular padding that covers the kernel exactly, stride dividing the size.

    With total padding d(k−1) and s | n, output j reads positions s·j + d·t modulo n up to a shift: a circulant in
    polyphase form on n/s frequencies.
    """
    geometry, sizes, kernel = A.geometry, A.in_shape[1:], tuple(A.weight.shape[2:])
    if geometry.transposed or geometry.padding_mode != "circular":
        return None
    if any(
        sum(pads) != d * (taps - 1) or n % s
        for pads, d, taps, n, s in zip(
            geometry.padding, geometry.dilation, kernel, sizes, geometry.stride, strict=True
        )
    ):
        return None
    weight = A.weight.detach().cpu().double().reshape(geometry.groups, -1, *A.weight.shape[1:])
    for axis, d in enumerate(geometry.dilation):
        weight = _dilated(weight, 3 + axis, d // gcd(d, geometry.stride[axis]))
    stride = [s // gcd(d, s) for s, d in zip(geometry.stride, geometry.dilation, strict=True)]
    grid = tuple(n // s for n, s in zip(sizes, geometry.stride, strict=True))
    symbol = polynomial(weight, stride)
    _, taps, out, channels = symbol.coefficients.shape
    if prod(grid) / 2 * frequency_work(symbol.groups, out, channels, taps) > _CIRCULAR_WORK:
        return None
    levels = grid_levels(symbol, grid, k)
    return Solved(levels, "exact:circular", f"a circulant: its symbol at {prod(grid)} frequencies")


def _dilated(weight: Tensor, axis: int, d: int) -> Tensor:
    """Insert d − 1 zero taps between taps."""
    if d == 1:
        return weight
    shape = list(weight.shape)
    shape[axis] = d * (shape[axis] - 1) + 1
    wide = weight.new_zeros(shape)
    wide[(slice(None),) * axis + (slice(None, None, d),)] = weight
    return wide


# --- products -----------------------------------------------------------------------------------------------


def _kronecker(channels: Levels, factors: list[Tensor], k: int, errors: list[float] | None = None) -> Solved:
    """Solve a product of one-dimensional operators, each known up to an error in norm."""
    pieces = [channels]
    for factor, error in zip(factors, errors or [0.0] * len(factors), strict=True):
        levels = matrix_levels(factor.cpu(), min(factor.shape))
        lower, upper = np.maximum(levels.lower - error, 0), levels.upper + error
        pieces.append(Levels(levels.values, lower, upper, levels.count))
    return Solved(
        products(pieces, k), "exact:separable", f"a product of {len(factors)} one-dimensional operators"
    )


def _product_of_matrices(A: Composed) -> tuple[Tensor, float] | None:
    """Multiply a chain of matrices and diagonals of vectors in float64; None if it is something else or large.

    The second value bounds the rounding of the product in norm: eps·Σ(inner sizes + 2)·Π‖A_i‖_F, or the same with
    the norm of |A₁||A₂|… where that is smaller.
    """
    if any(not isinstance(part, (MatrixMap, DiagonalMap)) or len(part.in_shape) != 1 for part in A.maps):
        return None
    m, n = prod(A.out_shape), prod(A.in_shape)
    widest = max(prod(part.out_shape) for part in A.maps)
    if min(m, n) > 1024 or m * n > 1 << 26 or 2.0 * m * n * widest > 1e11:
        return None
    # From the narrow end: the running product keeps the smaller outer dimension.
    maps = list(A.maps) if m <= n else list(reversed(A.maps))
    product: Tensor | None = None
    norms, inner = 1.0, 0
    for part in maps:
        product = _times(product, part, from_left=m <= n)
        factor = part.weight if isinstance(part, MatrixMap) else getattr(part, "scale", torch.zeros(0))
        norms *= float(torch.linalg.vector_norm(factor.detach().double()))
        inner += prod(part.in_shape) + 2
    if product is None:
        return None
    bulk = magnitude(A)
    if bulk is not None:  # entry by entry, which knows scales that undo each other
        return product, EPS * min(inner * norms, bulk.total * bulk.norm())
    return product, EPS * inner * norms


def _times(product: Tensor | None, part: LinearMap, *, from_left: bool) -> Tensor:
    """Return product·part, or part·product."""
    if isinstance(part, MatrixMap):
        matrix = part.weight.detach().double()
        if product is None:
            return matrix
        return product @ matrix if from_left else matrix @ product
    scale = part.scale.detach().double().to(part.device) if isinstance(part, DiagonalMap) else None
    if scale is None:
        raise TypeError(f"no matrix: {type(part).__name__}")
    if product is None:
        return torch.diag(scale)
    return product * scale if from_left else scale[:, None] * product


def _chain_of_products(A: Composed, k: int) -> Solved | None:
    """Solve a chain of separable maps and per-channel scales: the factors multiply axis by axis."""
    scale: Tensor | None = None
    factors: list[Tensor] | None = None
    bulks: list[Tensor] = []
    lengths = 0
    for part in A.maps:
        if isinstance(part, SeparableMap):
            own = [factor.detach().double() for factor in part.factors]
            if factors is not None and len(factors) != len(own):
                return None
            if factors is None:
                factors, bulks = own, [factor.abs() for factor in own]
                continue
            lengths += max(factor.shape[0] for factor in own) + 2
            factors = [a @ b for a, b in zip(factors, own, strict=True)]
            bulks = [a @ b.abs() for a, b in zip(bulks, own, strict=True)]
        elif isinstance(part, DiagonalMap) and part.scale.ndim == 1 and part.axis == 0:
            own_scale = part.scale.detach().double().cpu()
            scale = own_scale if scale is None else scale * own_scale
        else:
            return None
    if factors is None:
        return None
    channels = A.in_shape[0]
    # Entry by entry a product of factors is wrong by at most γ·|A₁||A₂|…, whose norm its row and column sums bound.
    errors = [
        EPS * lengths * math.sqrt(float(bulk.sum(dim=0).max() * bulk.sum(dim=1).max())) for bulk in bulks
    ]
    if scale is None:
        return _kronecker(Levels.around(np.ones(1), 0.0, channels), factors, k, errors)
    values, counts = np.unique(scale.abs().numpy(), return_counts=True)
    return _kronecker(Levels.around(values, values * (2 * EPS * len(A.maps)), counts), factors, k, errors)
