"""What a linear operator's outputs say of its inputs: covariances in front of a batch norm, and means under the taps.

Neither is known without data, but the running statistics of a batch norm are W·t and the diagonal of WΣWᵀ for the
mean t and the covariance Σ of what the taps read, and with a model of few numbers that is nearly enough.

A covariance of channels is held as a matrix ``(c, c)``, or as the vector ``(c,)`` of standard deviations where it is
too large or not known; that stands for channels that go up and down together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectool.graph.types import Conv, Linear, Node

LARGEST = 2048
"""Most channels whose covariance is held as a matrix."""

_ENTRIES = 1 << 25
"""Most entries of a grouped kernel written out for all channels."""

_ALIKE = 0.2
"""Standard deviation of the error of a channel's mean that all taps share, over that of the channel."""

_APART = 0.05
"""The same for what a tap has for itself: edges of a map are darker than its middle."""

_NOISE = 0.02
"""Standard deviation of a running mean, a moving average over batches, over that of its channel."""


def matrices(node: Node, weight: Tensor) -> Tensor | None:
    """Return W as ``(groups, out, in·taps)`` with outputs in the order of channels; None for transposed ones."""
    if isinstance(node.op, Linear):
        if weight.dim() != 2 or node.op.axis != -1:
            return None
        return (node.op.alpha * (weight.T if node.op.transposed else weight))[None]
    if not isinstance(node.op, Conv) or node.op.geometry.transposed:
        return None
    groups: int = node.op.geometry.groups
    made: Tensor = weight.reshape(groups, weight.shape[0] // groups, -1)
    return made


def explained(matrix: Tensor, missing: Tensor, deviation: Tensor, variance: Tensor) -> Tensor:
    """Return the likeliest error of the taps' means ``(groups, in·taps)`` behind an error of the outputs' means.

    The errors are taken as normal: one per channel that its taps share, one per tap, and one per running mean. (The
    posterior mean ΣWᵀ(WΣWᵀ + Λ)⁻¹·missing; nearest in the plain sense would spread a channel's error over its taps
    only by what W happens to make of them.)

    Args:
        matrix: W as ``(groups, out, in·taps)``.
        missing: Running means minus W·t ``(groups·out,)``.
        deviation: Standard deviations of the input's channels ``(channels,)``.
        variance: Running variances ``(groups·out,)``.
    """
    groups, rows, columns = matrix.shape
    channels = deviation.numel() // groups
    weight = matrix.reshape(groups, rows, channels, -1)
    alike, apart = weight.sum(dim=3, keepdim=True) * _ALIKE**2, weight * _APART**2
    spread = (deviation.reshape(groups, 1, channels, 1).square() * (alike + apart)).reshape(
        groups, rows, columns
    )
    noise = variance * _NOISE**2 + 1e-12 * float(variance.max()) + 1e-300
    gram = spread @ matrix.transpose(1, 2) + torch.diag_embed(noise.reshape(groups, rows))
    found: Tensor = spread.transpose(1, 2) @ torch.linalg.solve(gram, missing.reshape(groups, rows, 1))
    return found.squeeze(2)


def channels_of(covariance: Tensor) -> int:
    """Return how many channels a covariance is of."""
    return covariance.shape[0]


def variances(covariance: Tensor) -> Tensor:
    """Return the diagonal of a covariance in either form."""
    return covariance.diagonal().double() if covariance.dim() == 2 else covariance.double().square()


def outputs(
    old: Tensor, new: Tensor, before: Tensor, after: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return the covariances of an operator's outputs before and after, in units of the standard deviations before.

    The covariance of what the taps read is taken as a sum of four: of channels and pixels that are independent, of
    pixels equal within independent channels, of pixels equal in correlated channels, and of independent pixels
    in correlated channels, in the shares that explain the running variances best.

    Args:
        old: The weights before ``(groups, out, in·taps)``.
        new: The weights after.
        before: Covariance of the input's channels before.
        after: The same after.
        variance: Running variances ``(groups·out,)``.

    Returns:
        Two covariances, the first with a diagonal of ones; None where the shapes do not go together.
    """
    channels = channels_of(before)
    wide, narrow = _written_out(old, channels), _written_out(new, channels)
    if wide is None or narrow is None:
        return None
    full = wide.shape[0] <= LARGEST
    parts, moved = _parts(wide, before, full), _parts(narrow, after, full)
    found = shares(torch.stack([variances(part) if full else part for part in parts]), variance)
    was = sum(share * part for share, part in zip(found, parts, strict=True))
    now = sum(share * part for share, part in zip(found, moved, strict=True))
    assert isinstance(was, Tensor)
    assert isinstance(now, Tensor)
    unit = (was.diagonal() if full else was).clamp_min(1e-300).rsqrt()
    if not full:
        return torch.ones_like(was), now.clamp_min(0.0).sqrt() * unit
    scale = unit[:, None] * unit[None, :]
    return (was * scale).float(), (now * scale).float()


def shares(parts: Tensor, variance: Tensor) -> Tensor:
    """Return nonnegative shares of the rows of ``parts`` whose sum is nearest to ``variance``, relatively."""
    count = parts.shape[0]
    best, least = torch.zeros(count, dtype=torch.float64), math.inf
    best[0] = 1.0
    scaled = parts / variance.clamp_min(1e-300)
    wanted = torch.ones_like(variance)
    for mask in range(1, 1 << count):
        chosen = [index for index in range(count) if mask >> index & 1]
        some = scaled[chosen]
        gram = some @ some.T + 1e-9 * torch.eye(len(chosen), dtype=torch.float64) * float(some.square().sum())
        found, status = torch.linalg.solve_ex(gram, some @ wanted)
        error = float((found @ some - wanted).square().sum())
        if not int(status) and bool((found >= 0).all()) and error < least:
            best, least = torch.zeros(count, dtype=torch.float64), error
            best[chosen] = found
    return best


def _written_out(matrix: Tensor, channels: int) -> Tensor | None:
    """Return ``(groups, out, in·taps)`` as ``(groups·out, channels, taps)``, zero across groups."""
    groups, rows, columns = matrix.shape
    own = channels // groups
    if own == 0 or channels % groups or columns % own:
        return None
    if groups == 1:
        return matrix.reshape(rows, channels, -1)
    if groups * rows * channels * (columns // own) > _ENTRIES:
        return None
    made = matrix.new_zeros(groups, rows, groups, own, columns // own)
    each = torch.arange(groups)
    made[each, :, each] = matrix.reshape(groups, rows, own, -1)
    return made.reshape(groups * rows, channels, -1)


def _parts(weight: Tensor, covariance: Tensor, full: bool) -> list[Tensor]:
    """Return the covariances (or their diagonals) of the outputs under the four models."""
    diagonal, summed = variances(covariance), weight.sum(dim=2)
    by_pixel = weight.transpose(1, 2)
    if covariance.dim() == 2:
        matrix = covariance.double()
        common, same = summed @ matrix, (by_pixel @ matrix).flatten(1)
        pairs = [(common, summed), (same, by_pixel.flatten(1))]
    else:
        deviation = covariance.double()
        common, same = (summed @ deviation)[:, None], by_pixel @ deviation
        pairs = [(common, common), (same, same)]
    pairs = [
        ((weight * diagonal[:, None]).flatten(1), weight.flatten(1)),
        (summed * diagonal, summed),
        *pairs,
    ]
    return [a @ b.T if full else (a * b).sum(dim=1) for a, b in pairs]
