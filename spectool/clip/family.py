"""Operators that depend on one weight: A(w) = B + L(w), L linear. What every projection works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from spectool.linear import ConvGeometry, ConvMap, LinearMap, MatrixMap

_CHUNK_BYTES = 1 << 27


class Family:
    """The operators A(w) = B + L(w) of one region, as functions of the weight that is edited.

    Args:
        build: Makes the map of a weight; differentiable in it. Arithmetic in the type of ``start``.
        start: w₀, float64 or float32.
        homogeneous: Whether B = 0, so that scaling the weight scales the operator.

    Attributes:
        applications: Operator applications and weight gradients so far, per vector.
    """

    def __init__(self, build: Callable[[Tensor], LinearMap], start: Tensor, *, homogeneous: bool = True) -> None:
        self._build, self.start, self.homogeneous = build, start.detach(), homogeneous
        self.applications = 0

    def at(self, weight: Tensor) -> LinearMap:
        """Return A(w)."""
        return self._build(weight)

    def pull(self, left: Tensor, right: Tensor) -> Tensor:
        """Return L*(Σ uᵢ vᵢᵀ), the gradient of Σ ⟨uᵢ, A(w) vᵢ⟩ in w, of the weight's shape.

        Args:
            left: Rows uᵢ ``(p, *out_shape)``.
            right: Rows vᵢ ``(p, *in_shape)``.
        """
        weight = self.start.clone().requires_grad_()
        with torch.enable_grad():
            total = (self._build(weight).matvec(right) * left).sum()
            (gradient,) = torch.autograd.grad(total, weight)
        self.applications += len(right)
        return gradient.detach()

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Return L*(½(uᵢvⱼᵀ + uⱼvᵢᵀ)) for i ≤ j in the order of ``triu_indices``, ``(p(p+1)/2, numel)``.

        Off-diagonal rows are multiplied by √2, so that svec(Y) · rows = L*(U Y Vᵀ).
        """
        p = len(left)
        made = left.new_empty(p * (p + 1) // 2, self.start.numel())
        rows, columns = torch.triu_indices(p, p).tolist()
        for index, (i, j) in enumerate(zip(rows, columns, strict=True)):
            if i == j:
                made[index] = self.pull(left[i : i + 1], right[i : i + 1]).flatten()
            else:
                made[index] = self.pull(left[[i, j]], right[[j, i]]).flatten().mul_(0.5**0.5)
        return made


class MatrixFamily(Family):
    """The matrices themselves."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(lambda weight: MatrixMap(weight, dtype=start.dtype, device=start.device), start)


class ConvFamily(Family):
    """Convolutions of one geometry and input size; ``pairs`` is a product of matrices."""

    def __init__(self, start: Tensor, in_shape: tuple[int, ...], geometry: ConvGeometry) -> None:
        def build(weight: Tensor) -> LinearMap:
            return ConvMap(weight, in_shape, geometry, dtype=start.dtype, device=start.device)

        super().__init__(build, start)
        self._geometry = geometry
        self._patches = _patches(build(start), geometry, tuple(start.shape[2:]), start)

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Return what ``Family.pairs`` returns: per pair one product (out, positions) × (positions, in·taps)."""
        if self._geometry.groups > 1:
            return super().pairs(left, right)
        # A transposed convolution is the adjoint of the one that takes patches of its output.
        narrow, wide = (right, left) if self._geometry.transposed else (left, right)
        patches = self._patches(wide)  # (p, channels · taps, positions)
        narrow = narrow.flatten(2)  # (p, channels, positions)
        p, positions = len(narrow), narrow.shape[2]
        rows, columns = torch.triu_indices(p, p)
        made = left.new_empty(len(rows), self.start.numel())
        per_pair = 2 * positions * (narrow.shape[1] + patches.shape[1]) * narrow.element_size()
        step = max(1, _CHUNK_BYTES // per_pair)
        for begin in range(0, len(rows), step):
            i, j = rows[begin : begin + step], columns[begin : begin + step]
            a = torch.cat([narrow[i], narrow[j]], dim=2)
            b = torch.cat([patches[j], patches[i]], dim=2)
            factor = torch.full(i.shape, 0.5**0.5, dtype=a.dtype)
            factor[i == j] = 0.5
            made[begin : begin + step] = torch.bmm(a, b.transpose(1, 2)).flatten(1) * factor[:, None]
        self.applications += p * (p + 1)
        return made


def _patches(
    A: LinearMap, geometry: ConvGeometry, kernel: tuple[int, ...], like: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return the map from vectors of the wide side to ``(p, channels · taps, positions)``."""
    wide = A.out_shape if geometry.transposed else A.in_shape
    channels, taps = wide[0], prod(kernel)
    one_hot = torch.eye(taps, dtype=like.dtype).reshape(taps, 1, *kernel).repeat(channels, *[1] * (len(kernel) + 1))
    each = replace(geometry, groups=channels)
    if geometry.transposed:
        spread = ConvMap(one_hot, (channels * taps, *A.in_shape[1:]), each, dtype=like.dtype)
        return lambda y: spread.rmatvec(y).flatten(2)
    gather = ConvMap(one_hot, A.in_shape, each, dtype=like.dtype)
    return lambda x: gather.matvec(x).flatten(2)


def flat(x: Tensor) -> Tensor:
    """Return vectors as rows."""
    return x.reshape(len(x), -1)
