"""The parametrisations that are known, forwards and back: weight norm, spectral norm, pruning.

Each says how a weight follows from stored tensors, in float64 and in torch's own arithmetic, and what to store so
that it becomes a wanted one. The stored tensors keep their sizes: a direction its length, an original weight its
divisor, since an optimizer's state and the size of its steps are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Protocol

from spectool.errors import OperatorError
from spectool.graph.effective import Effective, Read
from spectool.graph.types import Shape

if TYPE_CHECKING:
    from torch import Tensor

_POWER_STEPS = 100
"""Steps towards the leading vectors of a new weight; any vectors give the weight, near ones are what torch keeps."""


class Shaped(Protocol):
    """Whatever has a shape: a stored tensor, mostly."""

    @property
    def shape(self) -> Shape:
        """The shape."""
        ...


def weight_norm(weight: str, g: str, v: str, tensors: Mapping[str, Shaped]) -> Effective | None:
    """Return W = g·v/‖v‖, the norm taken over the axes along which ``g`` has one entry; None if shapes do not fit.

    Args:
        weight: Name of the weight.
        g: Name of the lengths.
        v: Name of the directions.
        tensors: All tensors of the file.

    **Source:** Salimans and Kingma 2016, equation 2.
    """
    lengths, shape = tensors[g].shape, tensors[v].shape
    if len(lengths) == 1 and len(shape) > 1 and lengths[0] == shape[0]:
        lengths = (*lengths, *(1,) * (len(shape) - 1))
    if lengths and (
        len(lengths) != len(shape) or any(a not in (1, b) for a, b in zip(lengths, shape, strict=True))
    ):
        return None
    axes = [axis for axis in range(len(shape)) if not lengths or lengths[axis] == 1]
    if not axes or len(shape) < 2:
        return None

    def norm(direction: Tensor) -> Tensor:
        return direction.square().sum(dim=axes, keepdim=True).sqrt()

    def spread(length: Tensor) -> Tensor:
        return length.reshape(lengths or (1,) * len(shape))

    def build(read: Read) -> Tensor:
        wide = read(v).double()
        return wide * (spread(read(g).double()) / norm(wide))

    def compute(read: Read) -> Tensor:
        import torch

        kept = [axis for axis in range(len(shape)) if axis not in axes]
        if len(kept) > 1:
            return build(read).to(read(v).dtype)
        made: Tensor = torch._weight_norm(read(v), spread(read(g)), kept[0] if kept else -1)
        return made

    def invert(wanted: Tensor, read: Read) -> dict[str, Tensor]:
        wide, old = wanted.double(), read(v).double()
        length, size = norm(wide), norm(old)
        turned = spread(read(g).double()).sign()
        turned = turned.where(turned != 0, 1.0)
        # A row of zeros has no direction: keep the stored one, with length zero.
        direction = (wide * (turned * size / length)).where((length > 0) & (size > 0), old)
        return {g: (turned * length).reshape(tensors[g].shape), v: direction}

    how = f"weight norm of {g} and {v}"
    return Effective(weight, shape, (g, v), build, how, invert=invert, compute=compute)


def spectral_norm(
    weight: str, original: str, u: str, v: str, tensors: Mapping[str, Shaped], axis: int | None = None
) -> Effective | None:
    """Return W = W₀/(uᵀW₀v) with the stored vectors, as evaluation mode does; None if shapes do not fit.

    The matrix of W₀ has the axis of ``u``'s length first: axis 0, but 1 for a transposed convolution. Where a
    convolution has as many inputs as outputs and nothing tells, the axis with the larger quotient is taken, since u
    and v are close to singular vectors of the right matrix.

    A wanted W whose matrix has another norm than 1 has no unit vectors u and v that are its singular vectors: they
    would divide it by its norm. What is stored is s·W, with the divisor s of before, its leading singular vectors,
    and u over the norm of W, so that the quotient is s again. Evaluation mode takes the vectors as they are;
    training mode makes unit ones of them first.

    Args:
        weight: Name of the weight.
        original: Name of W₀.
        u: Name of the left vector.
        v: Name of the right vector.
        tensors: All tensors of the file.
        axis: Axis of the rows, where it is known.

    **Source:** Miyato et al. 2018, equation 8; ``torch.nn.utils.parametrizations.spectral_norm``.
    """
    shape = tensors[original].shape
    rows, columns = prod(tensors[u].shape), prod(tensors[v].shape)
    axes = [side for side, size in enumerate(shape[:2]) if size == rows and rows * columns == prod(shape)]
    if axis is not None:
        axes = [side for side in axes if side == axis]
    if not axes or len(shape) < 2:
        return None
    if len(shape) == 2:
        axes = axes[:1] if axis is None else axes

    def matrix(tensor: Tensor, side: int) -> Tensor:
        return tensor.movedim(side, 0).reshape(rows, -1)

    def quotient(side: int, read: Read) -> Tensor:
        left, right = read(u).double().reshape(-1), read(v).double().reshape(-1)
        return left @ matrix(read(original).double(), side) @ right

    def first(read: Read) -> int:
        return max(axes, key=lambda side: abs(float(quotient(side, read)))) if axes[1:] else axes[0]

    def build(read: Read) -> Tensor:
        return read(original).double() / quotient(first(read), read)

    def compute(read: Read) -> Tensor:
        import torch

        stored = read(original)
        made: Tensor = stored / torch.dot(
            read(u).reshape(-1), torch.mv(matrix(stored, first(read)), read(v).reshape(-1))
        )
        return made

    def invert(wanted: Tensor, read: Read) -> dict[str, Tensor]:
        side = first(read)
        divisor = quotient(side, read)
        kept = (wanted.double() * divisor).to(read(original).dtype)
        wide = matrix(kept.double(), side)
        left, right = _leading(wide, read(u).double().reshape(-1))
        right = right.to(read(v).dtype).double()
        value = left @ wide @ right
        if not bool(value.abs() > 1e-12 * wide.norm()):
            raise OperatorError(f"{weight}: its spectral norm would divide zero by zero")
        left = left * (divisor / value)
        made = {original: kept, u: left.reshape(tensors[u].shape), v: right.reshape(tensors[v].shape)}
        stored = {name: value.to(read(name).dtype) for name, value in made.items()}
        if first(lambda name: stored[name]) != side:
            raise OperatorError(f"{weight}: its new vectors would not tell the rows of its matrix")
        return made

    how = f"spectral norm of {original} in evaluation mode"
    return Effective(
        weight,
        shape,
        (original, u, v),
        build,
        how,
        invert=invert,
        compute=compute,
        training=(
            "spectral norm: the new weight is that of evaluation mode; a forward in training mode renews the "
            "vectors it divides by and makes the norm of its matrix 1 again"
        ),
    )


def _leading(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors near the leading singular vectors of a matrix, by power steps from a left one."""
    import torch

    left = start
    if not bool((start @ matrix).norm() > 1e-6 * start.norm() * matrix.norm()):
        left = matrix @ torch.ones(matrix.shape[1], dtype=matrix.dtype) + matrix.abs().sum(dim=1)
    right = left @ matrix
    before = 0.0
    for _ in range(_POWER_STEPS):
        right = torch.nn.functional.normalize(left @ matrix, dim=0, eps=1e-300)
        left = matrix @ right
        size = float(left.norm())
        left = left / max(size, 1e-300)
        if size <= before * (1 + 1e-9):
            break
        before = size
    return left, right


def pruned(weight: str, original: str, mask: str, tensors: Mapping[str, Shaped]) -> Effective:
    """Return W = W₀·mask.

    Args:
        weight: Name of the weight.
        original: Name of W₀.
        mask: Name of the mask of zeros and ones.
        tensors: All tensors of the file.

    **Source:** ``torch.nn.utils.prune``.
    """

    def build(read: Read) -> Tensor:
        stored = read(original)
        return stored * read(mask).to(stored.dtype)

    def invert(wanted: Tensor, read: Read) -> dict[str, Tensor]:
        keep = read(mask) != 0
        if bool(wanted[~keep].any()):
            raise OperatorError(f"{weight}: an edit would fill entries that its pruning mask sets to zero")
        return {original: wanted.where(keep, read(original).to(wanted.dtype))}

    how = f"{original} pruned by {mask}"
    return Effective(weight, tensors[original].shape, (original, mask), build, how, invert=invert)
