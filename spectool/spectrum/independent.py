"""Operators that are many independent problems at once: solve those that matter, prove the others away.

Groups of channels, classes of a dilation and windows that do not overlap are blocks of a block-diagonal operator.
Its k largest singular values come from few of them: blocks are taken in the order of a proven bound on their σ₁,
and as soon as the next bound is below the k-th largest value found, the rest is out. 512 depthwise channels
usually cost a handful of small factorisations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from spectool.linear import ConvGeometry, ConvMap, LinearMap, MatrixMap, padding_matrix
from spectool.spectrum.dense import SMALL_SIDE, Solved, matrix_levels
from spectool.spectrum.levels import EPS, Floats, Levels, keep, products, union
from spectool.spectrum.padding import is_copying, padding_norm, unpadded
from spectool.spectrum.periodic import group_bounds, symbol_work
from spectool.spectrum.stencil import Stencil, split, stencil_of

Iterate = Callable[[LinearMap, int], Solved]

_BATCH_BYTES = 1 << 27
_MOST_ITERATIVE = 6  # blocks that are worth a solver run of their own
_BOUND_WORK = 3e10  # flops that bounds on the blocks may cost
_PLAIN_WORK = 2e9  # flops below which all blocks are simply factorised
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
        groups = self.stencil.groups
        return prod(self.conv.out_shape) // groups, prod(self.conv.in_shape) // groups

    @property
    def is_small(self) -> bool:
        """Whether one block is worth a dense factorisation."""
        m, n = self.shape
        return min(m, n) <= SMALL_SIDE and 16.0 * m * n <= _BATCH_BYTES * 4

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


def parts_of(A: LinearMap, conv: ConvMap | None) -> list[Part]:
    """Return the independent parts of a convolution; equal groups are counted instead of repeated.

    Args:
        A: The map as given.
        conv: ``stencil.convolution_of(A)``.
    """
    if conv is None:
        return []
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


# --- solving ------------------------------------------------------------------------------------------------


@dataclass
class _Union:
    """What is known of the whole so far."""

    k: int
    levels: Levels
    runs: list[Solved]

    def add(self, levels: Levels, count: int) -> None:
        self.levels = keep(union([self.levels, levels.repeated(count)]), self.k)


def solve_parts(
    parts: list[Part],
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    iterate: Iterate | None = None,
) -> Solved | None:
    """Return the k largest singular values of the union of ``parts``, or None where that is not worth it.

    Small blocks are factorised, products of one-dimensional kernels taken apart, the rest is given to
    ``iterate``.

    Args:
        parts: From ``parts_of``.
        k: How many.
        dtype: Arithmetic of the iterated blocks.
        device: Where they are iterated.
        iterate: Solves one block; without it None is returned if a block needs it.
    """
    whole = _Union(k, Levels.nothing(), [])
    direct, open_ = [], []
    separable = False
    for part in parts:
        factors = _product_levels(part, k)
        if factors is not None:
            whole.add(factors, part.count)
            separable = True
        elif part.is_small:
            direct.append(part)
        else:
            open_.append(part)
    if open_ and iterate is None:
        return None
    for part in direct:
        _factorise(part, whole)
    if open_ and iterate is not None and not _iterate(open_, whole, iterate, dtype, device):
        return None
    kinds = [run for run in whole.runs if len(run.levels.upper)]
    top = max(kinds, key=lambda run: float(run.levels.upper[0]), default=None)
    proven = 0.0 if top is None else float(top.levels.upper[0])
    kind = top.kind if top is not None and proven >= whole.levels.expand(1)[2][0] else "exact"
    return Solved(
        whole.levels,
        "lanczos" if whole.runs else _name(parts, separable),
        _why(parts),
        kind=kind,
        exact=not whole.runs,
        converged=all(run.converged for run in whole.runs),
        matvecs=sum(run.matvecs for run in whole.runs),
        residuals=(max(run.residuals[0] for run in whole.runs),) if whole.runs else (),
        note="; ".join(sorted({run.note for run in whole.runs if run.note})),
    )


def _factorise(part: Part, whole: _Union) -> None:
    """Factorise the blocks of one shape, those with the largest bounds first, until the rest is out."""
    groups, (m, n) = part.stencil.groups, part.shape
    k = -(-whole.k // part.count)
    work = groups * (10.0 * m * n * min(m, n) + 1e5)
    bounds = np.full(groups, np.inf)
    if part.stencil.kernel and groups > 1 and work > _PLAIN_WORK:
        bounds = part.bounds()
    order = np.argsort(-bounds, kind="stable")
    batch = max(1, min(groups, _BATCH_BYTES // (8 * m * n)))
    if np.isfinite(bounds).all():
        batch = min(batch, 8)
    for start in range(0, groups, batch):
        chosen = order[start : start + batch]
        if bounds[chosen[0]] < whole.levels.kth_lower(whole.k):
            break
        matrices = part.matrices(torch.from_numpy(chosen))
        levels = matrix_levels(matrices[0] if len(matrices) == 1 else matrices, k)
        whole.add(levels, part.count)


def _iterate(
    parts: list[Part], whole: _Union, iterate: Iterate, dtype: torch.dtype, device: torch.device | str
) -> bool:
    """Iterate the blocks that can matter; False if they are too many."""
    jobs: list[tuple[float, Part, int]] = []
    for part in parts:
        alone = len(parts) * part.stencil.groups <= 2
        bounds = np.full(part.stencil.groups, np.inf) if alone or not part.stencil.kernel else part.bounds()
        jobs.extend((float(bound), part, index) for index, bound in enumerate(bounds))
    jobs.sort(key=lambda job: -job[0])
    for done, (bound, part, index) in enumerate(jobs):
        level = whole.levels.kth_lower(whole.k)
        if bound < level:
            break
        if done >= _MOST_ITERATIVE or (done == 0 and _hopeless(jobs, whole.k)):
            return False
        wanted = min(-(-whole.k // part.count), *part.shape)
        run = iterate(part.to_map(index, dtype=dtype, device=device), wanted)
        whole.runs.append(run)
        whole.add(run.levels, part.count)
    return True


def _hopeless(jobs: list[tuple[float, Part, int]], k: int) -> bool:
    """Whether many blocks must matter: their bounds lie within a percent of the best."""
    best = jobs[0][0]
    if not np.isfinite(best):
        return len(jobs) > _MOST_ITERATIVE
    close = [part.count for bound, part, _ in jobs if bound >= 0.99 * best]
    return len(close) > _MOST_ITERATIVE and sum(close) > k


def _product_levels(part: Part, k: int) -> Levels | None:
    """Return the levels of blocks that are M ⊗ T₁ ⊗ T₂…, the kernel being a product over its axes; else None."""
    stencil = part.stencil
    if len(stencil.kernel) < 2 or stencil.groups > 16 or (part.is_small and max(part.shape) <= 256):
        return None
    found = []
    for index in range(stencil.groups):
        factors = _factors(stencil.weight[index].detach().double())
        if factors is None:
            return None
        channels, lines, remainder = factors
        if min(channels.shape) > SMALL_SIDE or max(*stencil.sizes, *stencil.outputs) > 2 * SMALL_SIDE:
            return None
        pieces = [matrix_levels(channels, min(channels.shape))]
        copies = part.copies()
        for axis, line in enumerate(lines):
            one = Stencil(
                line[None, None, None],
                (stencil.sizes[axis],),
                (stencil.outputs[axis],),
                (stencil.stride[axis],),
                (stencil.dilation[axis],),
                (stencil.lead[axis],),
            ).to_matrices()[0]
            pieces.append(matrix_levels(one @ copies[axis] if copies else one, min(one.shape)))
        levels = products(pieces, k)
        extra = remainder * (padding_norm(part.conv) if part.conv is not None else 1.0)
        found.append(
            Levels(levels.values, np.maximum(levels.lower - extra, 0), levels.upper + extra, levels.count)
        )
    return union(found)


def _factors(weight: Tensor) -> tuple[Tensor, list[Tensor], float] | None:
    """Split ``(out, in, *k)`` into a channel matrix and one line of taps per axis; None if it is no product.

    The third value bounds the norm of what is left over: Σ_t ‖E_t‖_F.
    """
    peak = [int(place) for place in torch.unravel_index(weight.abs().argmax(), weight.shape)]
    top = weight[tuple(peak)]
    if float(top) == 0.0:
        return None
    lines = [
        weight[tuple(slice(None) if a == axis else p for a, p in enumerate(peak))] / top
        for axis in range(2, weight.ndim)
    ]
    channels = weight[(slice(None), slice(None), *peak[2:])]
    product = channels
    for line in lines:
        product = product[..., None] * line
    rest = torch.linalg.vector_norm((weight - product).flatten(2), dim=(0, 1)).sum()
    total = torch.linalg.vector_norm(weight)
    return (channels, lines, float(rest)) if float(rest) <= _RANK_ONE * float(total) else None


def _name(parts: list[Part], separable: bool) -> str:
    if all(not part.stencil.kernel for part in parts):
        return "exact:non-overlapping"
    if separable:
        return "exact:separable"
    if max(part.stencil.groups * part.count for part in parts) > 1 or len(parts) > 1:
        return "exact:independent"
    return "dense"


def _why(parts: list[Part]) -> str:
    if len(parts) == 1 and parts[0].stencil.groups * parts[0].count == 1 and parts[0].stencil.kernel:
        m, n = parts[0].shape
        return f"the smaller side of {m} × {n} is {min(m, n)}"
    blocks = sum(part.count * part.stencil.groups for part in parts)
    kinds = sum(part.stencil.groups for part in parts)
    if all(not part.stencil.kernel for part in parts):
        return f"windows do not overlap: {kinds} small matrices, {blocks} counted with repeats"
    return f"{blocks} independent problems, {kinds} of them different"
