"""Torch implementations of the affine ONNX operations, for replay of a region under vmap, jvp and vjp.

Each takes the node's inputs (None where absent; integers as CPU tensors), its attributes and its opset version, and
returns its output, or a tuple of them. None branches on the values of what flows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
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
    optional,
    text,
    wrapped,
)
from spectool.lower.onnx_layout import LAYOUT
from spectool.lower.onnx_resample import RESAMPLE

if TYPE_CHECKING:
    from torch import Tensor

_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def negative(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Change the sign."""
    return -flowing(arguments)


def add(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Add with broadcasting."""
    x, y = _pair(arguments, attributes)
    return x + y


def subtract(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Subtract with broadcasting."""
    x, y = _pair(arguments, attributes)
    return x - y


def multiply(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Multiply with broadcasting."""
    x, y = _pair(arguments, attributes)
    return x * y


def divide(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Divide with broadcasting."""
    x, y = _pair(arguments, attributes)
    return x / y


def total(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Add any number of tensors."""
    return reduce(torch.add, [x for x in arguments if x is not None])


def mean_of(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Average any number of tensors."""
    return total(arguments, attributes, opset) / sum(x is not None for x in arguments)


def matmul(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Multiply matrices or stacks of them."""
    x, y = _pair(arguments, {})
    return torch.matmul(x, y)


def einsum(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Contract by an equation."""
    operands = [x for x in arguments if x is not None]
    result: Tensor = torch.einsum(str(attributes["equation"]), *operands)
    return result


def reduce_mean(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Average over axes."""
    x = flowing(arguments)
    axes = _reduced_axes(arguments, attributes, x.dim())
    return x.mean(axes, keepdim=bool(attributes.get("keepdims", 1))) if axes else x


def reduce_sum(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Sum over axes."""
    x = flowing(arguments)
    axes = _reduced_axes(arguments, attributes, x.dim())
    return x.sum(axes, keepdim=bool(attributes.get("keepdims", 1))) if axes else x


def cumulative_sum(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Sum up along an axis, from either end, with or without the entry itself."""
    x = flowing(arguments)
    axis = wrapped(integers(arguments, 1, attributes, "axis") or [0], x.dim())[0]
    if attributes.get("reverse"):
        x = x.flip(axis)
    y = x.cumsum(axis)
    if attributes.get("exclusive"):
        y = y - x
    return y.flip(axis) if attributes.get("reverse") else y


def column_to_image(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Add up blocks where they lie in an image: a transposed convolution with one tap per block entry."""
    x = flowing(arguments)
    image = integers(arguments, 1, attributes, "image_shape") or []
    block = integers(arguments, 2, attributes, "block_shape") or []
    dims = len(block)
    if dims not in _CONV_TRANSPOSE:
        raise OperatorError(f"Col2Im over {dims} axes is not supported")
    stride = list(attributes.get("strides") or (1,) * dims)
    dilation = list(attributes.get("dilations") or (1,) * dims)
    pads = list(attributes.get("pads") or (0,) * (2 * dims))
    entries = 1
    for size in block:
        entries *= size
    grid = [
        (image[a] + pads[a] + pads[a + dims] - dilation[a] * (block[a] - 1) - 1) // stride[a] + 1
        for a in range(dims)
    ]
    channels = x.shape[1] // entries
    kernel = torch.eye(entries, dtype=x.dtype, device=x.device).reshape(entries, 1, *block)
    y: Tensor = _CONV_TRANSPOSE[dims](
        x.reshape(x.shape[0] * channels, entries, *grid), kernel, None, stride, 0, 0, 1, dilation
    )
    # What no block reaches is zero; what lies in the padding is cropped.
    flat = []
    for a in reversed(range(dims)):
        flat += [-pads[a], image[a] + pads[a] - y.shape[2 + a]]
    return F.pad(y, flat).reshape(x.shape[0], channels, *image)


def scatter_elements(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Put updates at constant places along an axis, or add them there."""
    x, updates = _pair((flowing(arguments), optional(arguments, 2)), {})
    places = optional(arguments, 1)
    if places is None:
        raise OperatorError("a scatter without indices")
    axis = wrapped([int(attributes.get("axis", 0))], x.dim())[0]
    index = places.to(device=x.device, dtype=torch.long) % x.shape[axis]
    match text(attributes, "reduction", "none"):
        case "none":
            return torch.scatter(x, axis, index, updates)
        case "add":
            return torch.scatter_add(x, axis, index, updates)
        case other:
            raise OperatorError(f"a scatter that reduces by {other!r} is not linear")


def scatter_nd(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Put slices at constant places, or add them there."""
    x, updates = _pair((flowing(arguments), optional(arguments, 2)), {})
    places = optional(arguments, 1)
    reduction = text(attributes, "reduction", "none")
    if places is None:
        raise OperatorError("a scatter without indices")
    if reduction not in ("none", "add"):
        raise OperatorError(f"a scatter that reduces by {reduction!r} is not linear")
    index = tuple(places.to(device=x.device, dtype=torch.long).reshape(-1, places.shape[-1]).unbind(1))
    rows = updates.reshape(-1, *x.shape[len(index) :])
    return torch.index_put(x, index, rows, accumulate=reduction == "add")


def reverse_sequence(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Turn the beginning of every sequence of a batch around, each by its own constant length."""
    x = flowing(arguments)
    batch, time = wrapped(
        [int(attributes.get("batch_axis", 1)), int(attributes.get("time_axis", 0))], x.dim()
    )
    lengths = torch.tensor(integers(arguments, 1, attributes, "sequence_lens") or [], device=x.device)
    steps = torch.arange(x.shape[time], device=x.device)
    places = torch.where(
        steps < lengths.unsqueeze(1), lengths.unsqueeze(1) - 1 - steps, steps
    )  # (batch, time)
    if batch > time:
        places = places.T
    shape = [x.shape[axis] if axis in (batch, time) else 1 for axis in range(x.dim())]
    return torch.gather(x, time, places.reshape(shape).expand(x.shape))


def compress(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Keep what a constant condition says, along an axis or of the flattened tensor."""
    x = flowing(arguments)
    condition = optional(arguments, 1)
    if condition is None:
        raise OperatorError("Compress without a condition")
    kept = condition.to(device=x.device, dtype=torch.bool).reshape(-1).nonzero().reshape(-1)
    if "axis" not in attributes:
        return x.reshape(-1).index_select(0, kept)
    return x.index_select(wrapped([int(attributes["axis"])], x.dim())[0], kept)


def _pair(arguments: Arguments, attributes: Attributes) -> tuple[Tensor, Tensor]:
    """Return two operands; before opset 7 the second was aligned at an axis."""
    x, y = optional(arguments, 0), optional(arguments, 1)
    if x is None or y is None:
        raise OperatorError("it needs two inputs")
    axis = attributes.get("axis")
    if attributes.get("broadcast") and axis is not None and y.dim() and y.dim() < x.dim():
        trailing = x.dim() - int(axis) % x.dim() - y.dim()
        y = y.reshape(*y.shape, *(1,) * trailing)
    return x, y


def _reduced_axes(arguments: Arguments, attributes: Attributes, rank: int) -> list[int]:
    axes = integers(arguments, 1, attributes, "axes")
    if not axes:
        return [] if attributes.get("noop_with_empty_axes") else list(range(rank))
    return wrapped(axes, rank)


_ARITHMETIC: Mapping[str, Implementation] = {
    "Neg": negative,
    "Add": add,
    "Sub": subtract,
    "Mul": multiply,
    "Div": divide,
    "Sum": total,
    "Mean": mean_of,
    "MatMul": matmul,
    "Einsum": einsum,
    "ReduceMean": reduce_mean,
    "ReduceSum": reduce_sum,
    "CumSum": cumulative_sum,
    "Col2Im": column_to_image,
    "ScatterND": scatter_nd,
    "ScatterElements": scatter_elements,
    "Scatter": scatter_elements,
    "ReverseSequence": reverse_sequence,
    "Compress": compress,
}

OPS: Mapping[str, Implementation] = {
    f"onnx.{name}": function for name, function in {**LAYOUT, **RESAMPLE, **_ARITHMETIC}.items()
}
"""Operation name, as a ``Call`` carries it → implementation.

What is missing here, or raises ``OperatorError``, takes the second route: ``lower.onnx2torch_route``.
"""
