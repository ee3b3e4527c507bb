"""ONNX operations that move, select, copy or pad entries, as torch code that vmap, jvp and vjp can go through."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from spectool.errors import OperatorError
from spectool.lower.onnx_arguments import (
    Arguments,
    Attributes,
    Implementation,
    flowing,
    integers,
    numbers,
    optional,
    text,
    wrapped,
)

if TYPE_CHECKING:
    from torch import Tensor


def identity(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Return the input: Identity, Dropout in evaluation, and casts, since replay chooses its own float type."""
    return flowing(arguments)


def transpose(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Permute axes; without ``perm`` they are reversed."""
    x = flowing(arguments)
    perm = attributes.get("perm") or tuple(reversed(range(x.dim())))
    return x.permute(*perm)


def reshape(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Reshape; 0 copies the size at its place unless ``allowzero``, -1 takes the rest."""
    x = flowing(arguments)
    shape = integers(arguments, 1, attributes, "shape")
    if shape is None:
        raise OperatorError("Reshape without a shape")
    if not attributes.get("allowzero"):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return x.reshape(shape)


def flatten(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Flatten to a matrix, split before ``axis``."""
    x = flowing(arguments)
    axis = int(attributes.get("axis", 1))
    axis += x.dim() if axis < 0 else 0
    return (
        x.reshape(prod(x.shape[:axis]), -1)
        if x.numel()
        else x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))
    )


def squeeze(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Drop axes of size 1; all of them where none are named."""
    x = flowing(arguments)
    axes = integers(arguments, 1, attributes, "axes")
    if axes is None:
        axes = [axis for axis, size in enumerate(x.shape) if size == 1]
    drop = set(wrapped(axes, x.dim()))
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in drop])


def unsqueeze(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Insert axes of size 1; they are counted in the result."""
    x = flowing(arguments)
    axes = integers(arguments, 1, attributes, "axes") or []
    rank = x.dim() + len(axes)
    new = set(wrapped(axes, rank))
    sizes = iter(x.shape)
    return x.reshape([1 if axis in new else next(sizes) for axis in range(rank)])


def concat(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Concatenate; before opset 4 along axis 1 by default."""
    return torch.cat([x for x in arguments if x is not None], int(attributes.get("axis", 1)))


def split(arguments: Arguments, attributes: Attributes, opset: int) -> tuple[Tensor, ...]:
    """Split by sizes, or into ``num_outputs`` pieces of which the last may be smaller."""
    x = flowing(arguments)
    axis = int(attributes.get("axis", 0))
    sizes = integers(arguments, 1, attributes, "split")
    if sizes:
        return torch.split(x, sizes, axis)
    count = int(attributes.get("num_outputs", 0))
    if count < 1:
        raise OperatorError("Split without sizes")
    return torch.split(x, -(-x.shape[axis] // count), axis)


def slice_(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Slice with positive or negative steps; bounds are clamped as in numpy."""
    x = flowing(arguments)
    starts = integers(arguments, 1, attributes, "starts") or []
    ends = integers(arguments, 2, attributes, "ends") or []
    axes = integers(arguments, 3, attributes, "axes") or list(range(len(starts)))
    steps = integers(arguments, 4, attributes, "steps") or [1] * len(starts)
    for axis, start, end, step in zip(wrapped(axes, x.dim()), starts, ends, steps, strict=True):
        places = range(*slice(start, end, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, min(places.start, x.shape[axis]), len(places))
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.long, device=x.device))
    return x


def gather(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Select entries along an axis by an index tensor of any rank."""
    x = flowing(arguments)
    axis = int(attributes.get("axis", 0)) % x.dim()
    indices = _indices(arguments, x)
    flat = indices.reshape(-1) % x.shape[axis]
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_elements(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Select single entries along an axis."""
    x = flowing(arguments)
    axis = int(attributes.get("axis", 0)) % x.dim()
    return torch.gather(x, axis, _indices(arguments, x) % x.shape[axis])


def gather_nd(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Select entries by index tuples, sample by sample over the first ``batch_dims`` axes."""
    x = flowing(arguments)
    indices = _indices(arguments, x)
    batch = int(attributes.get("batch_dims", 0))
    depth = indices.shape[-1]
    lead = indices.shape[:-1]
    places = [
        torch.arange(size, device=x.device).reshape([-1 if axis == own else 1 for axis in range(len(lead))])
        for own, size in enumerate(lead[:batch])
    ]
    places += [indices[..., column] % x.shape[batch + column] for column in range(depth)]
    return x[tuple(place.expand(lead) for place in places)] if places else x


def pad(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Pad any axes in any mode; negative pads crop."""
    x = flowing(arguments)
    pads = integers(arguments, 1, attributes, "pads") or list(attributes.get("paddings", ()))
    axes = integers(arguments, 3, {}, "axes")
    chosen = wrapped(axes if axes is not None else list(range(len(pads) // 2)), x.dim())
    half = len(chosen)
    mode = text(attributes, "mode", "constant")
    if mode == "constant":
        values = numbers(arguments, 2, {}, "value") or [float(attributes.get("value", 0.0))]
        flat = [0] * (2 * x.dim())
        for axis, low, high in zip(chosen, pads[:half], pads[half:], strict=True):
            place = 2 * (x.dim() - 1 - axis)
            flat[place], flat[place + 1] = low, high
        return F.pad(x, flat, value=values[0])
    for axis, low, high in zip(chosen, pads[:half], pads[half:], strict=True):
        n = x.shape[axis]
        places = torch.arange(-low, n + high, device=x.device)
        x = x.index_select(axis, _inside(places, n, mode))
    return x


def _inside(places: Tensor, n: int, mode: str) -> Tensor:
    """Return where positions outside of 0…n−1 are read."""
    match mode:
        case "edge":
            return places.clamp(0, n - 1)
        case "wrap":
            return places % n
        case "reflect":
            period = max(2 * (n - 1), 1)
            folded = places % period
            return torch.minimum(folded, period - folded) if n > 1 else torch.zeros_like(places)
    raise OperatorError(f"padding mode {mode!r} is not supported")


def center_crop_pad(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Crop or zero-pad around the centre; of an odd difference the larger part is at the end."""
    x = flowing(arguments)
    target = integers(arguments, 1, attributes, "shape") or []
    axes = wrapped(list(attributes.get("axes") or range(x.dim())), x.dim())
    for axis, size in zip(axes, target, strict=True):
        n = x.shape[axis]
        if size <= n:
            x = x.narrow(axis, (n - size) // 2, size)
        else:
            low = (size - n) // 2
            flat = [0] * (2 * (x.dim() - axis))
            flat[-2], flat[-1] = low, size - n - low
            x = F.pad(x, flat)
    return x


def expand(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Broadcast to the joint shape of the input and ``shape``."""
    x = flowing(arguments)
    shape = integers(arguments, 1, attributes, "shape") or []
    rank = max(x.dim(), len(shape))
    own, wanted = (1,) * (rank - x.dim()) + tuple(x.shape), [1] * (rank - len(shape)) + shape
    return x.expand([size if size != 1 else other for size, other in zip(own, wanted, strict=True)])


def tile(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Repeat along every axis; opset 1 repeats along one."""
    x = flowing(arguments)
    repeats = integers(arguments, 1, attributes, "repeats") or []
    if opset < 6:
        axis = (integers(arguments, 2, attributes, "axis") or [0])[0]
        repeats = [repeats[0] if place == axis else 1 for place in range(x.dim())]
    return x.repeat(*repeats)


def trilu(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Keep the upper or the lower triangle of the last two axes."""
    x = flowing(arguments)
    k = (integers(arguments, 1, attributes, "k") or [0])[0]
    rows = torch.arange(x.shape[-2], device=x.device).unsqueeze(1)
    columns = torch.arange(x.shape[-1], device=x.device)
    kept = columns >= rows + k if attributes.get("upper", 1) else columns <= rows + k
    return x * kept


def where(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Choose between two tensors by a constant mask."""
    mask, x, y = arguments[:3]
    if mask is None or x is None or y is None:
        raise OperatorError("Where needs three inputs")
    return torch.where(mask.to(device=x.device, dtype=torch.bool), x, y)


def depth_to_space(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Move channels into blocks of positions; DCR takes the block from the outer channels, CRD from the inner."""
    x = flowing(arguments)
    n, c, h, w = x.shape
    b = int(attributes.get("blocksize", 1))
    if text(attributes, "mode", "DCR") == "DCR":
        y = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Move blocks of positions into outer channels."""
    x = flowing(arguments)
    n, c, h, w = x.shape
    b = int(attributes.get("blocksize", 1))
    y = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * b * b, h // b, w // b)


def _indices(arguments: Arguments, x: Tensor) -> Tensor:
    indices = optional(arguments, 1)
    if indices is None:
        raise OperatorError("a gather without indices")
    return indices.to(device=x.device, dtype=torch.long)


LAYOUT: Mapping[str, Implementation] = {
    "Identity": identity,
    "Dropout": identity,
    "Cast": identity,
    "CastLike": identity,
    "Transpose": transpose,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Pad": pad,
    "CenterCropPad": center_crop_pad,
    "Expand": expand,
    "Tile": tile,
    "Trilu": trilu,
    "Where": where,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}
