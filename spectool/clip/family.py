"""Operators that depend on one weight: A(w) = B + L(w), L linear. What every projection works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from spectool.clip.sums import DirectSum
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

    def __init__(
        self, build: Callable[[Tensor], LinearMap], start: Tensor, *, homogeneous: bool = True
    ) -> None:
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

    def floor(self, limit: float) -> float:
        """Return a lower bound on ‖w′ − w₀‖ over all w′ within the limit, good where that is tiny; 0 if unknown."""
        return 0.0

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Return L*(½(uᵢvⱼᵀ + uⱼvᵢᵀ)) for i ≤ j in the order of ``triu_indices``, ``(p(p+1)/2, numel)``.

        Off-diagonal rows are multiplied by √2, so that svec(Y) · rows = L*(U Y Vᵀ).
        """
        p = len(left)
        made = left.new_empty(p * (p + 1) // 2, self.start.numel())
        weight = self.start.clone().requires_grad_()
        with torch.enable_grad():
            A = self._build(weight)
            moved = [A.matvec(right[j : j + 1])[0] for j in range(p)]
            for index, (i, j) in enumerate(zip(*torch.triu_indices(p, p).tolist(), strict=True)):
                total = (moved[j] * left[i]).sum() + (moved[i] * left[j]).sum()
                (gradient,) = torch.autograd.grad(total, weight, retain_graph=True)
                made[index] = gradient.flatten() * (0.5 if i == j else 0.5**0.5)
        self.applications += p * (p + 2)
        return made


class MatrixFamily(Family):
    """The matrices themselves, at any number of positions: ``(*positions, in)`` to ``(*positions, out)``.

    Args:
        start: ``(out, in)``, or ``(in, out)`` if ``transposed``.
        positions: Shape in front of the features.
        transposed: Whether the weight is the transposed matrix.
        factor: Number that the product is multiplied by.
    """

    def __init__(
        self, start: Tensor, positions: tuple[int, ...] = (), *, transposed: bool = False, factor: float = 1.0
    ) -> None:
        def build(weight: Tensor) -> LinearMap:
            matrix = (weight.T if transposed else weight) * factor
            if not positions:
                return MatrixMap(matrix, dtype=start.dtype, device=start.device)
            return Positioned(matrix, positions)

        super().__init__(build, start)
        self._transposed, self.factor = transposed, factor

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Return what ``Family.pairs`` returns, by products of matrices."""
        p, out, features = len(left), left.shape[-1], right.shape[-1]
        u, v = left.reshape(p, -1, out).transpose(1, 2), right.reshape(p, -1, features).transpose(1, 2)
        made = pair_products(u, v)
        self.applications += p * (p + 1)
        if self.factor != 1.0:
            made *= self.factor
        if self._transposed:
            made = made.reshape(-1, out, features).transpose(1, 2).reshape(len(made), -1)
        return made


class Positioned:
    """One matrix applied at every position: ``(*positions, in)`` to ``(*positions, out)``."""

    def __init__(self, matrix: Tensor, positions: tuple[int, ...]) -> None:
        self._matrix = matrix
        self.dtype, self.device = matrix.dtype, matrix.device
        self.in_shape, self.out_shape = (*positions, matrix.shape[1]), (*positions, matrix.shape[0])

    def matvec(self, x: Tensor) -> Tensor:
        """Apply the matrix to ``(b, *positions, in)``."""
        return x @ self._matrix.T

    def rmatvec(self, y: Tensor) -> Tensor:
        """Apply its transpose to ``(b, *positions, out)``."""
        return y @ self._matrix

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Positioned:
        """Return the same operator in another type or on another device."""
        return Positioned(self._matrix.to(device=device, dtype=dtype), self.in_shape[:-1])


class ConvFamily(Family):
    """Convolutions of one geometry and input size; ``pairs`` is a product of matrices."""

    def __init__(self, start: Tensor, in_shape: tuple[int, ...], geometry: ConvGeometry) -> None:
        def build(weight: Tensor) -> LinearMap:
            return ConvMap(weight, in_shape, geometry, dtype=start.dtype, device=start.device)

        super().__init__(build, start)
        self.geometry, self._map = geometry, build(start)
        self.patches = _patches(self._map, geometry, tuple(start.shape[2:]), start)

    def floor(self, limit: float) -> float:
        """Return the value of the dual at Z = t·A(w₀/n), n being how often each tap is used: L*Z = t·w₀.

        It is ‖w₀‖ − c‖A(w₀/n)‖_*/‖w₀‖, and the nuclear norm is at most √rank times the Frobenius norm, which is
        ‖w₀/√n‖.
        """
        A, g = self._map, self.geometry
        narrow, wide = (A.in_shape, A.out_shape) if g.transposed else (A.out_shape, A.in_shape)
        each = []
        for axis, k in enumerate(self.start.shape[2:]):
            s, d, low, n = g.stride[axis], g.dilation[axis], g.padding[axis][0], wide[1 + axis]
            reads = torch.arange(narrow[1 + axis])[:, None] * s + torch.arange(k) * d - low
            if g.padding_mode == "zeros":
                each.append(((reads >= 0) & (reads < n)).sum(dim=0))
            elif g.padding_mode == "circular" and len(set((reads[0] % n).tolist())) == k:
                each.append(torch.full((k,), len(reads)))
            else:
                return 0.0
        counts = each[0]
        for more in each[1:]:
            counts = counts[..., None] * more
        weight = self.start.double().cpu() * (counts > 0)
        length = float(torch.linalg.vector_norm(weight))
        spread = float(torch.linalg.vector_norm(weight / counts.clamp_min(1).sqrt()))
        rank = min(prod(A.out_shape), prod(A.in_shape))
        return max(0.0, length - limit * rank**0.5 * spread / length) if length > 0 else 0.0

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Return what ``Family.pairs`` returns: per pair one product (out, positions) × (positions, in·taps)."""
        if self.geometry.groups > 1:
            return super().pairs(left, right)
        # A transposed convolution is the adjoint of the one that takes patches of its output.
        narrow, wide = (right, left) if self.geometry.transposed else (left, right)
        patches = self.patches(wide)  # (p, channels · taps, positions)
        narrow = narrow.flatten(2)  # (p, channels, positions)
        p = len(narrow)
        made = pair_products(narrow, patches)
        self.applications += p * (p + 1)
        return made


class ScaledFamily(Family):
    """The operators of another family in coordinates x = s·w; entries with s = 0 do not count.

    Args:
        inner: The operators as functions of w.
        scale: s, broadcastable to w.
    """

    def __init__(self, inner: Family, scale: Tensor) -> None:
        scale = scale.to(inner.start).expand(inner.start.shape)
        self._inner, self._per = (
            inner,
            torch.where(scale == 0, 0.0, 1.0 / torch.where(scale == 0, 1.0, scale)),
        )
        fixed = torch.where(scale == 0, inner.start, 0.0)
        super().__init__(
            lambda x: inner.at(x * self._per + fixed), inner.start * scale, homogeneous=inner.homogeneous
        )

    def pull(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the inner gradient over s."""
        return self._inner.pull(left, right) * self._per

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the inner gradients over s."""
        return self._inner.pairs(left, right) * self._per.flatten()


class SumFamily(Family):
    """The direct sum of several operators of one weight, each times its factor."""

    def __init__(self, families: Sequence[Family], factors: Sequence[float]) -> None:
        super().__init__(
            lambda weight: DirectSum([family.at(weight) for family in families], factors),
            families[0].start,
            homogeneous=all(family.homogeneous for family in families),
        )
        self._families, self._factors = tuple(families), tuple(factors)

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the sum of what the families return for their parts of the vectors."""
        made: Tensor | None = None
        begin_out = begin_in = 0
        for family, factor in zip(self._families, self._factors, strict=True):
            A = family.at(family.start)
            out, size = prod(A.out_shape), prod(A.in_shape)
            u = left[:, begin_out : begin_out + out].reshape(-1, *A.out_shape)
            v = right[:, begin_in : begin_in + size].reshape(-1, *A.in_shape)
            part = family.pairs(u, v) * factor
            made = part if made is None else made + part
            begin_out, begin_in = begin_out + out, begin_in + size
        if made is None:
            raise ValueError("a direct sum of nothing")
        return made


def pair_products(u: Tensor, v: Tensor) -> Tensor:
    """Return ½(uᵢvⱼᵀ + uⱼvᵢᵀ), summed over positions, for i ≤ j, off-diagonal rows times √2.

    Args:
        u: ``(p, rows, positions)``.
        v: ``(p, columns, positions)``.
    """
    p, positions = len(u), u.shape[2]
    i_all, j_all = torch.triu_indices(p, p)
    made = u.new_empty(len(i_all), u.shape[1] * v.shape[1])
    per_pair = 2 * positions * (u.shape[1] + v.shape[1]) * u.element_size()
    step = max(1, _CHUNK_BYTES // per_pair)
    for begin in range(0, len(i_all), step):
        i, j = i_all[begin : begin + step], j_all[begin : begin + step]
        a, b = torch.cat([u[i], u[j]], dim=2), torch.cat([v[j], v[i]], dim=2)
        factor = torch.full(i.shape, 0.5**0.5, dtype=u.dtype)
        factor[i == j] = 0.5
        made[begin : begin + step] = torch.bmm(a, b.transpose(1, 2)).flatten(1) * factor[:, None]
    return made


def _patches(
    A: LinearMap, geometry: ConvGeometry, kernel: tuple[int, ...], like: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return the map from vectors of the wide side to ``(p, channels · taps, positions)``."""
    wide = A.out_shape if geometry.transposed else A.in_shape
    channels, taps = wide[0], prod(kernel)
    one_hot = (
        torch.eye(taps, dtype=like.dtype).reshape(taps, 1, *kernel).repeat(channels, *[1] * (len(kernel) + 1))
    )
    each = replace(geometry, groups=channels)
    if geometry.transposed:
        spread = ConvMap(one_hot, (channels * taps, *A.in_shape[1:]), each, dtype=like.dtype)
        return lambda y: spread.rmatvec(y).flatten(2)
    gather = ConvMap(one_hot, A.in_shape, each, dtype=like.dtype)
    return lambda x: gather.matvec(x).flatten(2)


def flat(x: Tensor) -> Tensor:
    """Return vectors as rows."""
    return x.reshape(len(x), -1)
