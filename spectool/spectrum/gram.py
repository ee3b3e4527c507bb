"""The Gram operator of a linear map on its smaller side: what every iterative solver iterates."""

from __future__ import annotations

import math
from copy import copy
from typing import TYPE_CHECKING

import torch

from spectool.linear import adjoint, normal_matvec

if TYPE_CHECKING:
    from spectool.linear import LinearMap


class Gram:
    """B = f²·MᵀM on flat rows, M being A or Aᵀ (whichever has the smaller input) and f a power of two.

    Invariants: f·‖M‖ is between about 1/√size and 1 times the ratio ‖M‖_F/‖M‖ (see ``prescale``), so B neither
    overflows nor underflows in float32 for operators of scale 1e-33…1e25; every application is counted.

    Attributes:
        map: M.
        flipped: Whether M is Aᵀ.
        size: Dimension of the space B acts on, min(m, n).
        factor: f.
        applications: Single-vector applications of M plus of Mᵀ so far; shared by ``double``.
    """

    def __init__(self, A: LinearMap) -> None:
        wide, tall = math.prod(A.in_shape), math.prod(A.out_shape)
        self.flipped = tall < wide
        self.map: LinearMap = adjoint(A) if self.flipped else A
        self.size = min(wide, tall)
        self.factor = 1.0
        self._spent = [0]
        self._double: Gram | None = None

    @property
    def applications(self) -> int:
        """Applications of M plus of Mᵀ, of this object and of its ``double``."""
        return self._spent[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        return self.map.dtype

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.map.device

    def double(self) -> Gram:
        """Return the same operator in float64 where the map allows it (on the CPU where the device has none)."""
        if self.dtype == torch.float64:
            return self
        if self._double is None:
            device = torch.device("cpu") if self.device.type == "mps" else self.device
            other = copy(self)
            other.map = self.map.to(dtype=torch.float64, device=device)
            # Where the map stays as it is, what was built for it stays too.
            self._double = self if other.map is self.map else other
        return self._double

    def prescale(self, probe: torch.Tensor) -> bool:
        """Set f so that ‖f·M·probe‖ ≈ ‖probe‖; False if M maps the random row ``probe`` to zero.

        ‖Mx‖/‖x‖ of a random x is about ‖M‖_F/√size, at most ‖M‖. Costs 1 matvec.
        """
        self.factor = 1.0
        image = self.forward(probe).double()
        largest = float(image.abs().max()) if image.numel() else 0.0
        if largest == 0.0 or not math.isfinite(largest):
            return False
        norm = largest * float(torch.linalg.vector_norm(image / largest))
        gain = norm / float(torch.linalg.vector_norm(probe.double()))
        self.factor = 2.0 ** -round(math.log2(gain))
        if self._double is not None and self._double is not self:
            self._double.factor = self.factor
        return True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply f·M to rows ``(b, size)``; returns ``(b, other size)``. The factor goes first: no overflow."""
        self._spent[0] += x.shape[0]
        return self._rows(self.map.matvec(self._shaped(self._scaled(x), self.map.in_shape)))

    def backward(self, y: torch.Tensor) -> torch.Tensor:
        """Apply f·Mᵀ to rows ``(b, other size)``; returns ``(b, size)``."""
        self._spent[0] += y.shape[0]
        return self._rows(self.map.rmatvec(self._shaped(self._scaled(y), self.map.out_shape)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply B to rows ``(b, size)``. Costs b pairs."""
        self._spent[0] += 2 * x.shape[0]
        shaped = self._shaped(self._scaled(x), self.map.in_shape)
        return self._scaled(self._rows(normal_matvec(self.map, shaped)))

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.factor == 1.0 else x * self.factor

    def _shaped(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return x.to(dtype=self.dtype, device=self.device).reshape(x.shape[0], *shape)

    @staticmethod
    def _rows(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], -1)
