"""Dense float64 matrices of every operator, written from the definitions with numpy alone.

Nothing here calls torch or the package: it is the truth that both are held against. Rows and columns are in
row-major order of the output and input shapes, channels first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Pads = Sequence[tuple[int, int]]


def padded_reads(n: int, lead: int, trail: int, mode: str) -> NDArray[np.int64]:
    """Pixel that each position of the padded axis reads; -1 where it reads a zero."""
    pixels = np.arange(n)
    if mode == "zeros":
        wide = np.pad(pixels, (max(lead, 0), max(trail, 0)), constant_values=-1)
        start, stop = max(-lead, 0), len(wide) - max(-trail, 0)
        if start <= stop:
            return wide[start:stop]
        return np.full(n + lead + trail, -1)
    return np.pad(
        pixels, (lead, trail), mode={"circular": "wrap", "reflect": "reflect", "replicate": "edge"}[mode]
    )


def conv_matrix(
    weight: Matrix,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int = 1,
    mode: str = "zeros",
) -> Matrix:
    """y[o, t] = Σ_{i, a} w[o, i, a] · padded_x[i, t·s + a·d], group by group."""
    outs, group_ins, *kernel = weight.shape
    ins, group_outs = group_ins * groups, outs // groups
    reads = [padded_reads(n, lo, hi, mode) for n, (lo, hi) in zip(size, padding, strict=True)]
    out_size = [
        (len(r) - d * (k - 1) - 1) // s + 1
        for r, d, k, s in zip(reads, dilation, kernel, stride, strict=True)
    ]
    matrix = np.zeros((outs, math.prod(out_size), ins, math.prod(size)))
    for row, position in enumerate(itertools.product(*map(range, out_size))):
        for tap in itertools.product(*map(range, kernel)):
            pixel = [
                r[t * s + a * d] for r, t, s, a, d in zip(reads, position, stride, tap, dilation, strict=True)
            ]
            if min(pixel) < 0:
                continue
            column = np.ravel_multi_index(pixel, size)
            for g in range(groups):
                o, i = g * group_outs, g * group_ins
                matrix[o : o + group_outs, row, i : i + group_ins, column] += weight[
                    (slice(o, o + group_outs), slice(None), *tap)
                ]
    return matrix.reshape(outs * math.prod(out_size), ins * math.prod(size))


def conv_transpose_matrix(
    weight: Matrix,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int = 1,
    output_padding: Sequence[int] | None = None,
) -> Matrix:
    """y[o, t·s + a·d − p] += w[i, o, a] · x[i, t], kept where it falls inside the output."""
    ins, group_outs, *kernel = weight.shape
    outs, group_ins = group_outs * groups, ins // groups
    extra = output_padding or [0] * len(kernel)
    out_size = [
        (n - 1) * s - lo - hi + d * (k - 1) + 1 + e
        for n, s, (lo, hi), d, k, e in zip(size, stride, padding, dilation, kernel, extra, strict=True)
    ]
    matrix = np.zeros((outs, math.prod(out_size), ins, math.prod(size)))
    for column, position in enumerate(itertools.product(*map(range, size))):
        for tap in itertools.product(*map(range, kernel)):
            pixel = [
                t * s + a * d - lo
                for t, s, a, d, (lo, _) in zip(position, stride, tap, dilation, padding, strict=True)
            ]
            if any(p < 0 or p >= m for p, m in zip(pixel, out_size, strict=True)):
                continue
            row = np.ravel_multi_index(pixel, out_size)
            for g in range(groups):
                o, i = g * group_outs, g * group_ins
                block = weight[(slice(i, i + group_ins), slice(None), *tap)]
                matrix[o : o + group_outs, row, i : i + group_ins, column] += block.T
    return matrix.reshape(outs * math.prod(out_size), ins * math.prod(size))


def diagonal_matrix(scale: Matrix, shape: Sequence[int], axis: int = 0) -> Matrix:
    """One factor per index of ``axis``, or one per entry."""
    if scale.shape == tuple(shape):
        return np.diag(scale.ravel())
    view = [1] * len(shape)
    view[axis] = -1
    return np.diag((np.ones(shape) * scale.reshape(view)).ravel())


def pool_size(n: int, k: int, s: int, p: int, ceil: bool) -> int:
    """Output size of a pool; with ``ceil`` a last window may hang over, if it starts inside input or lead."""
    if not ceil:
        return (n + 2 * p - k) // s + 1
    m = -(-(n + 2 * p - k) // s) + 1
    return m - 1 if (m - 1) * s >= n + p else m


def avgpool_matrix(
    channels: int,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    ceil: bool = False,
    count_include_pad: bool = True,
) -> Matrix:
    """Mean over each window; padding counts in the divisor or not, what hangs over the padding never does."""
    out_size = [pool_size(n, k, s, p, ceil) for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]
    one = np.zeros((math.prod(out_size), math.prod(size)))
    for row, position in enumerate(itertools.product(*map(range, out_size))):
        divisor, inside = 1, []
        for n, k, s, p, t in zip(size, kernel, stride, padding, position, strict=True):
            start, stop = t * s - p, min(t * s - p + k, n + p)
            real = range(max(start, 0), min(stop, n))
            divisor *= (stop - start) if count_include_pad else len(real)
            inside.append(real)
        for pixel in itertools.product(*inside):
            one[row, np.ravel_multi_index(pixel, size)] += 1 / divisor
    return np.kron(np.eye(channels), one)


def adaptive_matrix(channels: int, size: Sequence[int], out_size: Sequence[int]) -> Matrix:
    """Adaptive average pool: window t of m covers pixels ⌊t·n/m⌋ … ⌈(t+1)·n/m⌉ − 1."""
    one = np.zeros((math.prod(out_size), math.prod(size)))
    for row, position in enumerate(itertools.product(*map(range, out_size))):
        windows = [
            range(t * n // m, -(-(t + 1) * n // m)) for n, m, t in zip(size, out_size, position, strict=True)
        ]
        count = math.prod(len(window) for window in windows)
        for pixel in itertools.product(*windows):
            one[row, np.ravel_multi_index(pixel, size)] += 1 / count
    return np.kron(np.eye(channels), one)


def upsample_matrix(channels: int, size: Sequence[int], out_size: Sequence[int], mode: str) -> Matrix:
    """Nearest, linear (half-pixel centres) or linear with aligned corners."""
    one = np.zeros((math.prod(out_size), math.prod(size)))
    for row, position in enumerate(itertools.product(*map(range, out_size))):
        reads = [_interpolated(t, n, m, mode) for t, n, m in zip(position, size, out_size, strict=True)]
        for pixel in itertools.product(*reads):
            column = np.ravel_multi_index([p for p, _ in pixel], size)
            one[row, column] += math.prod(share for _, share in pixel)
    return np.kron(np.eye(channels), one)


def _interpolated(t: int, n: int, m: int, mode: str) -> list[tuple[int, float]]:
    if mode == "nearest":
        return [(t * n // m, 1.0)]
    place = max((t + 0.5) * n / m - 0.5, 0.0) if mode == "linear" else t * (n - 1) / max(m - 1, 1)
    left = min(int(place), n - 1)
    right = min(left + 1, n - 1)
    return [(left, 1 - (place - left)), (right, place - left)]


def spectrum_matrix(rng: np.random.Generator, m: int, n: int, values: Sequence[float]) -> Matrix:
    """U diag(values) Vᵀ with random orthonormal U (m, r), V (n, r)."""
    u = np.linalg.qr(rng.standard_normal((m, len(values))))[0]
    v = np.linalg.qr(rng.standard_normal((n, len(values))))[0]
    return np.asarray((u * np.asarray(values)) @ v.T)
