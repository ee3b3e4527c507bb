"""Convolutions on the infinite grid: their supremum by the aliases of every frequency, from a fine grid."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from dense import Matrix

from adversaries.base import TYPES, Adversary, Draw
from adversaries.convolutions import kernel
from adversaries.spectra import SCALES
from spectool.linear import ConvGeometry, InfiniteConv

_POINTS = {1: 2000, 2: 64}  # of the grid, per axis and degree of the symbol
_MOST = 150_000  # frequencies


def infinite(draw: Draw) -> Adversary | None:
    """Any stride, dilation, type and scale; groups of very different size."""
    dims = draw.choice((1, 1, 2))
    groups, ins, outs = draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3))
    k = tuple(draw.integer(1, 5 if dims == 1 else 3) for _ in range(dims))
    s = tuple(draw.choice((1, 1, 2, 3)) for _ in range(dims))
    d = tuple(draw.choice((1, 1, 2, 3)) for _ in range(dims))
    transposed = draw.chance(0.3)
    shape = (ins, outs, *k) if transposed else (outs, ins, *k)
    dtype, exponent = draw.choice(TYPES), draw.choice(SCALES)
    apart = draw.choice((0, 0, 10, 70)) if dtype == torch.float64 else draw.choice((0, 0, 10, 30))
    with np.errstate(over="ignore"):
        parts = [
            torch.from_numpy(np.ldexp(kernel(draw, shape), exponent - apart * g)).to(dtype)
            for g in range(groups)
        ]
    weight = torch.cat(parts)
    if not bool(torch.isfinite(weight).all()):
        return None
    ends = [supremum_of(part.double().numpy(), s, d) for part in parts]
    if any(end is None for end in ends):
        return None
    low, high = (max(end[place] for end in ends if end) for place in (0, 1))
    if not math.isfinite(high):
        return None
    geometry = ConvGeometry(s, ((0, 0),) * dims, d, groups, "zeros", transposed, ())
    return Adversary(
        f"infinite conv{dims}d k{k} s{s} d{d} {groups}×({outs}←{ins}) {dtype} 2^{exponent}"
        + " transposed" * transposed,
        lambda _: InfiniteConv(weight, geometry),
        np.array([low]),
        np.array([low]),
        np.array([high]),
        iterate=False,
    )


def supremum_of(
    weight: Matrix, strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[float, float] | None:
    """Return an attained value and a bound on the supremum of one group's symbol.

    At stride s the frequency φ of the narrow grid hears the s frequencies (φ + 2πj)/s of the wide one, each by 1/√s:
    ‖conv‖ = sup_φ ‖[W((φ + 2πj)/s)]_j‖/√s. Its square is along each axis a trigonometric polynomial of degree
    d(k − 1) in φ/s, which exceeds its values on M points by no more than 1/cos(π·degree/M).
    """
    peak = float(np.abs(weight).max(initial=0.0))
    if not peak:
        return 0.0, 0.0
    exponent = int(np.frexp(peak)[1])
    scaled = np.ldexp(weight, -exponent)
    axes, slack = [], 1.0
    for length, s, d in zip(weight.shape[2:], strides, dilations, strict=True):
        degree = d * (length - 1)
        count = _POINTS[len(strides)] * degree + 1
        axes.append(np.arange(math.ceil(count / s)) * 2 * np.pi / math.ceil(count / s))
        slack /= math.cos(math.pi * degree / count)
    if math.prod(map(len, axes)) > _MOST:
        return None
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    norm = _norms(scaled, grid, strides, dilations)
    low, at = float(norm.max()), grid[int(norm.argmax())]
    step = np.array([axis[1] if len(axis) > 1 else 0.0 for axis in axes])
    for _ in range(12):  # uphill from there, ever closer
        near = at + np.array(list(itertools.product((-1, -0.5, 0, 0.5, 1), repeat=len(axes)))) * step
        norm = _norms(scaled, near, strides, dilations)
        low, at, step = max(low, float(norm.max())), near[int(norm.argmax())], step / 2
    rounding = 1e-13 * low
    with np.errstate(over="ignore"):
        lowest, highest = np.ldexp(low - rounding, exponent), np.ldexp(low * slack + rounding, exponent)
    return max(0.0, float(lowest) - 5e-324), float(highest) + 5e-324


def _norms(weight: Matrix, angles: Matrix, strides: tuple[int, ...], dilations: tuple[int, ...]) -> Matrix:
    places = np.array(list(np.ndindex(*weight.shape[2:]))) * np.array(dilations)
    taps = weight.reshape(*weight.shape[:2], -1)
    beside = []
    for aliases in itertools.product(*map(range, strides)):
        frequency = (angles + 2 * np.pi * np.array(aliases)) / np.array(strides)
        beside.append(np.einsum("oit,at->aoi", taps, np.exp(1j * frequency @ places.T)))
    # A transposed convolution's kernel is stored as that of the convolution it undoes.
    both = np.concatenate(beside, axis=2) / math.sqrt(math.prod(strides))
    return np.linalg.svd(both, compute_uv=False)[:, 0]


FAMILIES = (infinite,)
