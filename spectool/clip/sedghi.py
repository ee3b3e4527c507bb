"""Clip in the frequency domain, crop to the kernel: what was done before the projection could be computed."""

from __future__ import annotations

import math
from math import gcd

import torch
from torch import Tensor

from spectool.clip.bundle import Projection
from spectool.clip.family import Family
from spectool.clip.leading import leading
from spectool.clip.symbol_map import SymbolMap
from spectool.errors import OperatorError
from spectool.linear import ConvGeometry, ConvMap
from spectool.spectrum.stencil import grouped


def sedghi(
    weight: Tensor,
    geometry: ConvGeometry,
    in_shape: tuple[int, ...],
    limit: float,
    *,
    alternations: int = 1,
) -> Projection:
    """Return the kernel clipped on the circular grid, cropped to its taps, then rescaled to σ₁ = ``limit``.

    The symbol's singular values are clipped to c at every frequency, which takes a kernel of the image's size;
    cropping it to k taps undoes part of that. Alternating the two approaches *a* kernel that obeys (for circular
    padding), not the nearest one. For other paddings the grid is that of circular padding, as published, and the
    rescale is by the real σ₁. A weight that obeys is returned as it is.

    Args:
        weight: In torch's layout, transposed as ``geometry`` says.
        geometry: Of the convolution; stride 1.
        in_shape: ``(channels, *n)``.
        limit: c.
        alternations: Times to clip and crop.

    Raises:
        OperatorError: If a stride is not 1 or the kernel does not fit the grid: the method is not defined there.

    **Source:** H. Sedghi, V. Gupta, P. M. Long, "The singular values of convolutional layers", ICLR 2019.
    """
    if any(s != 1 for s in geometry.stride):
        raise OperatorError(f"clipping by FFT is not defined for stride {geometry.stride}")
    # The taps of a dilated kernel reach the frequencies of a coarser grid only.
    grid = tuple(n // gcd(n, d) for n, d in zip(in_shape[1:], geometry.dilation, strict=True))
    if any(k > n for k, n in zip(weight.shape[2:], grid, strict=True)):
        raise OperatorError(f"clipping by FFT needs a kernel no larger than the grid {grid}")
    start = weight.detach().double()
    family = Family(lambda w: ConvMap(w, in_shape, geometry, dtype=torch.float64), start)

    def top(candidate: Tensor) -> float:
        found = leading(family.at(candidate), 6, torch.Generator().manual_seed(0), tol=1e-6, blocks=400)
        family.applications += found.applications
        return float(found.values[0])

    if top(start) <= limit:
        return Projection(start, 0.0, "sedghi", 0, family.applications)
    kernel = grouped(start, geometry.groups)
    made = SymbolMap(kernel.shape, (1,) * geometry.dims, grid)
    components = made.split(kernel)
    for _ in range(alternations):
        components = _clip_and_crop(made, components, limit)
    clipped = made.join(components).reshape(start.shape)
    clipped = clipped * (limit / top(clipped))
    return Projection(clipped, 0.0, "sedghi", alternations, family.applications)


def _clip_and_crop(made: SymbolMap, components: Tensor, limit: float) -> Tensor:
    """Return the taps of the symbol with values above c lowered to c.

    Cropping is linear: the taps are the old ones less those of what was taken away.
    """
    left, values, right = torch.linalg.svd(made.values(components), full_matrices=False)
    excess = (values - limit).clamp_min(0)
    removed = (left * excess[:, :, None, :]) @ right
    # Frequencies that are not their own mirror stand for two.
    twice = (torch.sin(made.angles).abs() > 1e-9).any(dim=1)
    share = torch.where(twice, 2.0, 1.0).double() / math.prod(made.grid)
    removed = removed * share[:, None, None]
    return components - made.adjoint(torch.cat([removed.real, removed.imag], dim=2))
