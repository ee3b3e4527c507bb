"""Products of small matrices, one per axis: pools, up-sampling, padding."""

from __future__ import annotations

import torch

from spectool.errors import OperatorError


class SeparableMap:
    """I_C ⊗ A₁ ⊗ A₂ ⊗ …: each factor acts along its own axis, on every channel alike."""

    def __init__(
        self,
        channels: int,
        factors: tuple[torch.Tensor, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for factor in factors:
            if factor.ndim != 2:
                raise OperatorError(f"a factor has two axes, this one has shape {tuple(factor.shape)}")
        self.channels, self.factors = channels, tuple(factors)
        self.dtype, self.device = dtype, torch.device(device)
        self.in_shape = (channels, *(int(f.shape[1]) for f in factors))
        self.out_shape = (channels, *(int(f.shape[0]) for f in factors))
        self._cast = tuple(f.to(device=self.device, dtype=dtype) for f in factors)

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply every factor along its axis."""
        for axis, factor in enumerate(self._cast, start=2):
            x = torch.tensordot(x, factor, dims=([axis], [1])).movedim(-1, axis)
        return x

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply every factor's transpose along its axis."""
        for axis, factor in enumerate(self._cast, start=2):
            y = torch.tensordot(y, factor, dims=([axis], [0])).movedim(-1, axis)
        return y

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> SeparableMap:
        """Return the same map with arithmetic in ``dtype`` on ``device``."""
        return SeparableMap(
            self.channels, self.factors, dtype=dtype or self.dtype, device=device or self.device
        )
