"""Any affine callable, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable

import torch

Function = Callable[[torch.Tensor], torch.Tensor]


class FunctionMap:
    """The linear part of any affine callable on ``(b, *in_shape)``."""

    def __init__(
        self,
        function: Function,
        in_shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        remake: Callable[[torch.dtype, torch.device], Function] | None = None,
    ) -> None:
        self.function, self.remake = function, remake
        self.dtype, self.device = dtype, torch.device(device)
        self.in_shape = tuple(in_shape)
        with torch.no_grad():
            self.out_shape = tuple(function(self._zeros(1)).shape[1:])

    def _zeros(self, b: int) -> torch.Tensor:
        return torch.zeros((b, *self.in_shape), dtype=self.dtype, device=self.device)

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the linear part."""
        with torch.no_grad():
            tangent: torch.Tensor = torch.func.jvp(self.function, (torch.zeros_like(x),), (x,))[1]
        return tangent

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply its adjoint."""
        with torch.no_grad():
            pull = torch.func.vjp(self.function, self._zeros(y.shape[0]))[1]
            result: torch.Tensor = pull(y)[0]
        return result

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> FunctionMap:
        """Return the map in another precision if ``remake`` can make one, else itself."""
        dtype, device = dtype or self.dtype, torch.device(device or self.device)
        if self.remake is None or (dtype, device) == (self.dtype, self.device):
            return self
        return FunctionMap(
            self.remake(dtype, device), self.in_shape, dtype=dtype, device=device, remake=self.remake
        )
