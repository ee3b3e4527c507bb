"""Padding along one axis as index arithmetic: which pixel a padded position reads."""

from __future__ import annotations

import torch

from spectool.errors import OperatorError
from spectool.linear.geometry import PaddingMode


def source_index(n: int, lead: int, trail: int, mode: PaddingMode) -> torch.Tensor:
    """Return, for each of the ``n + lead + trail`` padded positions, the pixel it reads; -1 reads zero.

    Raises:
        OperatorError: If the mode does not allow that much padding.
    """
    check_padding(n, lead, trail, mode)
    position = torch.arange(-lead, n + trail)
    if mode == "circular":
        return position % n
    if mode == "reflect":
        folded = position.abs()
        return torch.where(folded >= n, 2 * (n - 1) - folded, folded)
    if mode == "replicate":
        return position.clamp(0, n - 1)
    return torch.where((position < 0) | (position >= n), -1, position)


def check_padding(n: int, lead: int, trail: int, mode: PaddingMode) -> None:
    """Raise OperatorError where ``mode`` cannot pad an axis of ``n`` pixels by this much."""
    if mode == "zeros":
        return
    if min(lead, trail) < 0:
        raise OperatorError(f"{mode} padding cannot be negative, got ({lead}, {trail})")
    limit = {"circular": n, "reflect": n - 1}.get(mode)
    if limit is not None and max(lead, trail) > limit:
        raise OperatorError(f"{mode} padding of ({lead}, {trail}) needs more than the {n} pixels of its axis")


def padding_matrix(n: int, lead: int, trail: int, mode: PaddingMode = "zeros") -> torch.Tensor:
    """Return the 0/1 matrix ``(n + lead + trail, n)`` in float64 that pads one axis; negative padding crops.

    Example:
        >>> padding_matrix(2, 1, 0, "replicate").tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    index = source_index(n, lead, trail, mode)
    return (index[:, None] == torch.arange(n)).double()


_TORCH_NAMES = {"zeros": "constant", "circular": "circular", "reflect": "reflect", "replicate": "replicate"}


def pad(x: torch.Tensor, pads: tuple[tuple[int, int], ...], mode: PaddingMode) -> torch.Tensor:
    """Pad the trailing axes of ``(b, C, *n)``, one (lead, trail) per axis."""
    flat = [amount for pair in reversed(pads) for amount in pair]
    return torch.nn.functional.pad(x, flat, mode=_TORCH_NAMES[mode])


def pad_adjoint(y: torch.Tensor, pads: tuple[tuple[int, int], ...], mode: PaddingMode) -> torch.Tensor:
    """Apply the adjoint of ``pad``: what was copied outwards is added back to its source."""
    if mode == "zeros":
        return torch.nn.functional.pad(y, [-amount for pair in reversed(pads) for amount in pair])
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
