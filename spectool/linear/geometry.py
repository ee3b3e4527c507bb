"""The geometry of a convolution as plain data: no tensors, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PaddingMode = Literal["zeros", "circular", "reflect", "replicate"]


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution kernel slides; every tuple has one entry per spatial axis.

    Attributes:
        stride: Step between output positions (for a transposed one: between input positions).
        padding: Leading and trailing padding of each axis. For a transposed convolution it is the padding of
            the convolution it transposes, i.e. what is cropped from its output; negative padding crops.
        dilation: Step between kernel taps.
        groups: Number of channel groups.
        padding_mode: What is read outside the input; anything but zeros only when not transposed.
        transposed: Whether this is the adjoint of a convolution; its weight is then stored
            (in, out/groups, *k).
        output_padding: Extra size at the trailing end of a transposed convolution's output.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: PaddingMode = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.stride)

    @staticmethod
    def plain(dims: int, *, groups: int = 1, transposed: bool = False) -> ConvGeometry:
        """Stride 1, no padding, no dilation."""
        return ConvGeometry(
            (1,) * dims, ((0, 0),) * dims, (1,) * dims, groups, "zeros", transposed, (0,) * dims
        )

    def output_size(self, size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial output size for spatial input ``size``; an entry is ≤ 0 where the kernel does not fit."""
        sizes = []
        for axis, n in enumerate(size):
            span = self.dilation[axis] * (kernel[axis] - 1) + 1
            pads = sum(self.padding[axis])
            if self.transposed:
                extra = self.output_padding[axis] if self.output_padding else 0
                sizes.append((n - 1) * self.stride[axis] - pads + span + extra)
            else:
                sizes.append((n + pads - span) // self.stride[axis] + 1)
        return tuple(sizes)
