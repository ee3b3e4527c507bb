"""Padding as index arithmetic, and its adjoint: which pixel a padded position reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spectool.errors import OperatorError
from spectool.linear.geometry import PaddingMode

Pads = tuple[tuple[int, int], ...]

_TORCH_NAMES = {"zeros": "constant", "circular": "circular", "reflect": "reflect", "replicate": "replicate"}


def check_padding(n: int, lead: int, trail: int, mode: PaddingMode) -> None:
    """Check that an axis of ``n`` pixels can be padded by this much.

    Raises:
        OperatorError: If ``mode`` is unknown, does not allow that much, or would have to crop.
    """
    if mode not in _TORCH_NAMES:
        raise OperatorError(f"unknown padding mode {mode!r}", hint=f"one of {', '.join(_TORCH_NAMES)}")
    if mode == "zeros":
        return
    if min(lead, trail) < 0:
        raise OperatorError(f"{mode} padding cannot be negative, got ({lead}, {trail})")
    if mode != "replicate":
        limit = n if mode == "circular" else n - 1
        if max(lead, trail) > limit:
            raise OperatorError(
                f"{mode} padding of ({lead}, {trail}) on an axis of {n} pixels; it can be at most {limit}",
                hint="give a larger input size",
            )


def source_index(n: int, lead: int, trail: int, mode: PaddingMode) -> torch.Tensor:
    """Return, for each of the ``n + lead + trail`` padded positions, the pixel it reads; -1 reads zero.

    Raises:
        OperatorError: If the mode does not allow that much padding.

    Example:
        >>> source_index(3, 1, 2, "reflect").tolist()
        [1, 0, 1, 2, 1, 0]
    """
    check_padding(n, lead, trail, mode)
    position = torch.arange(-lead, n + trail)
    if mode == "circular":
        return position % n
    if mode == "reflect":
        return (n - 1) - ((n - 1) - position.abs()).abs()
    if mode == "replicate":
        return position.clamp(0, n - 1)
    return torch.where((position < 0) | (position >= n), -1, position)


def padding_matrix(n: int, lead: int, trail: int, mode: PaddingMode = "zeros") -> torch.Tensor:
    """Return the 0/1 matrix ``(n + lead + trail, n)`` in float64 that pads one axis; negative zeros crop.

    Raises:
        OperatorError: If the mode does not allow that much padding.

    Example:
        >>> padding_matrix(2, 1, 0, "replicate").tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    index = source_index(n, lead, trail, mode)
    return (index[:, None] == torch.arange(n)).double()


def pad(x: torch.Tensor, pads: Pads, mode: PaddingMode) -> torch.Tensor:
    """Pad the trailing axes of ``(b, C, *n)``, one (lead, trail) per axis; negative zeros crop."""
    if not any(map(any, pads)):
        return x
    sizes = x.shape[x.ndim - len(pads) :]
    if mode == "zeros" and any(
        n + min(lead, 0) + min(trail, 0) <= 0 for n, (lead, trail) in zip(sizes, pads, strict=True)
    ):
        # Cropped away altogether and padded again; the library refuses this one.
        new = [n + lead + trail for n, (lead, trail) in zip(sizes, pads, strict=True)]
        return x.new_zeros((*x.shape[: x.ndim - len(pads)], *new))
    return F.pad(x, [amount for pair in reversed(pads) for amount in pair], mode=_TORCH_NAMES[mode])


def pad_adjoint(y: torch.Tensor, pads: Pads, mode: PaddingMode) -> torch.Tensor:
    """Apply the adjoint of ``pad``: what was copied outwards is added back to its source."""
    if mode == "zeros":
        return pad(y, tuple((-lead, -trail) for lead, trail in pads), "zeros")
    first = y.ndim - len(pads)
    for offset, (lead, trail) in enumerate(pads):
        if lead or trail:
            y = _fold(y, first + offset, lead, trail, mode)
    return y


def _fold(y: torch.Tensor, axis: int, lead: int, trail: int, mode: PaddingMode) -> torch.Tensor:
    n = y.shape[axis] - lead - trail
    core = y.narrow(axis, lead, n).clone()
    before, after = y.narrow(axis, 0, lead), y.narrow(axis, lead + n, trail)
    if mode == "circular":
        core.narrow(axis, n - lead, lead).add_(before)
        core.narrow(axis, 0, trail).add_(after)
    elif mode == "reflect":
        core.narrow(axis, 1, lead).add_(before.flip(axis))
        core.narrow(axis, n - 1 - trail, trail).add_(after.flip(axis))
    else:
        core.narrow(axis, 0, 1).add_(before.sum(axis, keepdim=True))
        core.narrow(axis, n - 1, 1).add_(after.sum(axis, keepdim=True))
    return core
