"""Operators in the coordinates of the data metric: rows of the weight times the root of what they see."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from spectool.clip.coordinates import Covariance
from spectool.clip.family import ConvFamily, Family, MatrixFamily, pair_products
from spectool.linear import ConvMap


class TurnedFamily(Family):
    """The operators of another family in coordinates x = w·L, w as rows ``(groups, rows, taps)``.

    ``pairs`` of a lone operator turns what the vectors show to the rows rather than the rows that come of it: of p
    vectors there are p, of their pairs p(p+1)/2 for every output channel.

    Args:
        inner: The operators as functions of w.
        covariance: H = LLᵀ.
    """

    def __init__(self, inner: Family, covariance: Covariance) -> None:
        self._inner, self._covariance, self._shape = inner, covariance, tuple(inner.start.shape)
        # In the type of the arithmetic once, not at every application.
        self._inverse = covariance.inverse.to(inner.start)
        start = covariance.turn(inner.start.double().cpu()).to(inner.start)
        super().__init__(lambda x: inner.at(self._back(x)), start, homogeneous=inner.homogeneous)

    def _back(self, x: Tensor) -> Tensor:
        return self._covariance.rows.join(x @ self._inverse, self._shape)

    def _forth(self, gradients: Tensor) -> Tensor:
        """Return gradients in x ``(b, …)`` of gradients in w ``(b, *shape)``."""
        return torch.stack([self._covariance.rows.split(one) @ self._inverse.mT for one in gradients])

    def pull(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the inner gradient, turned."""
        return self._forth(self._inner.pull(left, right)[None])[0]

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the inner gradients, turned."""
        inner, p = self._inner, len(left)
        if isinstance(inner, MatrixFamily):
            u = left.reshape(p, -1, left.shape[-1]).transpose(1, 2)
            seen = right.reshape(p, -1, right.shape[-1]).transpose(1, 2)
            factor = inner.factor
        elif isinstance(inner, ConvFamily) and inner.geometry.groups == 1:
            u, seen, factor = left.flatten(2), _seen(inner, right), 1.0
        else:
            made = inner.pairs(left, right)
            return self._forth(made.reshape(len(made), *self._shape)).flatten(1)
        self.applications += p * (p + 1)
        made = pair_products(u, self._inverse[0] @ seen)
        return made if factor == 1.0 else made * factor


def _seen(inner: ConvFamily, x: Tensor) -> Tensor:
    """Return what every output channel sees of vectors, ``(p, in · taps, output positions)``."""
    if not inner.geometry.transposed:
        return inner.patches(x)
    channels, kernel = inner.start.shape[0], tuple(inner.start.shape[2:])
    taps = prod(kernel)
    one_hot = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(1, taps, *kernel)
    one_hot = one_hot.expand(channels, taps, *kernel).contiguous()
    each = replace(inner.geometry, groups=channels)
    return ConvMap(one_hot, tuple(x.shape[1:]), each, dtype=x.dtype, device=x.device).matvec(x).flatten(2)
