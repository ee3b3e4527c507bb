"""Reading weights of any size and type without a copy of them: extremes, sums, exact scaling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from spectool.errors import OperatorError

_CHUNK = 1 << 20  # elements; a float64 copy of a chunk is 8 MB
_REDUCIBLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_real(weight: torch.Tensor) -> None:
    """Check that a weight is real.

    Raises:
        OperatorError: If it is complex.
    """
    if weight.is_complex():
        raise OperatorError(f"weights of type {weight.dtype} are complex, which is out of scope")


def to_double(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on the CPU if its device (MPS) has no such type."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield float64 copies of slabs along the first axis that together cover ``weight``, one at a time."""
    weight = weight.detach()
    if weight.numel() <= _CHUNK or weight.ndim == 0:
        yield to_double(weight)
        return
    rows = max(1, _CHUNK * weight.shape[0] // weight.numel())
    for start in range(0, weight.shape[0], rows):
        yield to_double(weight[start : start + rows])  # a slice is a view whatever the strides


def _extremes(weight: torch.Tensor) -> tuple[float, float]:
    """Return (min, max); both NaN if there is a NaN; zeros for an empty tensor."""
    if weight.numel() == 0:
        return 0.0, 0.0
    if weight.dtype in _REDUCIBLE:
        low, high = torch.aminmax(weight.detach())
        return float(low), float(high)
    pairs = [torch.aminmax(chunk) for chunk in chunks(weight)]  # 8-bit floats cannot be reduced
    values = torch.stack([torch.stack(pair) for pair in pairs])
    return float(values[:, 0].min()), float(values[:, 1].max())


def all_finite(weight: torch.Tensor) -> bool:
    """Return whether there is no NaN and no infinity; one pass, no copy."""
    return all(math.isfinite(value) for value in _extremes(weight))


def count_not_finite(weight: torch.Tensor) -> int:
    """Return how many entries are NaN or infinite."""
    if not (weight.is_floating_point() or weight.is_complex()):
        return 0
    if weight.dtype in _REDUCIBLE or weight.is_complex():
        return weight.numel() - int(torch.isfinite(weight).sum())
    # 8-bit floats cannot be tested as they are.
    return sum(chunk.numel() - int(torch.isfinite(chunk).sum()) for chunk in chunks(weight))


def largest(weight: torch.Tensor) -> float:
    """Return max |w|; 0 for an empty tensor, NaN or inf if there is one in it; one pass, no copy."""
    low, high = _extremes(weight)
    return max(abs(low), abs(high))


def power_of_two(weight: torch.Tensor) -> float:
    """Return the largest power of two ≤ max |w|; 1.0 where there is nothing to scale (zero, NaN, inf)."""
    return power_below(largest(weight))


def power_below(value: float) -> float:
    """Return the largest power of two ≤ ``value``; 1.0 for 0, NaN and inf."""
    if value == 0 or not math.isfinite(value):
        return 1.0
    return math.ldexp(1.0, math.frexp(value)[1] - 1)


def power_product(powers: Iterable[float]) -> float:
    """Return the product of powers of two without over- or underflow on the way; 0 where it underflows itself.

    Raises:
        OperatorError: If it is beyond float64's range.
    """
    exponent = sum(math.frexp(power)[1] - 1 for power in powers)
    if exponent > 1023:
        raise OperatorError("the weights multiply beyond float64's range", hint="scale them down")
    return math.ldexp(1.0, exponent)


def scaled_weight(weight: torch.Tensor, factor: float) -> torch.Tensor:
    """Return ``weight / factor`` for a power of two, in float64 if the weight was, else in float32.

    Computed in float64 before any cast: weights beyond float32's range neither overflow nor vanish, and half
    types lose nothing. Differentiable.
    """
    if factor == 1.0:
        return weight
    stored = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # In two steps: some devices multiply by 1/factor, which can overflow where the quotient does not.
    root = math.ldexp(1.0, (math.frexp(factor)[1] - 1) // 2)
    return (to_double(weight) / root / (factor / root)).to(stored)


def frobenius(weight: torch.Tensor) -> float:
    """Return ‖w‖₂ over all entries in float64, slab by slab."""
    return math.hypot(*(float(torch.linalg.vector_norm(chunk)) for chunk in chunks(weight)))
