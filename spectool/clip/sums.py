"""Several operators as one: the largest of their norms is the norm of their direct sum."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from spectool.linear import LinearMap


class DirectSum:
    """diag(f₁A₁, f₂A₂, …) on flat vectors; ‖·‖₂ is the largest fᵢ‖Aᵢ‖₂.

    Args:
        maps: A₁, A₂, …, of one type and device.
        factors: f₁, f₂, …
    """

    def __init__(self, maps: Sequence[LinearMap], factors: Sequence[float]) -> None:
        self._maps, self._factors = tuple(maps), tuple(factors)
        self.dtype, self.device = maps[0].dtype, maps[0].device
        self._ins = [prod(A.in_shape) for A in maps]
        self._outs = [prod(A.out_shape) for A in maps]
        self.in_shape, self.out_shape = (sum(self._ins),), (sum(self._outs),)

    def matvec(self, x: Tensor) -> Tensor:
        """Apply every map to its part of ``(b, n)``."""
        parts = torch.split(x, self._ins, dim=1)
        made = [
            f * A.matvec(part.reshape(-1, *A.in_shape)).reshape(len(x), -1)
            for A, part, f in zip(self._maps, parts, self._factors, strict=True)
        ]
        return torch.cat(made, dim=1)

    def rmatvec(self, y: Tensor) -> Tensor:
        """Apply every adjoint to its part of ``(b, m)``."""
        parts = torch.split(y, self._outs, dim=1)
        made = [
            f * A.rmatvec(part.reshape(-1, *A.out_shape)).reshape(len(y), -1)
            for A, part, f in zip(self._maps, parts, self._factors, strict=True)
        ]
        return torch.cat(made, dim=1)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> DirectSum:
        """Return the same sum in another type or on another device."""
        return DirectSum([A.to(dtype=dtype, device=device) for A in self._maps], self._factors)
