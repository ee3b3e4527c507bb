"""The symbol of a convolution: a matrix polynomial H(θ) in the frequencies, and the size of its values.

A convolution with stride s is one with stride 1 on the s^D interleaved sub-grids (polyphase components) of its
input, which become input channels: tap t = s·q + r belongs to coefficient q of channel (c, r). Then
H(θ) = Σ_q B_q e^{iq·θ} is an (out × in·s^D) matrix for each frequency θ.

Everything here is float64 with its rounding bounded, so that an upper end is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from spectool.spectrum.levels import EPS, TINY

LARGE_SIDE = 24
"""Smaller side of H from which Gram matrices and Cholesky tests pay."""

_MANY_TAPS = 32  # from here on a group's taps are summed axis by axis


@dataclass(frozen=True, eq=False)
class Polynomial:
    """H(θ) = Σ_q B_q e^{iq·θ} per group.

    Attributes:
        coefficients: B ``(groups, ΠQ, out, in)``, float64, on the CPU, out ≥ in (else transposed: H(θ)ᵀ has the
            same singular values).
        taps: Q, taps per axis.
        units: Power of two ``(groups,)`` that each group's coefficients were divided by, so that squares of a group far
            smaller than the others do not underflow. ``values`` and ``below`` speak of the symbol itself,
            everything else of the divided one.
    """

    coefficients: Tensor
    taps: tuple[int, ...]
    units: Tensor

    @property
    def side(self) -> int:
        """Smaller side of H(θ)."""
        return int(self.coefficients.shape[3])

    @property
    def groups(self) -> int:
        """Number of groups."""
        return int(self.coefficients.shape[0])

    @property
    def degree(self) -> tuple[float, ...]:
        """Degree per axis once the taps are centred, (Q−1)/2."""
        return tuple((q - 1) / 2 for q in self.taps)

    @cached_property
    def norms(self) -> Tensor:
        """Σ_q ‖B_q‖_F ``(groups,)``: bounds ‖H(θ)‖ everywhere and scales the rounding."""
        total: Tensor = torch.linalg.vector_norm(self.coefficients.flatten(2), dim=2).sum(dim=1)
        return total

    @cached_property
    def rounding(self) -> Tensor:
        """Bound on the error ‖δH(θ)‖ of ``evaluate`` for |θ| ≤ π ``(groups,)``.

        A phase q·θ is wrong by at most 16·ΣQ·eps (θ itself was rounded), its sine by 2 eps more; summing T taps
        adds T·eps of Σ‖B_q‖.
        """
        return self.norms * (EPS * (4 + prod(self.taps) + 16 * sum(self.taps)))

    def evaluate(self, theta: Tensor, group: Tensor) -> Tensor:
        """Return H ``(F, out, in)`` of groups ``(F,)`` at frequencies ``(F, D)``."""
        shape = self.coefficients.shape[2:]
        if self.groups == 1:
            angles = theta @ self._exponents(self.taps)  # (F, ΠQ)
            flat = self.coefficients[0].flatten(1)  # (ΠQ, out·in)
            return torch.complex(torch.cos(angles) @ flat, torch.sin(angles) @ flat).reshape(-1, *shape)
        along = []
        for axis, count in enumerate(self.taps):
            turn = theta[:, axis, None] * torch.arange(count, dtype=torch.float64)
            along.append(torch.complex(torch.cos(turn), torch.sin(turn)))
        if prod(self.taps) > _MANY_TAPS:
            return self._axis_by_axis(along, group)
        phases = torch.ones(len(theta), 1, dtype=torch.complex128)
        for factor in along:
            phases = (phases[:, :, None] * factor[:, None, :]).flatten(1)
        chosen = self.coefficients.flatten(2)[group]  # (F, ΠQ, out·in)
        real = torch.bmm(phases.real[:, None], chosen)[:, 0]
        imaginary = torch.bmm(phases.imag[:, None], chosen)[:, 0]
        return torch.complex(real, imaginary).reshape(-1, *shape)

    def _axis_by_axis(self, along: list[Tensor], group: Tensor) -> Tensor:
        """Sum over one axis after the other, group by group: no array of F·ΠQ phases."""
        result = torch.empty(len(group), *self.coefficients.shape[2:], dtype=torch.complex128)
        for index in torch.unique(group).tolist():
            rows = group == index
            first, *others = (factor[rows] for factor in along)
            flat = self.coefficients[index].reshape(self.taps[0], -1)
            part = torch.complex(first.real @ flat, first.imag @ flat)
            for factor in others:
                part = torch.bmm(factor[:, None], part.reshape(len(factor), factor.shape[1], -1))[:, 0]
            result[rows] = part.reshape(-1, *result.shape[1:])
        return result

    def gram(self, theta: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Return G = HᴴH ``(F, in, in)`` and bounds ``(F,)`` on the errors of its eigenvalues."""
        if self.groups == 1 and self.side >= LARGE_SIDE:
            return self._gram_from_correlations(theta)
        symbols = self.evaluate(theta, group)
        square = symbols.mH @ symbols
        trace = square.diagonal(dim1=-2, dim2=-1).real.sum(-1)
        slack = self.rounding[group]
        error = EPS * (4 * symbols.shape[-2] + 16) * trace + slack * (2 * trace.clamp_min(0).sqrt() + slack)
        return square, error

    def _gram_from_correlations(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return G(θ) = A₀ + X + Xᴴ, X = Σ_{q>0} A_q e^{iq·θ}: no product of large matrices per frequency.

        Error: out·eps from each product of coefficients, T from their sums, phases as in ``rounding``, all
        relative to (Σ‖B_q‖_F)².
        """
        centre, shifts, products = self._correlations
        angles = theta @ shifts
        half = torch.complex(torch.cos(angles) @ products, torch.sin(angles) @ products)
        half = half.reshape(-1, *centre.shape)
        square = centre + half + half.mH
        taps = prod(self.taps)
        factor = EPS * (self.coefficients.shape[2] + 16 * sum(self.taps) + 4 * taps + 16)
        return square, (factor * self.norms[0] ** 2).expand(len(theta))

    @cached_property
    def _correlations(self) -> tuple[Tensor, Tensor, Tensor]:
        """A₀, the shifts q > 0 ``(D, S)`` and A_q = Σ_t B_tᵀB_{t+q} ``(S, in²)`` of the only group."""
        coefficients, side = self.coefficients[0], self.side
        places = self._exponents(self.taps).T.long().tolist()
        sums: dict[tuple[int, ...], Tensor] = {}
        for i, first in enumerate(places):
            for j in range(i, len(places)):  # later in lexicographic order: exactly the q ≥ 0
                shift = tuple(b - a for a, b in zip(first, places[j], strict=True))
                part = coefficients[i].T @ coefficients[j]
                sums[shift] = sums[shift].add_(part) if shift in sums else part
        centre = sums.pop((0,) * len(self.taps))
        shifts = torch.tensor(list(sums), dtype=torch.float64).reshape(len(sums), len(self.taps)).T
        stacked = torch.stack(list(sums.values())) if sums else centre.new_zeros(0, side, side)
        return centre, shifts, stacked.flatten(1)

    @staticmethod
    def _exponents(taps: tuple[int, ...]) -> Tensor:
        """All multi-indices below ``taps`` ``(D, ΠQ)`` in lexicographic order."""
        grids = torch.meshgrid(*(torch.arange(q, dtype=torch.float64) for q in taps), indexing="ij")
        return torch.stack([grid.reshape(-1) for grid in grids])

    def values(self, theta: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return singular values of H ``(F, in)``, descending, with lower and upper ends."""
        if self.side == 1:
            symbols = self.evaluate(theta, group)
            values = torch.linalg.vector_norm(symbols.flatten(1), dim=1, keepdim=True)
            error = values * (EPS * (symbols.shape[1] + 8)) + self.rounding[group][:, None]
            return self._in_units(group, values, (values - error).clamp_min(0), values + error)
        square, error = self.gram(theta, group)
        eigenvalues = torch.linalg.eigvalsh(square).flip(-1)
        delta = (error + EPS * 32 * self.side * eigenvalues[:, 0].clamp_min(0))[:, None]
        values = eigenvalues.clamp_min(0).sqrt()
        lower = (eigenvalues - delta).clamp_min(0).sqrt() * (1 - EPS)
        upper = (eigenvalues.clamp_min(0) + delta).sqrt() * (1 + EPS)
        return self._in_units(group, values, lower, upper)

    def _in_units(self, group: Tensor, *ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values and their ends times the groups' units; rounded outwards where that is subnormal."""
        values, lower, upper = (end * self.units[group][:, None] for end in ends)
        return values, (lower - TINY * (lower > 0)).clamp_min(0), upper + TINY * (upper > 0)

    def below(self, theta: Tensor, group: Tensor, level: Tensor | float) -> Tensor:
        """Return for each frequency whether a Cholesky factorisation proves ‖H(θ)‖ < level ``(F,)``.

        If the factorisation of M = (level² − δ)·I − G runs through, M + E is positive semidefinite for a
        backward error ‖E‖ ≤ 4(n+2)·eps·tr M; δ covers E and the errors of G. A failure proves nothing.

        **Source:** N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., theorem 10.3;
        S. M. Rump, "Verification of positive definiteness", BIT 46 (2006).
        """
        square, error = self.gram(theta, group)
        n = square.shape[-1]
        levels = torch.as_tensor(level, dtype=torch.float64).expand(len(theta)) / self.units[group]
        levels = levels.clamp_max(1e100)  # a level far above a group's size: its square must be a number
        delta = error + 8 * (n + 2) * n * EPS * levels**2
        shifted = -square
        shifted.diagonal(dim1=-2, dim2=-1).add_((levels**2 - delta)[:, None])
        proven: Tensor = torch.linalg.cholesky_ex(shifted).info == 0
        return proven


def polynomial(weight: Tensor, stride: Sequence[int]) -> Polynomial:
    """Return the polyphase symbol of an undilated kernel ``(groups, out, in, *k)``."""
    dims = weight.ndim - 3
    weight = weight.detach().cpu().double()
    taps = tuple(-(-weight.shape[3 + a] // stride[a]) for a in range(dims))
    missing = [taps[a] * stride[a] - weight.shape[3 + a] for a in range(dims)]
    weight = torch.nn.functional.pad(
        weight, [side for a in reversed(range(dims)) for side in (0, missing[a])]
    )
    groups, out, channels = weight.shape[:3]
    split = [size for a in range(dims) for size in (taps[a], stride[a])]
    weight = weight.reshape(groups, out, channels, *split)
    quotients, residues = [3 + 2 * a for a in range(dims)], [4 + 2 * a for a in range(dims)]
    weight = weight.permute(0, *quotients, 1, 2, *residues).reshape(groups, prod(taps), out, -1)
    used = (weight != 0).flatten(0, 2).any(dim=0)  # phases that no tap falls on are zero columns
    weight = weight[..., used] if bool(used.any()) else weight[..., :1]
    if weight.shape[2] < weight.shape[3]:
        weight = weight.transpose(2, 3)
    peaks = weight.abs().flatten(1).amax(dim=1)
    # Neither factor of the division may leave float64: 2^1074 does.
    exponent = torch.where(peaks > 0, torch.frexp(peaks).exponent - 1, 0)
    half = torch.div(exponent, 2, rounding_mode="floor")
    shape = (-1, *(1,) * (weight.ndim - 1))
    weight = torch.ldexp(torch.ldexp(weight, -half.reshape(shape)), (half - exponent).reshape(shape))
    units = torch.ldexp(torch.ones_like(peaks), exponent)
    return Polynomial(weight.contiguous(), taps, units)


def frequency_work(groups: int, out: int, channels: int, taps: int) -> float:
    """Estimate the flops of judging one frequency: H or G, and one factorisation, for every group."""
    long, side = max(out, channels), min(out, channels)
    if groups == 1 and side >= LARGE_SIDE:
        return 4.0 * taps * side * side + 6.0 * side**3
    return groups * (4.0 * taps * out * channels + 8.0 * long * side * side + 60.0 * side**3 + 200.0)
