"""A region seen from one of its weights: what comes before the operator, what behind, and what goes past it.

Where a constant is read by one convolution or matrix only, the region is A(w) = B + P·C(w)·Q: Q leads from the
root to the operator's input, P from its output to the exit, B past it (an identity branch, say). Gradients in w
are then those of C on P* u and Q v, which cost products of matrices and no backward pass through the region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectool.clip.family import ConvFamily, Family, MatrixFamily
from spectool.clip.replayed import Replayed
from spectool.graph.types import Conv, Linear, Node, Region
from spectool.linear import LinearMap
from spectool.lower.replay import Load, constant_names, run


class SplitFamily(Family):
    """A(w) = B + P·C(w)·Q.

    Args:
        inner: C.
        before: Q; None for the identity.
        behind: P; None for the identity.
        past: B; None for zero.
    """

    def __init__(
        self, inner: Family, before: LinearMap | None, behind: LinearMap | None, past: LinearMap | None
    ) -> None:
        super().__init__(
            lambda weight: _Sandwich(behind, inner.at(weight), before, past),
            inner.start,
            homogeneous=past is None,
        )
        self._inner, self._before, self._behind = inner, before, behind

    def pull(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the gradient of C at P* u and Q v."""
        self.applications += len(left)
        return self._inner.pull(*self._moved(left, right))

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the products of C at P* u and Q v."""
        self.applications += 2 * len(left)
        return self._inner.pairs(*self._moved(left, right))

    def _moved(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return (
                left if self._behind is None else self._behind.rmatvec(left),
                right if self._before is None else self._before.matvec(right),
            )


class _Sandwich:
    """B + P·C·Q as a map."""

    def __init__(
        self, behind: LinearMap | None, core: LinearMap, before: LinearMap | None, past: LinearMap | None
    ) -> None:
        self._behind, self._core, self._before, self._past = behind, core, before, past
        self.in_shape = core.in_shape if before is None else before.in_shape
        self.out_shape = core.out_shape if behind is None else behind.out_shape
        self.dtype, self.device = core.dtype, core.device

    def matvec(self, x: Tensor) -> Tensor:
        """Apply B + P·C·Q."""
        y = x if self._before is None else self._before.matvec(x)
        y = self._core.matvec(y)
        y = y if self._behind is None else self._behind.matvec(y)
        return y if self._past is None else y + self._past.matvec(x)

    def rmatvec(self, y: Tensor) -> Tensor:
        """Apply the adjoint."""
        x = y if self._behind is None else self._behind.rmatvec(y)
        x = self._core.rmatvec(x)
        x = x if self._before is None else self._before.rmatvec(x)
        return x if self._past is None else x + self._past.rmatvec(y)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> _Sandwich:
        """Return itself: its parts hold their weights in one type."""
        return self


def split(
    region: Region, name: str, start: Tensor, load: Load, dtype: torch.dtype, device: torch.device
) -> Family | None:
    """Return a region as a function of one of its constants, or None if it is read by more than one operator.

    Args:
        region: Of known input shape.
        name: The constant.
        start: Its value.
        load: Reads the other constants.
        dtype: Arithmetic type.
        device: Where to compute.
    """
    readers = [node for node in region.nodes if name in node.inputs]
    if len(readers) != 1 or region.in_shape is None or not isinstance(readers[0].op, (Conv, Linear)):
        return None
    node = readers[0]
    if node.inputs[1] != name or name in (node.inputs[0], *node.inputs[2:]):
        return None
    constants: dict[str, Tensor] = {}
    for constant in constant_names(region):
        if constant != name:
            value = load(constant)
            constants[constant] = value.to(device=device, dtype=dtype) if value.is_floating_point() else value
    at, source, target = region.nodes.index(node), node.inputs[0], node.outputs[0]
    if source in constants:
        return None

    def root(x: Tensor) -> dict[str, Tensor]:
        return {region.root: x.unsqueeze(0) if region.batched else x}

    def out(values: dict[str, Tensor]) -> Tensor:
        y = values[region.exit]
        return y.squeeze(0) if region.batched else y

    def ahead(x: Tensor) -> Tensor:
        values = root(x)
        run(region.nodes[:at], values, constants)
        return values[source]

    in_shape = tuple(region.in_shape)
    zero = torch.zeros(in_shape, dtype=dtype, device=device)
    with torch.no_grad():
        seen = ahead(zero)
    inner = _core(node, start.to(dtype=dtype, device=device), tuple(seen.shape))
    if inner is None:
        return None
    core = inner.at(inner.start)
    squeezed = len(core.in_shape) == seen.dim() - 1  # the core has no batch axis, the graph one of 1

    def before(x: Tensor) -> Tensor:
        y = ahead(x)
        return y.squeeze(0) if squeezed else y

    rest = [*region.nodes[:at], *region.nodes[at + 1 :]]

    def behind(y: Tensor) -> Tensor:
        values = root(zero)
        values[target] = y.unsqueeze(0) if squeezed else y
        run(rest, values, constants)
        return out(values)

    def past(x: Tensor) -> Tensor:
        values = root(x)
        values[target] = torch.zeros(
            (1, *core.out_shape) if squeezed else core.out_shape, dtype=dtype, device=device
        )
        run(rest, values, constants)
        return out(values)

    def made(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> LinearMap:
        return Replayed(torch.func.vmap(function), shape, dtype, device)

    aside = made(past, in_shape)
    return SplitFamily(
        inner,
        None if _trivial(source, region.root, in_shape, core.in_shape) else made(before, in_shape),
        None
        if _trivial(target, region.exit, core.out_shape, region.out_shape)
        else made(behind, core.out_shape),
        None if _is_zero(aside) else aside,
    )


def _trivial(a: str, b: str, shape: tuple[int, ...], other: tuple[int, ...] | None) -> bool:
    return a == b and other is not None and tuple(shape) == tuple(other)


def _core(node: Node, start: Tensor, shape: Sequence[int]) -> Family | None:
    """Return the operator of a node on inputs of a shape as a function of its weight."""
    if isinstance(node.op, Conv):
        dims = node.op.geometry.dims
        if len(shape) == dims + 2 and shape[0] == 1:
            shape = shape[1:]
        return ConvFamily(start, tuple(shape), node.op.geometry) if len(shape) == dims + 1 else None
    if isinstance(node.op, Linear) and node.op.axis == -1 and start.dim() == 2:
        return MatrixFamily(start, tuple(shape[:-1]), transposed=node.op.transposed, factor=node.op.alpha)
    return None


def _is_zero(A: LinearMap) -> bool:
    x = torch.randn(1, *A.in_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        y = A.matvec(x.to(dtype=A.dtype, device=A.device))
    return float(y.abs().max()) == 0.0
