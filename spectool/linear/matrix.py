"""A dense matrix in its stored type."""

from __future__ import annotations

import torch

from spectool.errors import OperatorError


class MatrixMap:
    """x ↦ Wx for a stored matrix. Differentiable in its weight."""

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if weight.ndim != 2:
            raise OperatorError(f"a matrix has two axes, this weight has shape {tuple(weight.shape)}")
        self.device, self.dtype = torch.device(device), dtype
        self.weight = weight.to(self.device)
        self.out_shape, self.in_shape = (weight.shape[0],), (weight.shape[1],)

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply W."""
        return x @ self.weight.to(self.dtype).T

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply Wᵀ."""
        return y @ self.weight.to(self.dtype)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> MatrixMap:
        """Return the same matrix with arithmetic in ``dtype`` on ``device``."""
        return MatrixMap(self.weight, dtype=dtype or self.dtype, device=device or self.device)
