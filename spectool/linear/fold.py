"""Absorbing diagonal maps into their neighbours: a convolution and its batch norm are one convolution."""

from __future__ import annotations

import torch

from spectool.linear.compose import Composed
from spectool.linear.conv import ConvMap
from spectool.linear.diagonal import DiagonalMap
from spectool.linear.matrix import MatrixMap
from spectool.linear.protocol import LinearMap
from spectool.linear.scaling import to_double

_LARGEST = 1 << 24  # entries of a matrix that is still copied in float64 to absorb a diagonal


def fold(A: LinearMap) -> LinearMap:
    """Return the same operator with per-channel scales multiplied into the kernels beside them.

    Exact in float64; a composition of one convolution and batch norms becomes a single ``ConvMap``. Weights above
    16 M entries are left alone. Anything else than a composition is returned as it is.

    Example:
        >>> pair = Composed(DiagonalMap(torch.tensor([2.0]), (1,)), MatrixMap(torch.tensor([[3.0, 1.0]])))
        >>> fold(pair).weight.tolist()
        [[6.0, 2.0]]
    """
    if not isinstance(A, Composed):
        return A
    maps = list(A.maps)
    position = 0
    while position + 1 < len(maps):
        merged = _merge(maps[position], maps[position + 1])
        if merged is None:
            position += 1
        else:
            maps[position : position + 2] = [merged]
            position = max(position - 1, 0)
    return maps[0] if len(maps) == 1 else Composed(*maps)


def _merge(left: LinearMap, right: LinearMap) -> LinearMap | None:
    """Return the product of two neighbours as one map of a known kind, or None."""
    if isinstance(left, DiagonalMap) and isinstance(right, DiagonalMap):
        shape = left.in_shape
        scale = to_double(left.full_scale()) * to_double(right.full_scale())
        if left.per_channel and right.per_channel:
            return DiagonalMap(scale.reshape(shape[0], -1)[:, 0], shape, dtype=left.dtype, device=left.device)
        return DiagonalMap(scale.expand(shape), shape, dtype=left.dtype, device=left.device)
    if isinstance(left, DiagonalMap) and left.per_channel:
        return _scale(right, left.scale, outputs=True)
    if isinstance(right, DiagonalMap) and right.per_channel:
        return _scale(left, right.scale, outputs=False)
    return None


def _scale(A: LinearMap, scale: torch.Tensor, *, outputs: bool) -> LinearMap | None:
    """Return A with its output (or input) channels multiplied by ``scale``."""
    if isinstance(A, MatrixMap) and A.weight.numel() <= _LARGEST:
        weight = to_double(A.weight)
        factor = scale.to(weight.device).double()
        weight = weight * (factor[:, None] if outputs else factor)
        return MatrixMap(weight, dtype=A.dtype, device=A.device)
    if isinstance(A, ConvMap):
        groups = A.geometry.groups
        weight = to_double(A.weight)
        factor = scale.to(weight.device).double()
        # The first axis of a stored weight runs over all outputs (all inputs if transposed), group by group; the
        # second over one group's inputs (outputs).
        if outputs != A.geometry.transposed:
            weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        else:
            grouped = weight.reshape(groups, -1, *weight.shape[1:])
            factor = factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
            weight = (grouped * factor).reshape(weight.shape)
        return ConvMap(weight, A.in_shape, A.geometry, dtype=A.dtype, device=A.device)
    return None
