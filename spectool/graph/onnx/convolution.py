"""Geometry of ONNX convolutions as this package writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectool.linear.geometry import ConvGeometry

Pads = tuple[tuple[int, int], ...]


def conv_geometry(
    attributes: Mapping[str, Any], kernel: Sequence[int], size: Sequence[int | None] | None
) -> ConvGeometry | None:
    """Return the geometry of a ``Conv``, or None if it depends on an input size that is not known.

    Args:
        attributes: Attributes of the node.
        kernel: Spatial kernel size.
        size: Spatial input size, as far as it is known.
    """
    dims = len(kernel)
    stride = _per_axis(attributes, "strides", dims)
    dilation = _per_axis(attributes, "dilations", dims)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    mode = attributes.get("auto_pad") or "NOTSET"
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = []
        for axis in range(dims):
            n = size[axis] if size is not None else None
            if stride[axis] == 1:
                totals.append(spans[axis] - 1)
            elif n is None:
                return None
            else:
                totals.append(max((-(-n // stride[axis]) - 1) * stride[axis] + spans[axis] - n, 0))
        padding: Pads = tuple(_halves(total, mode) for total in totals)
    else:
        padding = explicit_pads(attributes, dims)
    return ConvGeometry(stride, padding, dilation, int(attributes.get("group", 1)))


def transposed_geometry(
    attributes: Mapping[str, Any], kernel: Sequence[int], size: Sequence[int | None] | None
) -> ConvGeometry | None:
    """Return the geometry of a ``ConvTranspose``, or None if it depends on an input size that is not known.

    ``output_shape`` and ``auto_pad`` fix the output size; what the plain output has too much is cropped, what it
    has too little becomes output padding.
    """
    dims = len(kernel)
    stride = _per_axis(attributes, "strides", dims)
    dilation = _per_axis(attributes, "dilations", dims)
    extra = list(_per_axis(attributes, "output_padding", dims, default=0))
    group = int(attributes.get("group", 1))
    mode = attributes.get("auto_pad") or "NOTSET"
    wanted = list(attributes.get("output_shape") or ())[-dims:]
    if not wanted and mode not in ("SAME_UPPER", "SAME_LOWER"):
        return ConvGeometry(
            stride,
            explicit_pads(attributes, dims),
            dilation,
            group,
            transposed=True,
            output_padding=tuple(extra),
        )
    pads = []
    for axis in range(dims):
        n = size[axis] if size is not None else None
        span = dilation[axis] * (kernel[axis] - 1) + 1
        if wanted:
            if n is None:
                return None
            total = (n - 1) * stride[axis] + extra[axis] + span - int(wanted[axis])
        else:
            # The output is n·stride long: (n − 1)·stride + extra + span − n·stride.
            total = extra[axis] + span - stride[axis]
        if total < 0:
            extra[axis] -= total
            total = 0
        pads.append(_halves(total, "SAME_UPPER" if mode == "SAME_UPPER" else "SAME_LOWER"))
    return ConvGeometry(stride, tuple(pads), dilation, group, transposed=True, output_padding=tuple(extra))


def explicit_pads(attributes: Mapping[str, Any], dims: int) -> Pads:
    """Return the pads that the node states; none under ``VALID``."""
    flat = list(attributes.get("pads") or ())
    if attributes.get("auto_pad") == "VALID" or len(flat) != 2 * dims:
        return ((0, 0),) * dims
    return tuple((int(low), int(high)) for low, high in zip(flat[:dims], flat[dims:], strict=True))


def _halves(total: int, mode: str) -> tuple[int, int]:
    """Split padding in two; the odd one goes to the end under SAME_UPPER, to the front under SAME_LOWER."""
    small = total // 2
    return (small, total - small) if mode == "SAME_UPPER" else (total - small, small)


def _per_axis(attributes: Mapping[str, Any], name: str, dims: int, default: int = 1) -> tuple[int, ...]:
    values = tuple(int(value) for value in attributes.get(name) or ())
    return values if len(values) == dims else (default,) * dims
