"""Bringing weights to magnitude ~1 by an exact power of two."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

_CHUNK = 1 << 20  # elements: a float64 copy of a chunk is 8 MB


def chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield float64 copies of parts of ``weight`` that together cover it; never copies all of it at once."""
    weight = weight.detach()
    if weight.numel() <= _CHUNK or weight.ndim == 0:
        yield weight.double()
        return
    # A slice along the first axis is a view whatever the strides; reshape(-1) may copy.
    rows = max(1, _CHUNK * weight.shape[0] // weight.numel())
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        yield from chunks(part[0]) if rows == 1 and part.numel() > _CHUNK else [part.double()]


def largest(weight: torch.Tensor) -> float:
    """Return max |w| in float64; 0 for an empty tensor, NaN or inf if there is one in it."""
    peak = 0.0
    for chunk in chunks(weight):
        value = float(chunk.abs().max()) if chunk.numel() else 0.0
        if not math.isfinite(value):
            return value
        peak = max(peak, value)
    return peak


def power_of_two(weight: torch.Tensor) -> float:
    """Return the power of two just below max |w|; 1.0 where there is nothing to scale (zero, NaN, inf)."""
    return power_below(largest(weight))


def power_below(value: float) -> float:
    """Return the largest power of two ≤ ``value``; 1.0 for 0, NaN and inf."""
    if value == 0 or not math.isfinite(value):
        return 1.0
    return math.ldexp(1.0, math.frexp(value)[1] - 1)


def scaled_weight(weight: torch.Tensor, factor: float) -> torch.Tensor:
    """Return ``weight / factor`` computed in float64, in float64 if it was, else in float32.

    Half types go to float32, where a power of two is exact; float64 is divided before any cast, so that weights
    beyond float32's range neither overflow nor vanish. Differentiable.
    """
    if factor == 1.0:
        return weight
    stored = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # In two steps, because 1/factor can overflow where the quotient does not.
    root = math.ldexp(1.0, (math.frexp(factor)[1] - 1) // 2)
    return (weight.double() / root / (factor / root)).to(stored)
