"""The independent blocks of a convolution: what they are, as matrices, as maps, and bounded."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from spectool.linear import ConvGeometry, ConvMap, LinearMap, MatrixMap, padding_matrix
from spectool.spectrum.dense import SMALL_SIDE
from spectool.spectrum.levels import EPS, Floats
from spectool.spectrum.padding import is_copying, padding_norm, unpadded
from spectool.spectrum.periodic import group_bounds, symbol_work
from spectool.spectrum.stencil import Stencil, split, stencil_of

BATCH_BYTES = 1 << 27
"""Memory for the dense matrices of a batch of blocks."""

_BOUND_WORK = 3e10  # flops that bounds on the blocks may cost
_RANK_ONE = 1e-13  # relative remainder below which a kernel counts as a product


@dataclass(frozen=True, eq=False)
class Part:
    """Blocks of one shape: the groups of a stencil, ``count`` times each.

    Attributes:
        stencil: Undilated, or any stencil where ``conv`` is given.
        count: How often every group occurs.
        conv: The padded convolution that the stencil is the unpadded part of, where padding copies pixels.
    """

    stencil: Stencil
    count: int
    conv: ConvMap | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of one block."""
        if self.conv is None:
            return self.stencil.shape
        groups = self.conv.geometry.groups  # equal ones may be merged in the stencil
        return prod(self.conv.out_shape) // groups, prod(self.conv.in_shape) // groups

    @property
    def is_small(self) -> bool:
        """Whether one block is worth a dense factorisation."""
        m, n = self.shape
        return min(m, n) <= SMALL_SIDE and 16.0 * m * n <= BATCH_BYTES * 4

    def matrices(self, index: Tensor) -> Tensor:
        """Return some blocks as float64 matrices ``(b, m, n)``."""
        stencil = self.stencil
        some = Stencil(
            stencil.weight[index],
            stencil.sizes,
            stencil.outputs,
            stencil.stride,
            stencil.dilation,
            stencil.lead,
        )
        dense = some.to_matrices()
        if self.conv is None:
            return dense
        channels = int(stencil.weight.shape[2])
        dense = dense.reshape(len(index), dense.shape[1], channels, *stencil.sizes)
        for axis, copies in enumerate(self.copies()):
            dense = torch.tensordot(dense, copies, dims=([3 + axis], [0])).movedim(-1, 3 + axis)
        return dense.reshape(len(index), *self.shape)

    def copies(self) -> list[Tensor]:
        """Return the padding matrix of each axis; empty where padding is zeros."""
        if self.conv is None:
            return []
        geometry = self.conv.geometry
        return [
            padding_matrix(n, *pads, geometry.padding_mode)
            for n, pads in zip(self.conv.in_shape[1:], geometry.padding, strict=True)
        ]

    def bounds(self) -> Floats:
        """Return a proven bound on σ₁ of every block; infinite where it would cost too much."""
        if self.conv is None:
            if symbol_work(self.stencil) > _BOUND_WORK:
                return np.full(self.stencil.groups, np.inf)
            return group_bounds(self.stencil)
        norm = padding_norm(self.conv)
        result = np.zeros(self.stencil.groups)
        for part, _ in split(self.stencil):
            if not part.kernel:
                own = torch.linalg.matrix_norm(part.weight.double()).numpy() * (1 + 1e-12)
            elif symbol_work(part) > _BOUND_WORK:
                return np.full(self.stencil.groups, np.inf)
            else:
                own = group_bounds(part)
            result = np.maximum(result, own)
        bounds: Floats = result * norm * (1 + 2 * EPS)
        return bounds

    def to_map(self, index: int, *, dtype: torch.dtype, device: torch.device | str) -> LinearMap:
        """Return one block as a map to iterate with."""
        block = self.stencil.group(index)
        if self.conv is not None:
            geometry = self.conv.geometry
            single = ConvGeometry(
                geometry.stride, geometry.padding, geometry.dilation, 1, geometry.padding_mode
            )
            shape = (int(block.weight.shape[2]), *self.conv.in_shape[1:])
            return ConvMap(block.weight[0], shape, single, dtype=dtype, device=device)
        if not block.kernel:
            return MatrixMap(block.weight[0], dtype=dtype, device=device)
        return block.to_map(dtype=dtype, device=device)


def parts_of(conv: ConvMap) -> list[Part]:
    """Return the independent parts of a convolution; equal groups are counted instead of repeated.

    Blocks of zeros are left out; a convolution that reads no pixel has no parts.
    """
    if is_copying(conv):
        return _distinct(Part(unpadded(conv), 1, conv))
    whole = stencil_of(conv)
    if whole is None:
        return []
    return [part for stencil, count in split(whole) for part in _distinct(Part(stencil, count))]


def _distinct(part: Part) -> list[Part]:
    """Merge equal groups: fixed blur and up-sampling kernels repeat one kernel per channel."""
    stencil = part.stencil
    if stencil.groups == 1:
        return [part]
    flat = stencil.weight.flatten(1)
    kinds, inverse, counts = torch.unique(flat.double(), dim=0, return_inverse=True, return_counts=True)
    if len(kinds) == stencil.groups:
        return [part]
    merged = []
    for count in torch.unique(counts).tolist():
        chosen = [
            int((inverse == kind).nonzero()[0]) for kind in (counts == count).nonzero().flatten().tolist()
        ]
        some = Stencil(
            stencil.weight[torch.tensor(chosen)],
            stencil.sizes,
            stencil.outputs,
            stencil.stride,
            stencil.dilation,
            stencil.lead,
        )
        merged.append(Part(some, part.count * count, part.conv))
    return merged


def is_trivial(parts: list[Part], A: LinearMap) -> bool:
    """Whether cutting A apart gave nothing but A itself."""
    if len(parts) != 1 or parts[0].count != 1 or parts[0].stencil.groups != 1:
        return False
    part = parts[0]
    return bool(part.stencil.kernel) and part.shape in (
        (prod(A.out_shape), prod(A.in_shape)),
        (prod(A.in_shape), prod(A.out_shape)),
    )


def line_factors(weight: Tensor) -> tuple[Tensor, list[Tensor], float] | None:
    """Split ``(out, in, *k)`` into a channel matrix and one line of taps per axis; None if it is no product.

    The third value bounds the norm of what is left over: Σ_t ‖E_t‖_F.
    """
    peak = [int(place) for place in torch.unravel_index(weight.abs().argmax(), weight.shape)]
    top = weight[tuple(peak)]
    if float(top) == 0.0:
        return None
    lines = []
    for axis in range(2, weight.ndim):
        line = weight.movedim(axis, -1)
        for place in peak[:axis] + peak[axis + 1 :]:
            line = line[place]
        lines.append(line / top)
    channels = weight
    for place in reversed(peak[2:]):
        channels = channels[..., place]
    product = channels
    for line in lines:
        product = product[..., None] * line
    rest = torch.linalg.vector_norm((weight - product).flatten(2), dim=(0, 1)).sum()
    total = torch.linalg.vector_norm(weight)
    return (channels, lines, float(rest)) if float(rest) <= _RANK_ONE * float(total) else None
