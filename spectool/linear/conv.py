"""Convolutions and transposed convolutions in one to three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from spectool.errors import OperatorError
from spectool.linear.geometry import ConvGeometry
from spectool.linear.padding import check_padding, pad, pad_adjoint
from spectool.linear.scaling import chunks, power_of_two, scaled_weight

_CONV: dict[int, Callable[..., Any]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Any]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class ConvMap:
    """A convolution, or a transposed one, on inputs of one known size. Differentiable in its weight."""

    def __init__(
        self,
        weight: torch.Tensor,
        in_shape: tuple[int, ...],
        geometry: ConvGeometry,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        dims = geometry.dims
        if weight.ndim != dims + 2 or len(in_shape) != dims + 1:
            raise OperatorError(f"conv{dims}d does not fit weight {tuple(weight.shape)} and input {in_shape}")
        self.weight, self.geometry = weight, geometry
        self.dtype, self.device = dtype, torch.device(device)
        self.in_shape = tuple(in_shape)
        n = self.in_shape[1:]
        kernel = tuple(weight.shape[2:])
        channels = weight.shape[0] if geometry.transposed else weight.shape[1] * geometry.groups
        outs = weight.shape[1] * geometry.groups if geometry.transposed else weight.shape[0]
        if channels != in_shape[0] or weight.shape[0] % geometry.groups:
            raise OperatorError(
                f"weight {tuple(weight.shape)} with {geometry.groups} groups does not take {in_shape[0]} channels"
            )
        m = geometry.output_size(n, kernel)
        if min(m) < 1:
            raise OperatorError(f"kernel {kernel} does not fit input {in_shape}: output size would be {m}")
        self.out_shape = (outs, *m)
        extra = geometry.output_padding or (0,) * dims
        if geometry.transposed:
            self._pads = tuple((lo, hi - e) for (lo, hi), e in zip(geometry.padding, extra, strict=True))
            self._wide, self._narrow = m, n
        else:
            self._pads = geometry.padding
            self._wide, self._narrow = n, m
        self._mode = geometry.padding_mode
        for length, (lo, hi) in zip(self._wide, self._pads, strict=True):
            check_padding(length, lo, hi, self._mode)
        self._kernel = weight.to(device=self.device, dtype=dtype)

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the convolution."""
        return self._scatter(x) if self.geometry.transposed else self._gather(x)

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply its adjoint."""
        return self._gather(y) if self.geometry.transposed else self._scatter(y)

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        g = self.geometry
        y: torch.Tensor = _CONV[g.dims](
            pad(x, self._pads, self._mode), self._kernel, None, g.stride, 0, g.dilation, g.groups
        )
        return y

    def _scatter(self, y: torch.Tensor) -> torch.Tensor:
        g = self.geometry
        padded = tuple(n + lo + hi for n, (lo, hi) in zip(self._wide, self._pads, strict=True))
        extra = [
            p - ((m - 1) * s + d * (k - 1) + 1)
            for p, m, s, d, k in zip(
                padded, self._narrow, g.stride, g.dilation, self.weight.shape[2:], strict=True
            )
        ]
        full = _TRANSPOSED[g.dims](y, self._kernel, None, g.stride, 0, 0, g.groups, g.dilation)
        full = F.pad(full, [amount for e in reversed(extra) for amount in (0, e)])
        return pad_adjoint(full, self._pads, self._mode)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> ConvMap:
        """Return the same convolution with arithmetic in ``dtype`` on ``device``."""
        return ConvMap(
            self.weight, self.in_shape, self.geometry, dtype=dtype or self.dtype, device=device or self.device
        )

    def all_finite(self) -> bool:
        """Return whether the kernel holds no NaN and no infinity."""
        return all(bool(torch.isfinite(chunk).all()) for chunk in chunks(self.weight))

    def prescale(self) -> tuple[ConvMap, float]:
        """Return (map with taps of magnitude ~1, power of two that was taken out)."""
        factor = power_of_two(self.weight)
        weight = scaled_weight(self.weight, factor)
        return ConvMap(weight, self.in_shape, self.geometry, dtype=self.dtype, device=self.device), factor
