"""Small layers for tests of spectra: seeded weights, convolutions in one line, and their dense truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from dense import Matrix, conv_matrix, conv_transpose_matrix

from spectool.linear import ConvGeometry, ConvMap


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float32 weights."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def geometry(
    dims: int,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    mode: Any = "zeros",
    transposed: bool = False,
) -> ConvGeometry:
    """The same geometry along every axis."""
    extra = (0,) * dims if transposed else ()
    return ConvGeometry(
        (stride,) * dims, ((padding,) * 2,) * dims, (dilation,) * dims, groups, mode, transposed, extra
    )


def conv(weight: torch.Tensor, size: tuple[int, ...], **options: Any) -> ConvMap:
    """A convolution of ``weight`` on a map of ``size``."""
    g = geometry(len(size), **options)
    channels = weight.shape[0] if g.transposed else weight.shape[1] * g.groups
    return ConvMap(weight, (channels, *size), g)


def matrix_of(A: ConvMap) -> Matrix:
    """Its dense matrix, without the package."""
    g, weight, size = A.geometry, A.weight.detach().double().numpy(), A.in_shape[1:]
    if g.transposed:
        return conv_transpose_matrix(
            weight, size, g.stride, g.padding, g.dilation, g.groups, g.output_padding
        )
    return conv_matrix(weight, size, g.stride, g.padding, g.dilation, g.groups, g.padding_mode)


def sigma_of(A: ConvMap) -> Matrix:
    """All its singular values, without the package."""
    return np.linalg.svd(matrix_of(A), compute_uv=False)
