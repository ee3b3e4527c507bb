"""Maps made from maps: adjoint, product, multiple, other shapes, other vector type."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from spectool.errors import OperatorError
from spectool.linear.protocol import LinearMap


class Adjoint:
    """Aᵀ as a map. Use ``adjoint``, which also undoes itself.

    Args:
        inner: The map A.
    """

    def __init__(self, inner: LinearMap) -> None:
        self.inner = inner
        self.in_shape, self.out_shape = inner.out_shape, inner.in_shape
        self.dtype, self.device = inner.dtype, inner.device

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply Aᵀ."""
        return self.inner.rmatvec(x)

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply A."""
        return self.inner.matvec(y)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Adjoint:
        """Return the adjoint of the converted map."""
        return Adjoint(self.inner.to(dtype=dtype, device=device))

    def normal_matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply A Aᵀ, in one pass where A can."""
        return _conormal(self.inner, x)

    def conormal_matvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply Aᵀ A, in one pass where A can."""
        return _normal(self.inner, y)


def adjoint(A: LinearMap) -> LinearMap:
    """Return Aᵀ; the adjoint of an adjoint is the map itself.

    Example:
        >>> from spectool.linear import MatrixMap
        >>> adjoint(MatrixMap(torch.ones(2, 3))).in_shape
        (2,)
    """
    return A.inner if isinstance(A, Adjoint) else Adjoint(A)


class Scaled:
    """factor · A, without touching the weights.

    The factor multiplies the vector *before* A is applied: weights of 1e-33 would otherwise push intermediate
    results into float32's denormals, weights of 1e25 beyond its range.

    Args:
        inner: The map A.
        factor: A finite number.
    """

    inner: LinearMap
    factor: float

    def __init__(self, inner: LinearMap, factor: float) -> None:
        if not math.isfinite(factor):
            raise OperatorError(f"a map cannot be scaled by {factor}")
        if isinstance(inner, Scaled):
            factor, inner = inner.factor * factor, inner.inner
        self.inner, self.factor = inner, float(factor)
        self.in_shape, self.out_shape = inner.in_shape, inner.out_shape
        self.dtype, self.device = inner.dtype, inner.device

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply factor·A."""
        return self.inner.matvec(x * self.factor)

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply factor·Aᵀ."""
        return self.inner.rmatvec(y * self.factor)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Scaled:
        """Return the same multiple of the converted map."""
        return Scaled(self.inner.to(dtype=dtype, device=device), self.factor)

    def normal_matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply factor²·AᵀA."""
        return _normal(self.inner, x * self.factor) * self.factor

    def conormal_matvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply factor²·AAᵀ."""
        return _conormal(self.inner, y * self.factor) * self.factor


class Composed:
    """A₁A₂…: the rightmost map is applied first, as in a product of matrices.

    Args:
        *maps: At least one map; each one's input shape equals the next one's output shape.

    Raises:
        OperatorError: If shapes, types or devices of neighbours differ.
    """

    maps: tuple[LinearMap, ...]

    def __init__(self, *maps: LinearMap) -> None:
        if not maps:
            raise OperatorError("a composition needs at least one map")
        flat: list[LinearMap] = []
        for part in maps:
            flat.extend(part.maps if isinstance(part, Composed) else (part,))
        for left, right in pairwise(flat):
            if left.in_shape != right.out_shape:
                raise OperatorError(
                    f"maps do not chain: one gives {right.out_shape}, the next takes {left.in_shape}"
                )
            if left.dtype != right.dtype or not _same_device(left.device, right.device):
                raise OperatorError(
                    f"maps do not chain: one works in {right.dtype} on {right.device}, "
                    f"the next in {left.dtype} on {left.device}"
                )
        self.maps = tuple(flat)
        self.in_shape, self.out_shape = flat[-1].in_shape, flat[0].out_shape
        self.dtype, self.device = flat[0].dtype, flat[0].device

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the maps from right to left."""
        for part in reversed(self.maps):
            x = part.matvec(x)
        return x

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the adjoints from left to right."""
        for part in self.maps:
            y = part.rmatvec(y)
        return y

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Composed:
        """Return the composition of the converted maps."""
        return Composed(*(part.to(dtype=dtype, device=device) for part in self.maps))


class Reshaped:
    """The same numbers under other shapes: flattening between a convolution and a Linear layer.

    Args:
        inner: The map A.
        in_shape: Shape its input shall have; None keeps A's.
        out_shape: Shape its output shall have; None keeps A's.

    Raises:
        OperatorError: If a shape holds another number of entries than A's.
    """

    def __init__(
        self,
        inner: LinearMap,
        *,
        in_shape: tuple[int, ...] | None = None,
        out_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.inner = inner
        self.in_shape = inner.in_shape if in_shape is None else tuple(in_shape)
        self.out_shape = inner.out_shape if out_shape is None else tuple(out_shape)
        self.dtype, self.device = inner.dtype, inner.device
        for new, old in ((self.in_shape, inner.in_shape), (self.out_shape, inner.out_shape)):
            if math.prod(new) != math.prod(old):
                raise OperatorError(f"{old} cannot be seen as {new}: the numbers of entries differ")

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply A between two views."""
        b = x.shape[0]
        return self.inner.matvec(x.reshape(b, *self.inner.in_shape)).reshape(b, *self.out_shape)

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply Aᵀ between two views."""
        b = y.shape[0]
        return self.inner.rmatvec(y.reshape(b, *self.inner.out_shape)).reshape(b, *self.in_shape)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Reshaped:
        """Return the converted map under the same shapes."""
        return Reshaped(
            self.inner.to(dtype=dtype, device=device), in_shape=self.in_shape, out_shape=self.out_shape
        )

    def normal_matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply AᵀA, in one pass where A can."""
        return _normal(self.inner, x.reshape(-1, *self.inner.in_shape)).reshape(x.shape)

    def conormal_matvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply AAᵀ, in one pass where A can."""
        return _conormal(self.inner, y.reshape(-1, *self.inner.out_shape)).reshape(y.shape)


class Recast:
    """A with vectors in ``dtype`` while A itself computes in its own type.

    For a map that cannot change its precision (a function without ``remake``) under a solver that keeps its
    vectors in float64. Results carry A's precision, not ``dtype``'s.

    Args:
        inner: The map A.
        dtype: Type of the vectors.
    """

    def __init__(self, inner: LinearMap, dtype: torch.dtype) -> None:
        self.inner, self.dtype, self.device = inner, dtype, inner.device
        self.in_shape, self.out_shape = inner.in_shape, inner.out_shape

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply A in its own type."""
        return self.inner.matvec(x.to(self.inner.dtype)).to(self.dtype)

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply Aᵀ in its own type."""
        return self.inner.rmatvec(y.to(self.inner.dtype)).to(self.dtype)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Recast:
        """Return the map with vectors in ``dtype``; A follows as far as it can."""
        return Recast(self.inner.to(dtype=dtype, device=device), dtype or self.dtype)


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index == b.index or None in (a.index, b.index))


def _normal(A: LinearMap, x: torch.Tensor) -> torch.Tensor:
    fused: Any = getattr(A, "normal_matvec", None)
    result: torch.Tensor = fused(x) if fused else A.rmatvec(A.matvec(x))
    return result


def _conormal(A: LinearMap, y: torch.Tensor) -> torch.Tensor:
    fused: Any = getattr(A, "conormal_matvec", None)
    result: torch.Tensor = fused(y) if fused else A.matvec(A.rmatvec(y))
    return result
