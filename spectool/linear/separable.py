"""Products of small matrices, one per axis: pools, up-sampling, padding."""

from __future__ import annotations

import math

import torch

from spectool.errors import OperatorError
from spectool.linear.scaling import (
    all_finite,
    check_real,
    frobenius,
    power_of_two,
    power_product,
    scaled_weight,
)


class SeparableMap:
    """I_C ⊗ A₁ ⊗ A₂ ⊗ …: each factor acts along its own axis, on every channel alike.

    Average and adaptive pools, nearest and linear up-sampling, padding and cropping are of this kind. The
    factors are applied as dense matrices, the one that shrinks the data most first: right for the sizes of
    feature maps, wasteful for a long one-dimensional signal. Differentiable in the factors.

    Args:
        channels: Number of channels, at least 1.
        factors: One matrix ``(m_i, n_i)`` per axis, any float type.
        dtype: Arithmetic type.
        device: Device of the vectors.

    Raises:
        OperatorError: If a factor is not a matrix or there is nothing to act on.

    Example:
        >>> halve = torch.tensor([[0.5, 0.5]])
        >>> SeparableMap(1, (halve, halve)).matvec(torch.ones(1, 1, 2, 2)).tolist()
        [[[[1.0]]]]
    """

    def __init__(
        self,
        channels: int,
        factors: tuple[torch.Tensor, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for factor in factors:
            check_real(factor)
        shapes = [tuple(factor.shape) for factor in factors]
        if channels < 1 or any(len(shape) != 2 or 0 in shape for shape in shapes):
            raise OperatorError(f"{channels} channels and factors {shapes}: each factor must be a matrix")
        self.channels, self.factors = channels, tuple(factors)
        self.dtype, self.device = dtype, torch.device(device)
        self.in_shape = (channels, *(int(f.shape[1]) for f in factors))
        self.out_shape = (channels, *(int(f.shape[0]) for f in factors))
        self._cast = tuple(f.to(device=self.device, dtype=dtype) for f in factors)
        # Cheapest first: the order does not matter to the result, but to the size of what lies between.
        self._order = sorted(range(len(factors)), key=lambda i: factors[i].shape[0] / factors[i].shape[1])

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply every factor to ``(b, *in_shape)`` along its axis."""
        for axis in self._order:
            x = _along(x, self._cast[axis], axis + 2)
        return x

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply every factor's transpose to ``(b, *out_shape)`` along its axis."""
        for axis in reversed(self._order):
            y = _along(y, self._cast[axis].T, axis + 2)
        return y

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> SeparableMap:
        """Return the same map with arithmetic in ``dtype`` on ``device``."""
        return SeparableMap(
            self.channels, self.factors, dtype=dtype or self.dtype, device=device or self.device
        )

    def frobenius(self) -> float:
        """Return ‖A‖_F = √C·‖A₁‖_F·‖A₂‖_F·… in float64."""
        return math.sqrt(self.channels) * math.prod(frobenius(factor) for factor in self.factors)

    def all_finite(self) -> bool:
        """Return whether no factor holds NaN or infinity."""
        return all(all_finite(factor) for factor in self.factors)

    def prescale(self) -> tuple[SeparableMap, float]:
        """Return (map with every factor's entries of magnitude ~1, power of two that was taken out)."""
        scales = [power_of_two(factor) for factor in self.factors]
        factors = tuple(scaled_weight(f, scale) for f, scale in zip(self.factors, scales, strict=True))
        scaled = SeparableMap(self.channels, factors, dtype=self.dtype, device=self.device)
        return scaled, power_product(scales)


def _along(x: torch.Tensor, factor: torch.Tensor, axis: int) -> torch.Tensor:
    """Multiply one axis of ``x`` by a matrix, by one batched product without moving the axis."""
    before, n, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    flat = x.reshape(math.prod(before), n, math.prod(after))
    product = flat[:, :, 0] @ factor.T if flat.shape[2] == 1 else factor @ flat
    return product.reshape(*before, factor.shape[0], *after)
