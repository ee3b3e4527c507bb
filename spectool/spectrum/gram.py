"""The Gram operator of a linear map on its smaller side: what every iterative solver iterates."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING

import torch

from spectool.errors import OperatorError
from spectool.linear import adjoint, is_single, largest, normal_matvec, prescale
from spectool.spectrum.arguments import weights
from spectool.spectrum.starts import Stream

if TYPE_CHECKING:
    from spectool.linear import LinearMap


_FAR = 80
"""Binary orders of magnitude up to which a factor on the vectors is enough."""

_BALANCED = 20
"""Binary orders of magnitude up to which the largest entry of a factor of a composition is left alone."""

_TOGETHER = 1 << 21
"""Entries of the rows that are applied at once: beyond that a larger batch saves no time, and what an application holds
on the way (patches, recordings of a function) is that many times as much."""

_LIMIT = 120
"""Largest binary order of magnitude of f: float32 ends at 127."""


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float64, on the CPU if its device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def inner(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the inner products x yᵀ of rows, accumulated in float64 where the device has it, on the CPU."""
    if x.device.type == "mps":
        return (x @ y.T).cpu().double()
    if len(x) == len(y) == 1:
        # Sums of float32 products: no float64 copies of the rows.
        return (x * y).sum(dim=1, keepdim=True, dtype=torch.float64).cpu()
    return (x.double() @ y.double().T).cpu()


def length(x: torch.Tensor) -> float:
    """Return the norm of one row, accumulated in float64 where the device has it."""
    dtype = None if x.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(x, dtype=dtype))


class Gram:
    """B = f²·MᵀM on flat rows, M being A or Aᵀ (whichever has the smaller input) and f a power of two.

    Invariants: f·‖M‖ is between about 1/√size and 1 times the ratio ‖M‖_F/‖M‖ (see ``prescale``), so B neither
    overflows nor underflows in float32 for operators of scale 1e-33…1e25; every application is counted.

    Attributes:
        map: M.
        flipped: Whether M is Aᵀ.
        size: Dimension of the space B acts on, min(m, n).
        factor: f.
        base: Power of two taken out of the weights themselves; 1 unless they are of extreme size.
        applications: Single-vector applications of M plus of Mᵀ so far; shared by ``double``.
        noise: Rounding that ``rounding.noise`` has found; None before that.
    """

    def __init__(self, A: LinearMap) -> None:
        wide, tall = math.prod(A.in_shape), math.prod(A.out_shape)
        self.flipped = tall < wide
        self.map: LinearMap = adjoint(A) if self.flipped else A
        self.size = min(wide, tall)
        self.factor, self.base = 1.0, 1.0
        self.noise: float | None = None
        self._source: Stream | None = None
        self._spent = [0]
        self._double: Gram | None = None

    @property
    def applications(self) -> int:
        """Applications of M plus of Mᵀ, of this object and of its ``double``."""
        return self._spent[0]

    @property
    def unit(self) -> float:
        """What a singular value of f·M is worth in the operator's own units."""
        return self.base / self.factor

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
            other.noise = None
            other.map = self.map.to(dtype=torch.float64, device=device)
            # Where the map stays as it is, what was built for it stays too.
            self._double = self if other.map is self.map else other
        return self._double

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` in the type and on the device of the rows."""
        # A device without float64 can neither send nor receive it: cast on the side that has it.
        return (
            x.cpu().to(self.dtype).to(self.device)
            if "mps" in (x.device.type, self.device.type)
            else x.to(device=self.device, dtype=self.dtype)
        )

    def random(self, rows: int, source: Stream) -> torch.Tensor:
        """Return ``(rows, size)`` independent standard normal numbers, generated in float64 on the CPU."""
        return self.take(source.normal(rows, self.size))

    def draw(self, rows: int, size: int) -> torch.Tensor:
        """Return standard normal numbers in float64 on the CPU from the source that ``prescale`` was given."""
        self._source = self._source or Stream(0)
        return self._source.normal(rows, size)

    def prescale(self, source: Stream) -> bool:
        """Set f so that ‖f·M·x‖ ≈ ‖x‖ for a random x; False if M maps that to zero.

        ‖Mx‖/‖x‖ is about ‖M‖_F/√size, at most ‖M‖. Costs 1 matvec; 2 where the weights are so large or small that
        they have to be rescaled themselves, because float32 would lose digits of their products. Where float32 shows
        nothing, or no number, float64 is tried.

        Raises:
            OperatorError: If the image is NaN or infinite.
        """
        self._source = source
        probe = self.random(1, source)
        gain = self._moderated(probe)
        if not 2.0**-_FAR < gain < 2.0**_FAR and self.widen():
            gain = self._moderated(probe)
        if not math.isfinite(gain):
            raise OperatorError(
                f"the operator gives NaN or infinite values in {str(self.dtype).removeprefix('torch.')}",
                hint="look at its weights; scale them, or compute in float64",
            )
        if gain == 0.0:
            return False
        self.factor = 2.0 ** max(-_LIMIT, min(_LIMIT, -round(math.log2(gain))))
        return True

    def widen(self) -> bool:
        """Do everything in float64 from here on; False where the map computes in float64 already, or cannot."""
        other = self.double()
        if other is self:
            return False
        self.map, self.noise, self._double = other.map, None, self
        return True

    def _moderated(self, probe: torch.Tensor) -> float:
        """Return ‖Mx‖/‖x‖, the weights rescaled if that is far from 1."""
        gain = self._gain(probe)
        if not 2.0**-_FAR < gain < 2.0**_FAR or self._is_ill_balanced():
            inner, base = prescale(self.map)
            if base not in (0.0, 1.0):
                self.map, self.base = inner, self.base * base
                gain = self._gain(probe)
        return gain

    def _is_ill_balanced(self) -> bool:
        """Whether the factors of a composition are so large and small that float32 would underflow between them."""
        if is_single(self.map):
            return False
        peaks = [largest(weight) for weight in weights(self.map)]
        return any(peak and not 2.0**-_BALANCED < peak < 2.0**_BALANCED for peak in peaks)

    def _gain(self, probe: torch.Tensor) -> float:
        image = wide(self.forward(probe))
        largest = float(image.abs().max())
        if largest == 0.0 or not math.isfinite(largest):
            return largest
        return largest * float(
            torch.linalg.vector_norm(image / largest) / torch.linalg.vector_norm(wide(probe))
        )

    def spend(self, matvecs: int) -> None:
        """Count applications that were made elsewhere."""
        self._spent[0] += matvecs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply f·M to rows ``(b, size)``; returns ``(b, other size)``. The factor goes first: no overflow."""
        self._spent[0] += x.shape[0]
        return self._in_parts(
            lambda rows: self._rows(self.map.matvec(self._shaped(self._scaled(rows), self.map.in_shape))), x
        )

    def backward(self, y: torch.Tensor) -> torch.Tensor:
        """Apply f·Mᵀ to rows ``(b, other size)``; returns ``(b, size)``."""
        self._spent[0] += y.shape[0]
        return self._in_parts(
            lambda rows: self._rows(self.map.rmatvec(self._shaped(self._scaled(rows), self.map.out_shape))), y
        )

    def _in_parts(self, apply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        larger = max(math.prod(self.map.in_shape), math.prod(self.map.out_shape))
        most = max(1, _TOGETHER // max(1, larger))
        if len(x) <= most:
            return apply(x)
        return torch.cat([apply(x[begin : begin + most]) for begin in range(0, len(x), most)])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply B to rows ``(b, size)``; the result is the caller's to overwrite. Costs b pairs."""
        self._spent[0] += 2 * x.shape[0]
        shaped = self._shaped(self._scaled(x), self.map.in_shape)
        image = self._scaled(self._rows(normal_matvec(self.map, shaped))).contiguous()
        # An identity may hand back its argument.
        own = image.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        return image if own else image.clone()

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.factor == 1.0 else x * self.factor

    def _shaped(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return self.take(x).reshape(x.shape[0], *shape)

    @staticmethod
    def _rows(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], -1)
