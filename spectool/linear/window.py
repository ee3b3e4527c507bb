"""How a kernel is slid over an axis-aligned grid, and slid back: the arithmetic behind ``ConvMap``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from spectool.linear.geometry import ConvGeometry
from spectool.linear.padding import Pads, pad, pad_adjoint, source_index

_CONV: dict[int, Callable[..., Any]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Any]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_FEW_CHANNELS = (
    8  # up to here oneDNN's float32 deconvolution pads the channels it writes; see _scatter_phases
)
_PATCH_BYTES = 1 << 28
"""Memory that one call may fill with patches: where no faster kernel serves (float64 on a CPU), torch copies what every
position of the whole batch reads."""


class Window:
    """A convolution from a wide grid (before padding) to a narrow one (one entry per kernel position).

    ``gather`` is the convolution, ``scatter`` its exact adjoint; a transposed convolution swaps the two.

    Args:
        weight: ``(narrow channels, wide channels / groups, *k)``, any float type; must not change afterwards.
        wide: Sizes of the wide grid.
        narrow: Sizes of the narrow grid.
        pads: Leading and trailing padding of the wide grid.
        geometry: Stride, dilation, groups and padding mode.
        dtype: Arithmetic type.
        device: Where to compute.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        wide: tuple[int, ...],
        narrow: tuple[int, ...],
        pads: Pads,
        geometry: ConvGeometry,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._weight, self._dtype, self._device = weight, dtype, device
        self._wide, self._narrow, self._pads = wide, narrow, pads
        self._stride, self._dilation, self._groups = geometry.stride, geometry.dilation, geometry.groups
        self._mode = geometry.padding_mode
        self._dims = geometry.dims
        self._reach = tuple(
            d * (k - 1) for d, k in zip(geometry.dilation, weight.shape[2:], strict=True)
        )  # distance between the first and the last tap
        self._forms: dict[str, torch.Tensor] = {}

        # The library pads both ends alike. That serves an axis whose leading padding also covers the trailing
        # end, as long as it adds no position: what lies beyond the last position is never read. Other axes
        # are padded by hand, which costs a copy of the input.
        native, by_hand = [], []
        for n, m, s, reach, (lead, trail) in zip(wide, narrow, self._stride, self._reach, pads, strict=True):
            spare = n + 2 * lead - ((m - 1) * s + reach + 1)
            if self._mode == "zeros" and lead >= 0 and 0 <= spare < s:
                native.append(lead)
                by_hand.append((0, 0))
            else:
                native.append(0)
                by_hand.append((lead, trail))
        self._native = tuple(native)
        self._by_hand = tuple(by_hand)
        self._any_by_hand = any(map(any, by_hand))
        self._padded = tuple(n + lead + trail for n, (lead, trail) in zip(wide, by_hand, strict=True))
        self._unread = tuple(  # positions past the last window, which a stride may leave
            n + 2 * p - ((m - 1) * s + reach + 1)
            for n, p, m, s, reach in zip(
                self._padded, self._native, narrow, self._stride, self._reach, strict=True
            )
        )
        # Going back at stride 1, y is padded so that every tap of the flipped kernel meets it; where the padding
        # was zeros, what it would write there is left out at once.
        outside = pads if self._mode == "zeros" else ((0, 0),) * self._dims
        self._room = tuple(
            (r - lead, r - trail) for r, (lead, trail) in zip(self._reach, outside, strict=True)
        )
        even = all(lead == trail >= 0 for lead, trail in self._room)
        self._room_native = tuple(lead for lead, _ in self._room) if even else None

        # Going back, the flipped kernel reads as many patches as the input has positions, of the output's channels.
        taps, size = math.prod(weight.shape[2:]), torch.finfo(dtype).bits // 8
        self._patch_bytes = (
            taps
            * size
            * max(
                weight.shape[1] * self._groups * math.prod(narrow),
                weight.shape[0] * math.prod(self._padded),
                1,
            )
        )
        few = weight.shape[1] <= _FEW_CHANNELS and geometry.groups == 1 and max(geometry.dilation) == 1
        if max(self._stride) == 1:
            self._scatter = self._scatter_flipped
        elif few and dtype == torch.float32 and device.type == "cpu":
            self._scatter = self._scatter_phases
        else:
            self._scatter = self._scatter_transposed

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``(b, wide channels, *wide)`` to ``(b, narrow channels, *narrow)``."""
        return self._in_parts(self._gather, x)

    def scatter(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the adjoint of ``gather``."""
        return self._in_parts(self._scatter, y)

    def _in_parts(self, apply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Apply to as many elements of the batch at a time as patches have room for."""
        most = max(1, _PATCH_BYTES // self._patch_bytes)
        if len(x) <= most:
            return apply(x)
        return torch.cat([apply(x[begin : begin + most]) for begin in range(0, len(x), most)])

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _CONV[self._dims](
            pad(x, self._by_hand, self._mode) if self._any_by_hand else x,
            self._form("plain", _same),
            None,
            self._stride,
            self._native,
            self._dilation,
            self._groups,
        )
        return y

    def _scatter_flipped(self, y: torch.Tensor) -> torch.Tensor:
        """Stride 1: the adjoint is a convolution with the kernel flipped; up to 2× faster than transposed."""
        native = self._room_native
        x: torch.Tensor = _CONV[self._dims](
            pad(y, self._room, "zeros") if native is None else y,
            self._form("flipped", self._flip),
            None,
            1,
            0 if native is None else native,
            self._dilation,
            self._groups,
        )
        return x if self._mode == "zeros" else pad_adjoint(x, self._pads, self._mode)

    def _scatter_transposed(self, y: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = _TRANSPOSED[self._dims](
            y,
            self._form("plain", _same),
            None,
            self._stride,
            self._native,
            self._unread,
            self._groups,
            self._dilation,
        )
        return pad_adjoint(x, self._by_hand, self._mode) if self._any_by_hand else x

    def _scatter_phases(self, y: torch.Tensor) -> torch.Tensor:
        """Strided, few wide channels: one stride-1 convolution to all s·s phases at once, then interleaved.

        3.6× faster than the transposed convolution on 7×7 stride 2, 3 → 64 (float32, oneDNN), because the few
        channels it writes become s² times as many; from 16 channels on it is slower, in float64 always.
        """
        kernel = self._form("phases", self._phases)
        taps = kernel.shape[2:]
        z: torch.Tensor = _CONV[self._dims](y, kernel, None, 1, tuple(t - 1 for t in taps))
        channels, blocks = self._weight.shape[1], z.shape[2:]
        z = z.reshape(-1, *self._stride, channels, *blocks)
        dims = self._dims
        order = [0, dims + 1]
        for axis in range(dims):
            order += [dims + 2 + axis, 1 + axis]
        sizes = tuple(u * s for u, s in zip(blocks, self._stride, strict=True))
        x = z.permute(order).reshape(-1, channels, *sizes)
        if self._mode == "zeros":
            return pad(
                x,
                tuple((-p[0], n + p[0] - u) for n, p, u in zip(self._wide, self._pads, sizes, strict=True)),
                "zeros",
            )
        x = pad(x, tuple((0, n - u) for n, u in zip(self._padded, sizes, strict=True)), "zeros")
        return pad_adjoint(x, self._pads, self._mode)

    def _form(self, name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the kernel in one of its forms, cast; kept unless a gradient with respect to it is wanted."""
        if self._weight.requires_grad:
            return make(self._weight.to(device=self._device, dtype=self._dtype))
        if name not in self._forms:
            self._forms[name] = make(self._weight.to(device=self._device, dtype=self._dtype)).contiguous()
        return self._forms[name]

    def _flip(self, kernel: torch.Tensor) -> torch.Tensor:
        outs, ins = kernel.shape[:2]
        grouped = kernel.reshape(self._groups, outs // self._groups, ins, *kernel.shape[2:]).transpose(1, 2)
        swapped = grouped.reshape(self._groups * ins, outs // self._groups, *kernel.shape[2:])
        return swapped.flip(tuple(range(2, kernel.ndim)))

    def _phases(self, kernel: torch.Tensor) -> torch.Tensor:
        """Return ``(s·…·wide, narrow, *k')``: tap s·c + r of the kernel is tap c, flipped, of phase r."""
        outs, ins = kernel.shape[:2]
        taps = [math.ceil(k / s) for k, s in zip(kernel.shape[2:], self._stride, strict=True)]
        missing = tuple((0, t * s - k) for t, s, k in zip(taps, self._stride, kernel.shape[2:], strict=True))
        split = [size for pair in zip(taps, self._stride, strict=True) for size in pair]
        spread = pad(kernel, missing, "zeros").reshape(outs, ins, *split)
        dims = self._dims
        order = [3 + 2 * axis for axis in range(dims)] + [1, 0] + [2 + 2 * axis for axis in range(dims)]
        stacked = spread.permute(order).reshape(math.prod(self._stride) * ins, outs, *taps)
        return stacked.flip(tuple(range(2, 2 + dims)))

    def overlaps(self) -> list[torch.Tensor]:
        """Return per axis the matrix ``(k, k)``: at how many positions two taps read the same real pixel."""
        counts = []
        for axis, (n, m) in enumerate(zip(self._wide, self._narrow, strict=True)):
            source = source_index(n, *self._pads[axis], self._mode)
            k = self._weight.shape[2 + axis]
            start = torch.arange(m)[:, None] * self._stride[axis]
            reads = source[start + torch.arange(k)[None, :] * self._dilation[axis]]  # (m, k)
            count = torch.zeros((k, k), dtype=torch.float64)
            if self._mode == "zeros":  # two taps never read one pixel
                count.diagonal().copy_((reads >= 0).sum(0))
            else:
                for tap in range(k):
                    count[tap] = (reads == reads[:, tap : tap + 1]).sum(0).double()
            counts.append(count)
        return counts


def _same(kernel: torch.Tensor) -> torch.Tensor:
    return kernel
