"""Multiplication by a fixed tensor: batch norm in evaluation mode, layer scale, masks."""

from __future__ import annotations

import math

import torch

from spectool.errors import OperatorError
from spectool.linear.scaling import all_finite, check_real, frobenius, power_of_two, scaled_weight


class DiagonalMap:
    """x ↦ s·x, entry by entry; self-adjoint. Differentiable in its scale.

    Args:
        scale: One factor per index of ``axis``, or a tensor of the full ``shape``; any float type.
        shape: Shape of one vector, without the batch axis.
        axis: Axis of ``shape`` that a one-dimensional scale runs along.
        dtype: Arithmetic type.
        device: Device of the vectors.

    Raises:
        OperatorError: If the scale fits neither the axis nor the shape.

    Example:
        >>> bn = DiagonalMap(torch.tensor([2.0, -1.0]), (2, 1, 1))
        >>> bn.matvec(torch.ones(1, 2, 1, 1)).flatten().tolist()
        [2.0, -1.0]
    """

    def __init__(
        self,
        scale: torch.Tensor,
        shape: tuple[int, ...],
        *,
        axis: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_real(scale)
        shape = tuple(int(size) for size in shape)
        self.in_shape = self.out_shape = shape
        self.dtype, self.device = dtype, torch.device(device)
        self.scale, self.axis = scale, axis
        self.per_channel = False  # whether there is one factor per index of axis 0
        if tuple(scale.shape) == shape and len(shape) != 1:
            view = shape
        elif scale.ndim == 1 and -len(shape) <= axis < len(shape) and scale.shape[0] == shape[axis]:
            self.axis = axis % len(shape)
            self.per_channel = self.axis == 0
            view = tuple(n if i == self.axis else 1 for i, n in enumerate(shape))
        else:
            raise OperatorError(
                f"a scale of shape {tuple(scale.shape)} fits neither axis {axis} of {shape} nor the shape",
                hint="give one factor per channel, or one per entry",
            )
        self._view = view
        self._factor = scale.to(device=self.device, dtype=dtype).reshape(view)

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``(b, *in_shape)`` by the scale."""
        return x * self._factor

    rmatvec = matvec

    def full_scale(self) -> torch.Tensor:
        """Return the scale in its stored type, in a shape that broadcasts against ``in_shape``."""
        return self.scale.reshape(self._view)

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> DiagonalMap:
        """Return the same map with arithmetic in ``dtype`` on ``device``."""
        return DiagonalMap(
            self.scale, self.in_shape, axis=self.axis, dtype=dtype or self.dtype, device=device or self.device
        )

    def frobenius(self) -> float:
        """Return ‖A‖_F: every factor counts once per entry it multiplies."""
        repeats = math.prod(self.in_shape) / max(self.scale.numel(), 1)
        return frobenius(self.scale) * math.sqrt(repeats)

    def all_finite(self) -> bool:
        """Return whether no factor is NaN or infinite."""
        return all_finite(self.scale)

    def prescale(self) -> tuple[DiagonalMap, float]:
        """Return (map with factors of magnitude ~1, power of two that was taken out)."""
        factor = power_of_two(self.scale)
        weight = scaled_weight(self.scale, factor)
        return DiagonalMap(
            weight, self.in_shape, axis=self.axis, dtype=self.dtype, device=self.device
        ), factor
