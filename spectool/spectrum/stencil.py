"""A zero-padded convolution as plain numbers, cut into independent problems that do not overlap.

Along each axis a convolution reads, for output j and tap t, position s·j − p + d·t. Whatever separates these
positions separates the operator:

* only positions ≡ −p modulo gcd(s, d) are ever read: stride and dilation can be divided by it;
* with gcd(s, d) = 1, outputs j ≡ a (mod d) read positions ≡ s·a − p (mod d), another class for each a: d problems
  without dilation;
* windows that do not overlap (k ≤ s, or a single output) are a matrix of their own each: the axis disappears
  into the channels, and windows that hang over the border lose the taps out there;
* a single input position that is read by several outputs disappears into the output channels.

Nothing here is approximate: the singular values of the parts are those of the whole, zeros apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import gcd, prod
from typing import Literal

import torch
from torch import Tensor

from spectool.linear import Adjoint, Composed, ConvGeometry, ConvMap, LinearMap, Reshaped, Scaled, fold


@dataclass(frozen=True, eq=False)
class Stencil:
    """y[g, o, j] = Σ w[g, o, c, t]·x[g, c, s·j − p + d·t], zeros outside; one entry per axis in every tuple.

    Attributes:
        weight: ``(groups, out, in, *k)`` in its stored type.
        sizes: Input sizes n.
        outputs: Output sizes m; none needs to be as large as the kernel would allow.
        stride: s.
        dilation: d.
        lead: p, leading zeros; negative crops.
    """

    weight: Tensor
    sizes: tuple[int, ...]
    outputs: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    lead: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Number of independent channel groups."""
        return int(self.weight.shape[0])

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps per axis."""
        return tuple(self.weight.shape[3:])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of one group as a matrix."""
        out, channels = self.weight.shape[1:3]
        return int(out) * prod(self.outputs), int(channels) * prod(self.sizes)

    @property
    def work(self) -> float:
        """Floating-point operations of one application of all groups."""
        return 2.0 * self.weight.numel() * prod(self.outputs)

    def group(self, index: int) -> Stencil:
        """Return one group as a stencil of its own."""
        part = self.weight[index : index + 1]
        return Stencil(part, self.sizes, self.outputs, self.stride, self.dilation, self.lead)

    def to_map(self, *, dtype: torch.dtype, device: torch.device | str) -> LinearMap:
        """Return it as a map to iterate with; at least one axis must be left."""
        geometry = ConvGeometry(
            self.stride,
            tuple(
                (p, s * (m - 1) + d * (k - 1) + 1 - n - p)
                for n, m, s, d, p, k in zip(
                    self.sizes, self.outputs, self.stride, self.dilation, self.lead, self.kernel, strict=True
                )
            ),
            self.dilation,
            self.groups,
        )
        groups, _, channels = self.weight.shape[:3]
        weight = self.weight.flatten(0, 1)
        return ConvMap(weight, (groups * channels, *self.sizes), geometry, dtype=dtype, device=device)

    def to_matrices(self) -> Tensor:
        """Return every group as a float64 matrix ``(groups, m, n)``; costs no matvec."""
        weight = torch.nn.functional.pad(self.weight.double(), [0, 1] * len(self.kernel))
        dims = len(self.kernel)
        for axis in range(dims):
            tap = self._taps(axis)  # (m, n): which tap, the padding tap (zero) where none
            place = 3 + 2 * axis
            shape = (*weight.shape[:place], *tap.shape, *weight.shape[place + 1 :])
            weight = weight.index_select(place, tap.reshape(-1)).reshape(shape)
        order = [0, 1, *(3 + 2 * a for a in range(dims)), 2, *(4 + 2 * a for a in range(dims))]
        return weight.permute(order).reshape(self.groups, *self.shape)

    def _taps(self, axis: int) -> Tensor:
        outputs, sizes = torch.arange(self.outputs[axis]), torch.arange(self.sizes[axis])
        offset = sizes[None, :] - self.stride[axis] * outputs[:, None] + self.lead[axis]
        tap, k = offset // self.dilation[axis], self.kernel[axis]
        missing = (offset % self.dilation[axis] != 0) | (tap < 0) | (tap >= k)
        return torch.where(missing, k, tap)


def stencil_of(A: LinearMap) -> Stencil | None:
    """Return a zero-padded convolution, its channels possibly scaled, as a stencil; None for any other map.

    A transposed convolution gives the convolution it transposes: the singular values are the same.
    """
    conv = convolution_of(A)
    if conv is None:
        return None
    geometry = conv.geometry
    if geometry.padding_mode != "zeros" and any(side for pads in geometry.padding for side in pads):
        return None
    outer, inner = conv.out_shape[1:], conv.in_shape[1:]
    if geometry.transposed:
        outer, inner = inner, outer
    return Stencil(
        grouped(conv.weight, geometry.groups),
        inner,
        outer,
        geometry.stride,
        geometry.dilation,
        tuple(pads[0] for pads in geometry.padding),
    )


def convolution_of(A: LinearMap) -> ConvMap | None:
    """Return a convolution with the same singular values as A, factors and channel scales folded in; else None."""
    if isinstance(A, ConvMap):
        return A
    if isinstance(A, (Adjoint, Reshaped)):
        return convolution_of(A.inner)
    if isinstance(A, Scaled):
        inner = convolution_of(A.inner)
        if inner is None:
            return None
        weight = inner.weight.detach().double() * A.factor
        return ConvMap(weight, inner.in_shape, inner.geometry, dtype=inner.dtype, device=inner.device)
    if isinstance(A, Composed):
        folded = fold(A)
        return None if isinstance(folded, Composed) else convolution_of(folded)
    return None


def grouped(weight: Tensor, groups: int) -> Tensor:
    """Return a stored kernel as ``(groups, out, in, *k)`` on the CPU, detached."""
    weight = weight.detach().cpu()
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def _reweighted(conv: ConvMap, weight: Tensor) -> ConvMap:
    return ConvMap(weight, conv.in_shape, conv.geometry, dtype=conv.dtype, device=conv.device)


# --- cutting one axis ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """What one axis of an independent problem looks like.

    Attributes:
        kind: ``slide``: still a convolution along this axis; ``window``: one output position, its taps become
            input channels; ``spread``: one input position, its taps become output channels.
        taps: Taps of the kernel in use; consecutive for ``slide``.
        size: n, of ``slide``.
        outputs: m, of ``slide``.
        stride: s, of ``slide``.
        lead: p ≥ 0, of ``slide``.
    """

    kind: Literal["slide", "window", "spread"]
    taps: tuple[int, ...]
    size: int = 1
    outputs: int = 1
    stride: int = 1
    lead: int = 0


def split(whole: Stencil) -> list[tuple[Stencil, int]]:
    """Cut a stencil into independent undilated ones and say how often each occurs; zero blocks are left out.

    Groups stay together in each part's leading axis. A part may have no axis left: it is a matrix per group.
    """
    axes = []
    for axis, k in enumerate(whole.kernel):
        first, last = _support(whole.weight, axis, k)
        if first == last:
            return []
        axes.append(
            cut_axis(
                whole.sizes[axis],
                whole.outputs[axis],
                (first, last),
                whole.stride[axis],
                whole.dilation[axis],
                whole.lead[axis],
            )
        )
    parts = []
    for choice in product(*(kinds.items() for kinds in axes)):
        kinds, count = [kind for kind, _ in choice], prod(number for _, number in choice)
        parts.append((_cut(whole.weight, kinds), count))
    return parts


def _support(weight: Tensor, axis: int, k: int) -> tuple[int, int]:
    """Return the range of taps along one axis that are not all zero."""
    used = [t for t in range(k) if bool((weight.select(3 + axis, t) != 0).any())]
    return (used[0], used[-1] + 1) if used else (0, 0)


def cut_axis(n: int, m: int, taps: tuple[int, int], s: int, d: int, p: int) -> Counter[Axis]:
    """Return the independent problems along one axis with their numbers; zero problems are left out.

    Args:
        n: Input size.
        m: Output size.
        taps: Range (first, last + 1) of taps in use.
        s: Stride.
        d: Dilation.
        p: Leading padding; may be negative.
    """
    found: Counter[Axis] = Counter()
    p -= d * taps[0]
    if p < 0:  # what lies before the first read position is never read
        n, p = n + p, 0
    common = gcd(s, d)
    first = -p % common
    n, p, s, d = -((first - n) // common), (p + first) // common, s // common, d // common
    for a in range(min(d, m)):
        shift = s * a - p
        residue = shift % d
        size, lead = -((residue - n) // d), -((shift - residue) // d)
        found.update(_undilated(size, -((a - m) // d), taps, s, lead))
    return found


def _undilated(n: int, m: int, taps: tuple[int, int], s: int, p: int) -> Counter[Axis]:
    """Trim what is never read or always zero, then take windows apart where they do not overlap."""
    first, last = taps
    while True:
        before = (n, m, first, last, p)
        if p < 0:
            n, p = n + p, 0
        k = last - first
        n = min(n, s * (m - 1) - p + k)  # pixels behind the last window
        idle = max(0, -(-(p - k + 1) // s))  # outputs that read padding only
        m, p = min(m - idle, (n - 1 + p - idle * s) // s + 1), p - idle * s
        if min(n, m, k) <= 0:
            return Counter()
        if not _touches(0, n, m, s, p):
            first, p = first + 1, p - 1
        elif not _touches(k - 1, n, m, s, p):
            last -= 1
        if (n, m, first, last, p) == before:
            break
    if k <= s or m == 1:
        windows = ((max(0, p - j * s), min(k, n + p - j * s)) for j in range(m))
        return Counter(Axis("window", tuple(range(first + a, first + b))) for a, b in windows if a < b)
    if n == 1:
        order = tuple(first + p - j * s for j in range(m) if 0 <= p - j * s < k)
        return Counter([Axis("spread", order)])
    return Counter([Axis("slide", tuple(range(first, last)), n, m, s, p)])


def _touches(t: int, n: int, m: int, s: int, p: int) -> bool:
    """Whether tap t reads a pixel for any output."""
    j = max(0, -(-(p - t) // s))
    return j < m and j * s - p + t < n


def _cut(weight: Tensor, kinds: list[Axis]) -> Stencil:
    """Select the taps of every axis and move those of ``window`` and ``spread`` axes into the channels."""
    for axis, kind in enumerate(kinds):
        if kind.taps != tuple(range(weight.shape[3 + axis])):
            weight = weight.index_select(3 + axis, torch.tensor(kind.taps, device=weight.device))
    dims = range(len(kinds))
    slide = [3 + a for a in dims if kinds[a].kind == "slide"]
    window = [3 + a for a in dims if kinds[a].kind == "window"]
    spread = [3 + a for a in dims if kinds[a].kind == "spread"]
    groups, out, channels = weight.shape[:3]
    kept = [weight.shape[a] for a in slide]
    if window or spread:
        outs = out * prod(weight.shape[a] for a in spread)
        ins = channels * prod(weight.shape[a] for a in window)
        weight = weight.permute(0, 1, *spread, 2, *window, *slide).reshape(groups, outs, ins, *kept)
    sliding = [kind for kind in kinds if kind.kind == "slide"]
    return Stencil(
        weight,
        tuple(kind.size for kind in sliding),
        tuple(kind.outputs for kind in sliding),
        tuple(kind.stride for kind in sliding),
        (1,) * len(sliding),
        tuple(kind.lead for kind in sliding),
    )


def groups_of(part: Stencil) -> Iterator[Stencil]:
    """Yield the groups of a part one by one."""
    for index in range(part.groups):
        yield part.group(index)
