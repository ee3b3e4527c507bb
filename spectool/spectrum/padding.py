"""A proven bound for convolutions that pad by copying pixels: circular, reflect, replicate.

Padding by a copy is a linear map P = P₁ ⊗ P₂ ⊗ … of one small 0/1 matrix per axis, and the convolution is the
unpadded one of the larger image after it: A = C·P. Hence σ_i(A) ≤ σ_i(C)·Π‖P_a‖. Every padded position copies one
pixel, so P_aᵀP_a is diagonal and ‖P_a‖² is the largest number of copies of one pixel among the positions that the
kernel reads at all.

Published bounds for circular padding do not apply: they fail for these modes by up to a factor of 2.
"""

from __future__ import annotations

import math

import torch

from spectool.linear import ConvMap, padding_matrix
from spectool.spectrum.levels import EPS
from spectool.spectrum.stencil import Stencil, grouped


def is_copying(conv: ConvMap) -> bool:
    """Whether the convolution pads, and with copies."""
    geometry = conv.geometry
    return geometry.padding_mode != "zeros" and any(side for pads in geometry.padding for side in pads)


def unpadded(conv: ConvMap) -> Stencil:
    """Return C of A = C·P: the convolution that reads the padded image."""
    geometry = conv.geometry
    sizes = tuple(n + sum(pads) for n, pads in zip(conv.in_shape[1:], geometry.padding, strict=True))
    return Stencil(
        grouped(conv.weight, geometry.groups),
        sizes,
        tuple(conv.out_shape[1:]),
        geometry.stride,
        geometry.dilation,
        (0,) * geometry.dims,
    )


def padding_norm(conv: ConvMap) -> float:
    """Return Π‖P_a‖, rounded up; 1 for an axis without padding."""
    norm = 1.0
    geometry = conv.geometry
    for axis, (lead, trail) in enumerate(geometry.padding):
        if lead or trail:
            copies = padding_matrix(conv.in_shape[1 + axis], lead, trail, geometry.padding_mode)
            read = _read(conv, axis)
            norm *= math.sqrt(float(copies[read].sum(dim=0).max())) * (1 + EPS)
    return norm


def _read(conv: ConvMap, axis: int) -> torch.Tensor:
    """Return the padded positions along one axis that some tap of some output reads."""
    geometry = conv.geometry
    outputs = geometry.stride[axis] * torch.arange(conv.out_shape[1 + axis])
    taps = geometry.dilation[axis] * torch.arange(conv.weight.shape[2 + axis])
    positions: torch.Tensor = torch.unique(outputs[:, None] + taps[None, :])
    return positions
