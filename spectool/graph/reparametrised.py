"""Weights that a module recomputes from other parameters: weight norm, spectral norm, pruning.

Both the old hooks (``weight_g``/``weight_v``, ``weight_orig``/``weight_u``/``weight_v``, ``weight_orig``/
``weight_mask``) and ``torch.nn.utils.parametrizations`` are known; any other parametrisation is a function that the
file does not hold, so its row is skipped with that reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

from spectool.errors import OperatorError
from spectool.graph.effective import Effective, Found, Read
from spectool.graph.types import Skipped

if TYPE_CHECKING:
    from torch import Tensor

    from spectool.checkpoint.types import TensorRef

_NEW = re.compile(r"^(?P<prefix>(?P<owner>.*?)parametrizations\.(?P<local>[^.]+)\.)(?P<leaf>.+)$")
_OLD = re.compile(r"^(?P<weight>(?:.*\.)?[^.]*(?:weight|kernel)[^.]*)_(?P<role>g|orig)$")


def find_reparametrised(tensors: Mapping[str, TensorRef], free: Collection[str]) -> Iterator[Found]:
    """Yield the weights that follow from other parameters.

    Args:
        tensors: All tensors of the file.
        free: Names that no other finder has taken.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in tensors:
        if name not in free:
            continue
        if match := _NEW.match(name):
            groups.setdefault((match["prefix"], match["owner"], match["local"]), []).append(name)
        elif match := _OLD.match(name):
            if match["role"] == "orig":
                yield from _old_original(tensors, match["weight"])
            elif f"{match['weight']}_v" in tensors and f"{match['weight']}_orig" not in tensors:
                v = f"{match['weight']}_v"
                made = weight_norm(match["weight"], name, v, tensors)
                if made is not None:
                    yield Found((name, v), weight=made)
    for (prefix, owner, local), members in groups.items():
        yield _parametrised(tensors, prefix, f"{owner}{local}", tuple(members))


def _parametrised(
    tensors: Mapping[str, TensorRef], prefix: str, weight: str, members: tuple[str, ...]
) -> Found:
    leaves = {name.removeprefix(prefix) for name in members}
    made: Effective | None = None
    if leaves == {"original0", "original1"}:
        made = weight_norm(weight, f"{prefix}original0", f"{prefix}original1", tensors)
    elif leaves == {"original", "0._u", "0._v"}:
        made = spectral_norm(weight, f"{prefix}original", f"{prefix}0._u", f"{prefix}0._v", tensors)
    if made is not None:
        return Found(members, weight=made)
    rank = max(len(tensors[name].shape) for name in members)
    if rank < 2:
        return Found(members)
    reason = f"parametrised by a function the file does not hold (tensors: {', '.join(sorted(leaves))})"
    return Found(members, item=_skip(weight, members, tensors, reason))


def _skip(weight: str, members: tuple[str, ...], tensors: Mapping[str, TensorRef], reason: str) -> Skipped:
    shapes = tuple(tensors[name].shape for name in members)
    rank = max(len(shape) for shape in shapes)
    return Skipped(weight, f"conv{rank - 2}d" if 3 <= rank <= 5 else "linear", members, shapes, reason)


def _old_original(tensors: Mapping[str, TensorRef], weight: str) -> Iterator[Found]:
    original, u, v, mask = (f"{weight}_{suffix}" for suffix in ("orig", "u", "v", "mask"))
    if mask in tensors and tensors[mask].shape == tensors[original].shape:
        yield Found((original, mask), weight=pruned(weight, original, mask, tensors))
    elif u in tensors and v in tensors:
        made = spectral_norm(weight, original, u, v, tensors)
        if made is not None:
            yield Found((original, u, v), weight=made)
    elif u in tensors and len(tensors[original].shape) > 1:
        # Before torch 1.0 only u was stored and v recomputed from the last step of training.
        reason = "spectral norm whose right vector is not in the file"
        yield Found((original, u), item=_skip(weight, (original, u), tensors, reason))


def weight_norm(weight: str, g: str, v: str, tensors: Mapping[str, TensorRef]) -> Effective | None:
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

    def build(read: Read) -> Tensor:
        wide = read(v).double()
        length = read(g).double().reshape(lengths or (1,) * len(shape))
        return wide * (length / norm(wide))

    def invert(wanted: Tensor, read: Read) -> dict[str, Tensor]:
        wide = wanted.double()
        length = norm(wide)
        # A row of zeros has no direction: keep the stored one, with length zero.
        direction = wide.where(length > 0, read(v).double())
        return {g: length.reshape(tensors[g].shape), v: direction}

    return Effective(weight, shape, (g, v), build, f"weight norm of {g} and {v}", invert=invert)


def spectral_norm(
    weight: str, original: str, u: str, v: str, tensors: Mapping[str, TensorRef]
) -> Effective | None:
    """Return W = W₀/(uᵀW₀v) with the stored vectors, as evaluation mode does; None if shapes do not fit.

    The matrix of W₀ has the axis of ``u``'s length first: axis 0, but 1 for a transposed convolution. Where a
    convolution has as many inputs as outputs, the axis with the larger quotient is taken, since u and v are close
    to singular vectors of the right matrix.

    Args:
        weight: Name of the weight.
        original: Name of W₀.
        u: Name of the left vector.
        v: Name of the right vector.
        tensors: All tensors of the file.

    **Source:** Miyato et al. 2018, equation 8; ``torch.nn.utils.parametrizations.spectral_norm``.
    """
    shape = tensors[original].shape
    rows, columns = prod(tensors[u].shape), prod(tensors[v].shape)
    axes = [axis for axis, size in enumerate(shape[:2]) if size == rows and rows * columns == prod(shape)]
    if not axes or len(shape) < 2:
        return None
    if len(shape) == 2:
        axes = axes[:1]

    def quotient(tensor: Tensor, axis: int, read: Read) -> Tensor:
        left, right = read(u).double().reshape(-1), read(v).double().reshape(-1)
        return left @ tensor.double().movedim(axis, 0).reshape(rows, -1) @ right

    def first(read: Read) -> int:
        return (
            max(axes, key=lambda axis: abs(float(quotient(read(original), axis, read))))
            if axes[1:]
            else axes[0]
        )

    def build(read: Read) -> Tensor:
        stored = read(original).double()
        return stored / quotient(stored, first(read), read)

    def invert(wanted: Tensor, read: Read) -> dict[str, Tensor]:
        # W/(uᵀWv) does not see the scale of W, so that goes into u: evaluation is exact, while training would
        # normalise u again.
        wide = wanted.double()
        scale = quotient(wide, first(read), read)
        if not bool(scale.abs() > 1e-12 * wide.norm()):
            raise OperatorError(
                f"{weight}: the stored vectors of its spectral norm do not see the new weight"
            )
        return {original: wide, u: read(u).double() / scale}

    how = f"spectral norm of {original} in evaluation mode"
    return Effective(weight, shape, (original, u, v), build, how, invert=invert)


def pruned(weight: str, original: str, mask: str, tensors: Mapping[str, TensorRef]) -> Effective:
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
