"""Pools, up-samplings and pads as products of small 1-D operators, taken from the operation itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spectool.errors import OperatorError
from spectool.graph.types import Node
from spectool.linear import LinearMap, SeparableMap
from spectool.lower.replay import Load, execute
from spectool.lower.structure import role

if TYPE_CHECKING:
    from torch import Tensor

_ROLES = frozenset({"avgpool", "upsample", "pad"})


def may_separate(node: Node) -> bool:
    """Return whether an operation may act on each channel alike and as a product over the spatial axes."""
    return role(node) in _ROLES


_LARGEST_AXIS = 4096


def separable_map(
    node: Node,
    shape: tuple[int, ...],
    load: Load,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> LinearMap | None:
    """Return I_C ⊗ A_1 ⊗ A_2… for a channelwise, separable node, or None if it is neither.

    Each factor is read off the operation: A(e_i ⊗ 1) = (A_1 e_i) ⊗ (A_2 1) fixes A_1 up to a scale that
    A(1 ⊗ 1) gives. A random tensor then checks that the product is the operation.

    Args:
        node: The operation.
        shape: Its input without the batch axis, (C, *n).
        load: Reads a constant by name.
        dtype: Arithmetic type of the map.
        device: Device of its vectors.
    """
    channels, *sizes = shape
    if not sizes or max(sizes) > _LARGEST_AXIS:
        return None
    constants = [None if not name else load(name) for name in node.inputs[1:]]
    constants = [
        value.double() if value is not None and value.is_floating_point() else value for value in constants
    ]

    def apply(x: Tensor) -> Tensor:
        result = execute(node.op, [x, *constants])
        if isinstance(result, tuple):
            raise OperatorError("a separable operation has one output")
        return result - offset if offset is not None else result

    offset: Tensor | None = None
    try:
        zero = apply(torch.zeros(1, channels, *sizes, dtype=torch.float64))
        offset = zero if bool(zero.any()) else None
        if zero.dim() != len(shape) + 1 or zero.shape[1] != channels:
            return None
        total = apply(torch.ones(1, channels, *sizes, dtype=torch.float64))[0, 0]
        if total.numel() == 0 or not bool(total.abs().max() > 0):
            return None
        peak = [int(i) for i in torch.unravel_index(total.abs().argmax(), total.shape)]
        wanted = [(axis, index) for axis, size in enumerate(sizes) for index in range(size)]
        columns: list[list[Tensor]] = [[] for _ in sizes]
        # One probe per channel: mixing of channels, if there is any, shows in the check below.
        for start in range(0, len(wanted), channels):
            batch = wanted[start : start + channels]
            probe = torch.zeros(1, channels, *sizes, dtype=torch.float64)
            for channel, (axis, index) in enumerate(batch):
                probe[0, channel].select(axis, index).fill_(1.0)
            image = apply(probe)[0]
            for channel, (axis, _) in enumerate(batch):
                line = tuple(slice(None) if a == axis else p for a, p in enumerate(peak))
                columns[axis].append(image[channel][line])
        factors = [torch.stack(column, dim=1) for column in columns]
    except (OperatorError, RuntimeError):
        return None
    # Every factor carries the other axes' row sums at the peak: d factors hold total^(d−1) too much.
    factors[0] = factors[0] / total[tuple(peak)] ** (len(sizes) - 1)
    result = SeparableMap(channels, tuple(factors), dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(0)
    check = torch.randn(1, channels, *sizes, dtype=torch.float64, generator=generator)
    expected = apply(check)
    if not torch.allclose(result.matvec(check), expected, rtol=0, atol=1e-11 * float(expected.abs().max())):
        return None
    return result.to(dtype=dtype, device=device)
