"""Convolutions and transposed convolutions in one to three dimensions."""

from __future__ import annotations

import math

import torch

from spectool.errors import OperatorError
from spectool.linear.geometry import ConvGeometry
from spectool.linear.memory import check_memory
from spectool.linear.padding import check_padding
from spectool.linear.scaling import all_finite, check_real, chunks, power_of_two, scaled_weight
from spectool.linear.window import Window


class ConvMap:
    """A convolution, or a transposed one, on inputs of one known size; no bias.

    Forward and adjoint are closed forms for every stride, dilation, padding (asymmetric, negative, larger than
    the kernel), padding mode and output padding; ``dot_test`` proves them adjoint. The cost is that of torch's
    own convolutions. A weight in a half type is upcast once, when first used.

    Differentiable in its weight if that requires a gradient; it is then read anew at every application. Else
    it must not change afterwards, because forms of it are kept.

    Args:
        weight: ``(out, in/groups, *k)``; if transposed ``(in, out/groups, *k)``; any float type.
        in_shape: ``(channels, *n)`` of one input.
        geometry: How the kernel slides.
        dtype: Arithmetic type.
        device: Device of the vectors.

    Raises:
        OperatorError: If weight, input and geometry do not fit each other.

    Example:
        >>> box = ConvMap(torch.ones(1, 1, 3), (1, 4), ConvGeometry((1,), ((1, 1),), (1,)))
        >>> box.matvec(torch.ones(1, 1, 4)).tolist()
        [[[2.0, 3.0, 3.0, 2.0]]]
    """

    def __init__(
        self,
        weight: torch.Tensor,
        in_shape: tuple[int, ...],
        geometry: ConvGeometry,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.weight, self.geometry = weight, geometry
        self.dtype, self.device = dtype, torch.device(device)
        self.in_shape = tuple(int(size) for size in in_shape)
        _check(weight, self.in_shape, geometry)
        kernel = tuple(int(k) for k in weight.shape[2:])
        n = self.in_shape[1:]
        m = geometry.output_size(n, kernel)
        if min(m) < 1:
            raise OperatorError(
                f"kernel {kernel} does not fit input {self.in_shape}: the output size would be {m}",
                hint="give a larger input size",
            )
        if geometry.transposed:
            # The adjoint of the convolution from m to n whose trailing padding lacks what output_padding adds.
            extra = geometry.output_padding or (0,) * geometry.dims
            pads = tuple((lo, hi - e) for (lo, hi), e in zip(geometry.padding, extra, strict=True))
            wide, narrow = m, n
            channels = weight.shape[1] * geometry.groups
        else:
            pads, wide, narrow = geometry.padding, n, m
            channels = weight.shape[0]
        rows, columns = (channels, in_shape[0]) if geometry.transposed else (in_shape[0], channels)
        padded = [max(length, length + sum(sides)) for length, sides in zip(wide, pads, strict=True)]
        check_memory("a padded input", self.device, (rows, *padded))
        check_memory("an output", self.device, (columns, *narrow))
        for length, (lead, trail) in zip(wide, pads, strict=True):
            check_padding(length, lead, trail, geometry.padding_mode)
        self.out_shape = (int(channels), *m)
        self._window = Window(weight, wide, narrow, pads, geometry, self.dtype, self.device)

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``(b, *in_shape)``."""
        return self._window.scatter(x) if self.geometry.transposed else self._window.gather(x)

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the adjoint to ``(b, *out_shape)``."""
        return self._window.gather(y) if self.geometry.transposed else self._window.scatter(y)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> ConvMap:
        """Return the same convolution with arithmetic in ``dtype`` on ``device``; from the weight as given."""
        return ConvMap(
            self.weight, self.in_shape, self.geometry, dtype=dtype or self.dtype, device=device or self.device
        )

    def frobenius(self) -> float:
        """Return ‖A‖_F in float64.

        Every tap counts once per position at which it reads a real pixel. Where padding repeats pixels, two
        taps may read the same one and then add up before they are squared: with N the counts of such
        coincidences per axis, ‖A‖_F² = Σ over channel pairs of wᵀ(N₁⊗N₂⊗…)w.
        """
        rows = self.weight.detach().flatten(2).flatten(0, 1)  # (channel pairs, taps)
        overlaps = self._window.overlaps()
        if self.geometry.padding_mode == "zeros":
            counts = torch.ones(1, dtype=torch.float64)
            for overlap in overlaps:
                counts = torch.kron(counts, overlap.diagonal())
            total = sum(float(chunk.square().sum(0) @ counts) for chunk in chunks(rows))
        else:
            gram = sum((chunk.T @ chunk).cpu() for chunk in chunks(rows))
            weights = torch.ones((1, 1), dtype=torch.float64)
            for overlap in overlaps:
                weights = torch.kron(weights, overlap)
            total = float((gram * weights).sum())
        return math.sqrt(max(total, 0.0))

    def all_finite(self) -> bool:
        """Return whether the kernel holds no NaN and no infinity."""
        return all_finite(self.weight)

    def prescale(self) -> tuple[ConvMap, float]:
        """Return (map with taps of magnitude ~1, power of two that was taken out)."""
        factor = power_of_two(self.weight)
        weight = scaled_weight(self.weight, factor)
        return ConvMap(weight, self.in_shape, self.geometry, dtype=self.dtype, device=self.device), factor


def _check(weight: torch.Tensor, in_shape: tuple[int, ...], geometry: ConvGeometry) -> None:
    check_real(weight)
    dims, shape = geometry.dims, tuple(weight.shape)
    if dims not in (1, 2, 3):
        raise OperatorError(f"convolutions have 1 to 3 spatial axes, this geometry has {dims}")
    if len(shape) != dims + 2 or len(in_shape) != dims + 1:
        raise OperatorError(f"a conv{dims}d does not fit weight {shape} and input {in_shape}")
    lengths = {len(geometry.padding), len(geometry.dilation), len(geometry.output_padding) or dims}
    if lengths != {dims}:
        raise OperatorError(f"the geometry has {dims} strides, but not as many paddings or dilations")
    if min(*geometry.stride, *geometry.dilation, geometry.groups, *shape, *in_shape) < 1:
        raise OperatorError(
            f"stride {geometry.stride}, dilation {geometry.dilation}, groups {geometry.groups}, weight {shape} "
            f"and input {in_shape} must be positive"
        )
    if geometry.transposed and geometry.padding_mode != "zeros":
        raise OperatorError(f"a transposed convolution cannot have {geometry.padding_mode} padding")
    if any(geometry.output_padding) and not geometry.transposed:
        raise OperatorError("only a transposed convolution has output padding")
    takes = shape[0] if geometry.transposed else shape[1] * geometry.groups
    if takes != in_shape[0] or shape[0] % geometry.groups:
        raise OperatorError(
            f"weight {shape} in {geometry.groups} groups does not take the {in_shape[0]} channels of {in_shape}"
        )
