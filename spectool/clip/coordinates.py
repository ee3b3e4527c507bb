"""The coordinates in which a change is measured: weights, folded weights, or what they do to data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["weights", "folded", "data"]


@dataclass(frozen=True)
class Rows:
    """How a weight is rows of taps: one row to an output channel; the rows of a group see the same taps.

    Attributes:
        groups: Groups of a convolution.
        transposed: Whether the weight is (in, out/groups, …), as that of a transposed convolution or matrix, and
            not (out, in/groups, …).
    """

    groups: int = 1
    transposed: bool = False

    def split(self, weight: Tensor) -> Tensor:
        """Return a weight as ``(groups, rows, taps)``."""
        if not self.transposed:
            return weight.reshape(self.groups, len(weight) // self.groups, -1)
        inputs, outputs = weight.shape[0] // self.groups, weight.shape[1]
        made = weight.reshape(self.groups, inputs, outputs, -1).transpose(1, 2)
        return made.reshape(self.groups, outputs, -1)

    def join(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the weight of a shape whose ``split`` is ``rows``."""
        if not self.transposed:
            return rows.reshape(*shape)
        inputs, outputs = shape[0] // self.groups, shape[1]
        return rows.reshape(self.groups, outputs, inputs, prod(shape[2:])).transpose(1, 2).reshape(*shape)


@dataclass(frozen=True, eq=False)
class Covariance:
    """What the rows of a weight see: H = LLᵀ, group by group, so that ‖ΔW·L‖² is the mean square of the change.

    Attributes:
        matrix: H ``(groups, taps, taps)``, float64, positive definite.
        rows: How the weight is rows.
    """

    matrix: Tensor
    rows: Rows

    @cached_property
    def root(self) -> Tensor:
        """L ``(groups, taps, taps)``, lower triangular; NaN where H is not positive definite."""
        made, failed = torch.linalg.cholesky_ex(self.matrix)
        return torch.where((failed > 0)[:, None, None], torch.nan, made) if bool(failed.any()) else made

    @cached_property
    def inverse(self) -> Tensor:
        """L⁻¹."""
        unit = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype).expand(self.matrix.shape)
        made: Tensor = torch.linalg.solve_triangular(self.root, unit, upper=False)
        return made

    def fits(self, weight: Tensor) -> bool:
        """Whether the rows of a weight are as many groups with as many taps."""
        groups, taps = self.matrix.shape[0], self.matrix.shape[-1]
        whole = weight.dim() >= 2 and weight.shape[0] % groups == 0
        return whole and groups == self.rows.groups and self.rows.split(weight).shape[-1] == taps

    def group(self, index: int) -> Covariance:
        """Return that of one group alone."""
        return _Group(self.matrix[index : index + 1], replace(self.rows, groups=1), self, index)

    def turn(self, weight: Tensor) -> Tensor:
        """Return the rows of a weight times L."""
        return self.rows.split(weight) @ self.root.to(weight)

    def turn_back(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the weight of a shape that ``turn`` makes ``x`` of."""
        return self.rows.join(x @ self.inverse.to(x), shape)


@dataclass(frozen=True, eq=False)
class _Group(Covariance):
    """One group of another, whose factors it shares."""

    whole: Covariance
    index: int

    @cached_property
    def root(self) -> Tensor:
        """L of the group."""
        return self.whole.root[self.index : self.index + 1]

    @cached_property
    def inverse(self) -> Tensor:
        """L⁻¹ of the group."""
        return self.whole.inverse[self.index : self.index + 1]


@dataclass(frozen=True)
class Coordinates:
    """The coordinates x a projection works in: x = s·w, s entry by entry, and its rows times L; w stays where s = 0.

    Attributes:
        weight: w₀ as read, float64.
        scale: s, broadcastable to w; None for 1.
        metric: Name of ‖x − x₀‖/‖x₀‖.
        covariance: H = LLᵀ of what the rows of w see; None for the identity. x is ``(groups, rows, taps)`` then.
    """

    weight: Tensor
    scale: Tensor | None
    metric: Metric
    covariance: Covariance | None = None

    @property
    def start(self) -> Tensor:
        """x₀."""
        return self._turned(self.weight if self.scale is None else self.weight * self.scale)

    @property
    def plain(self) -> Coordinates:
        """The same without H."""
        return replace(self, covariance=None)

    def divided(self, unit: float) -> Coordinates:
        """Return the coordinates of w/unit."""
        return self if unit == 1.0 else replace(self, weight=self.weight / unit)

    def _turned(self, x: Tensor) -> Tensor:
        return x if self.covariance is None else self.covariance.turn(x)

    def to_weight(self, x: Tensor) -> Tensor:
        """Return w of x."""
        x = x.double()
        if self.covariance is not None:
            x = self.covariance.turn_back(x, self.weight.shape)
        if self.scale is None:
            return x
        kept = self.scale == 0
        return torch.where(kept, self.weight, x / torch.where(kept, 1.0, self.scale))

    def distance(self, weight: Tensor) -> float:
        """Return ‖x − x₀‖/‖x₀‖ of a weight."""
        change = weight.double() - self.weight
        if self.scale is not None:
            change = change * self.scale
        length = float(torch.linalg.vector_norm(self.start))
        return float(torch.linalg.vector_norm(self._turned(change))) / length if length > 0 else 0.0
