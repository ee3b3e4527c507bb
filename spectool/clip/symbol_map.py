"""The linear map from a kernel to its symbol on a grid of frequencies, and its adjoint, as batched products.

H_f = Σ_q B_q e^{iq·θ_f} for half of the frequencies of the grid (a real kernel has the conjugate at −θ), one
(out × in·s^D) matrix per group and frequency. B are the polyphase components of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, pi, prod

import torch
from torch import Tensor
from torch.nn import functional

from spectool.linear import ConvGeometry

_SMALL = 64  # entries of a product below which multiplying and adding beats a batched product
_LARGE = 1 << 20  # entries of all H_f from which they leave the caches


class SymbolMap:
    """B ↦ (H_f) for the groups of one convolution.

    Args:
        shape: Shape of the grouped kernel ``(groups, out, in, *k)``.
        stride: Stride after division by its greatest common divisor with the dilation.
        grid: Frequencies per axis, M.
        extra: Further frequencies ``(F', D)``.

    Attributes:
        stride: As given.
        grid: As given.
        extra: As given.
        frequencies: Number of frequencies kept, about ΠM/2.
        sides: (out, in·s^D).
    """

    def __init__(
        self, shape: Sequence[int], stride: Sequence[int], grid: Sequence[int], extra: Tensor | None = None
    ) -> None:
        self._kernel, self.stride, self.grid = tuple(shape[3:]), tuple(stride), tuple(grid)
        self.extra = torch.zeros(0, len(grid), dtype=torch.float64) if extra is None else extra
        self._taps = tuple(-(-k // s) for k, s in zip(self._kernel, stride, strict=True))
        phases = prod(stride)
        self.sides = (int(shape[1]), int(shape[2]) * phases)
        self.taps = prod(self._taps)
        ones = self.split(torch.ones(1, 1, *shape[2:], dtype=torch.float64))
        self._mask = ones[0, :, 0] if bool((ones == 0).any()) else None  # (taps, in·s^D)
        self.angles = torch.cat([half_grid(grid), self.extra])
        self.frequencies = len(self.angles)
        exponents = torch.cartesian_prod(*(torch.arange(q, dtype=torch.float64) for q in self._taps))
        turns = self.angles @ exponents.reshape(self.taps, len(grid)).T
        waves = torch.stack([torch.cos(turns), torch.sin(turns)], dim=1).flatten(0, 1)  # (F·2, taps)
        self._waves = {torch.float64: waves}

    def split(self, weight: Tensor) -> Tensor:
        """Return the polyphase components ``(groups, taps, out, in·s^D)`` of a grouped kernel."""
        dims = len(self._kernel)
        groups, out, channels = weight.shape[:3]
        sizes = [(q * s - k) for q, s, k in zip(self._taps, self.stride, self._kernel, strict=True)]
        weight = functional.pad(weight, [side for extra in reversed(sizes) for side in (0, extra)])
        parts = [side for pair in zip(self._taps, self.stride, strict=True) for side in pair]
        weight = weight.reshape(groups, out, channels, *parts)
        quotients, residues = [3 + 2 * a for a in range(dims)], [4 + 2 * a for a in range(dims)]
        return weight.permute(0, *quotients, 1, 2, *residues).reshape(groups, self.taps, out, -1)

    def join(self, components: Tensor) -> Tensor:
        """Return the grouped kernel of polyphase components: the inverse of ``split``, padding cropped."""
        dims = len(self._kernel)
        groups, _, out = components.shape[:3]
        weight = components.reshape(groups, *self._taps, out, -1, *self.stride)
        order = [0, 1 + dims, 2 + dims]
        for axis in range(dims):
            order += [1 + axis, 3 + dims + axis]
        weight = weight.permute(order)
        sizes = [q * s for q, s in zip(self._taps, self.stride, strict=True)]
        weight = weight.reshape(groups, out, -1, *sizes)
        for axis, k in enumerate(self._kernel):
            weight = weight.narrow(3 + axis, 0, k)
        return weight.contiguous()

    def forward(self, components: Tensor) -> Tensor:
        """Return the real over the imaginary part of every H ``(groups, F, 2·out, in·s^D)``."""
        groups, _, out, side = components.shape
        both = self._waves_of(components.dtype) @ components.flatten(2)
        return both.reshape(groups, self.frequencies, 2 * out, side)

    def adjoint(self, symbols: Tensor) -> Tensor:
        """Return the components of Σ_f Re(Z_f e^{−iq·θ_f}), zero where the kernel has no tap.

        Args:
            symbols: Real over imaginary part of every Z_f, as from ``forward``.
        """
        groups, _, double, side = symbols.shape
        rows = symbols.reshape(groups, 2 * self.frequencies, -1)
        components = (self._waves_of(rows.dtype).T @ rows).reshape(groups, self.taps, double // 2, side)
        return components if self._mask is None else components * self._mask[:, None].to(components)

    # In the three products below a few columns on either side are cheaper to turn by the waves, tap by tap, than all
    # H_f are to form: then one product of large matrices serves all frequencies.

    def pull(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``adjoint(left @ rightᵀ)`` for left ``(groups, F, 2·out, k)`` and right ``(groups, F, in, k)``."""
        if not self._tap_by_tap(right):
            return self.adjoint(product(left, right.mT))
        components = self._turned(left) @ right.mT.flatten(1, 2)
        components = components.reshape(len(left), self.taps, *self.sides)
        return components if self._mask is None else components * self._mask[:, None].to(components)

    def times(self, components: Tensor, right: Tensor) -> Tensor:
        """Return ``forward(components) @ right`` ``(groups, F, 2·out, k)``."""
        if not self._tap_by_tap(right):
            return product(self.forward(components), right)
        groups, _, _, count = right.shape
        columns = right.permute(0, 2, 1, 3).flatten(2)  # (groups, in, F·k)
        moved = (components.flatten(1, 2) @ columns).reshape(groups, self.taps, -1, self.frequencies, count)
        waves = self._waves_of(right.dtype).reshape(self.frequencies, 2, self.taps)
        return torch.einsum("gtofk,fct->gfcok", moved, waves).flatten(2, 3)

    def transposed_times(self, components: Tensor, left: Tensor) -> Tensor:
        """Return ``forward(components)ᵀ @ left`` ``(groups, F, in, k)``."""
        if not self._tap_by_tap(left):
            return product(self.forward(components).mT, left)
        moved = components.flatten(1, 2).mT @ self._turned(left)  # (groups, in, F·k)
        return moved.reshape(len(left), -1, self.frequencies, left.shape[3]).permute(0, 2, 1, 3)

    def _turned(self, left: Tensor) -> Tensor:
        """Return Re(e^{−iq·θ}·left) for every tap ``(groups, taps·out, F·k)``."""
        groups, _, double, count = left.shape
        left = left.reshape(groups, self.frequencies, 2, double // 2, count)
        waves = self._waves_of(left.dtype).reshape(self.frequencies, 2, self.taps)
        return torch.einsum("gfcok,fct->gtofk", left, waves).reshape(groups, -1, self.frequencies * count)

    def _tap_by_tap(self, columns: Tensor) -> bool:
        count = columns.shape[3]
        large = len(columns) * self.frequencies * self.sides[0] * self.sides[1] >= _LARGE
        return large and self.taps * count <= 4 * (count + self.taps)

    def values(self, components: Tensor) -> Tensor:
        """Return H ``(groups, F, out, in·s^D)``, complex."""
        both = self.forward(components)
        out = both.shape[2] // 2
        return torch.complex(both[:, :, :out], both[:, :, out:])

    def _waves_of(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._waves:
            self._waves[dtype] = self._waves[torch.float64].to(dtype)
        return self._waves[dtype]


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, by elementwise products where the matrices are tiny."""
    if a.shape[-1] == 1:
        return a * b
    if a.shape[-2] * a.shape[-1] * b.shape[-1] <= _SMALL:
        return (a[..., :, :, None] * b[..., None, :, :]).sum(dim=-2)
    return a @ b


def half_grid(grid: Sequence[int]) -> Tensor:
    """Return one of each pair ±θ of the frequencies 2πf/M ``(F, D)``."""
    places = torch.cartesian_prod(*(torch.arange(m) for m in grid)).reshape(-1, len(grid))
    sizes = torch.tensor(list(grid))
    mirrored = (-places) % sizes
    index, mirror = torch.zeros(len(places), dtype=torch.long), torch.zeros(len(places), dtype=torch.long)
    for axis, m in enumerate(grid):
        index, mirror = index * m + places[:, axis], mirror * m + mirrored[:, axis]
    return places[index <= mirror].double() * (2 * pi / sizes.double())


def reduced_stride(geometry: ConvGeometry) -> tuple[int, ...]:
    """Return the stride once stride and dilation are divided by their greatest common divisor."""
    return tuple(s // gcd(s, d) for s, d in zip(geometry.stride, geometry.dilation, strict=True))


def exact_grid(
    geometry: ConvGeometry, in_size: Sequence[int], kernel: Sequence[int]
) -> tuple[int, ...] | None:
    """Return the grid on which the symbol's norm is that of a circular convolution; None for other operators.

    With m = n/s outputs, and what dilation is left after division by the common divisor with the stride, the
    frequencies are those of a grid of m/gcd(m, dilation).

    Args:
        geometry: Of the convolution.
        in_size: Spatial input size n.
        kernel: Taps per axis.
    """
    if geometry.transposed or geometry.padding_mode != "circular":
        return None
    outputs = geometry.output_size(tuple(in_size), tuple(kernel))
    sizes = []
    for n, m, s, d in zip(in_size, outputs, geometry.stride, geometry.dilation, strict=True):
        if m * s != n:
            return None
        sizes.append(m // gcd(m, d // gcd(s, d)))
    return tuple(sizes)
