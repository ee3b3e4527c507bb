"""ONNX pools and resizes as products of 1-D operators: a few taps per output position and axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectool.errors import OperatorError
from spectool.lower.onnx_arguments import (
    Arguments,
    Attributes,
    Implementation,
    flowing,
    integers,
    numbers,
    text,
    wrapped,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Taps:
    """A 1-D operator: output i is Σ_t weights[t, i] · x[places[t, i]].

    Attributes:
        places: Input position of each tap, (taps, outputs).
        weights: Its weight, (taps, outputs).
    """

    places: np.ndarray
    weights: np.ndarray

    def apply(self, x: Tensor, axis: int) -> Tensor:
        """Apply along one axis."""
        shape = [-1 if own == axis else 1 for own in range(x.dim())]
        result: Tensor | None = None
        for places, weights in zip(self.places, self.weights, strict=True):
            term = x.index_select(axis, torch.from_numpy(places).to(x.device))
            if not np.all(weights == 1.0):
                term = term * torch.from_numpy(weights).to(device=x.device, dtype=x.dtype).reshape(shape)
            result = term if result is None else result + term
        if result is None:
            raise OperatorError("a resize without taps")
        return result


# --- pools ------------------------------------------------------------------------------------------------


def average_pool(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Average over windows, with every padding, dilation, rounding and way of counting that ONNX knows."""
    x = flowing(arguments)
    kernel = [int(size) for size in attributes["kernel_shape"]]
    for axis, size in enumerate(kernel):
        x = _window_mean(x, axis + 2, axis, size, len(kernel), attributes)
    return x


def _window_mean(x: Tensor, axis: int, spatial: int, size: int, dims: int, attributes: Attributes) -> Tensor:
    n = x.shape[axis]
    stride = int((attributes.get("strides") or (1,) * dims)[spatial])
    dilation = int((attributes.get("dilations") or (1,) * dims)[spatial])
    low, high, outputs = pool_geometry(n, size, stride, dilation, spatial, dims, attributes)
    # places[t, i] is what tap t of window i reads; outside of the input it counts, at most, as a zero.
    places = np.arange(outputs)[None, :] * stride - low + np.arange(size)[:, None] * dilation
    inside = (places >= 0) & (places < n)
    counted = (places >= -low) & (places < n + high) if attributes.get("count_include_pad") else inside
    counts = np.maximum(counted.sum(axis=0), 1)
    if outputs * 4 < size:
        # Few wide windows (global pooling): one sum each costs less than one pass per tap.
        pieces = [
            x.index_select(axis, torch.from_numpy(places[inside[:, i], i]).to(x.device)).sum(
                axis, keepdim=True
            )
            for i in range(outputs)
        ]
        shape = [-1 if own == axis else 1 for own in range(x.dim())]
        return torch.cat(pieces, axis) / torch.from_numpy(counts).to(device=x.device, dtype=x.dtype).reshape(
            shape
        )
    return Taps(np.clip(places, 0, n - 1), inside / counts).apply(x, axis)


def pool_geometry(
    n: int, size: int, stride: int, dilation: int, spatial: int, dims: int, attributes: Attributes
) -> tuple[int, int, int]:
    """Return leading and trailing padding and number of windows along one axis."""
    span = dilation * (size - 1) + 1
    mode = text(attributes, "auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        outputs = -(-n // stride)
        total = max((outputs - 1) * stride + span - n, 0)
        low = total // 2 if mode == "SAME_UPPER" else total - total // 2
        return low, total - low, outputs
    pads = list(attributes.get("pads") or (0,) * (2 * dims))
    low, high = (0, 0) if mode == "VALID" else (int(pads[spatial]), int(pads[spatial + dims]))
    rounded = ceil if attributes.get("ceil_mode") else floor
    outputs = rounded((n + low + high - span) / stride) + 1
    if attributes.get("ceil_mode") and (outputs - 1) * stride >= n + low:
        outputs -= 1  # a window that would start behind the input and its leading padding is left out
    return low, high, outputs


def global_average_pool(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Average over all axes behind the channels."""
    x = flowing(arguments)
    return x.mean(list(range(2, x.dim())), keepdim=True)


# --- resizes ----------------------------------------------------------------------------------------------


def resize(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Resize by nearest, linear or cubic interpolation, axis by axis, in every coordinate mode.

    Inputs are (x, scales) before opset 11 and (x, roi, scales, sizes) since.
    """
    x = flowing(arguments)
    if attributes.get("antialias"):
        raise OperatorError("antialiased resizing is not supported")
    old = opset < 11
    scales = numbers(arguments, 1 if old else 2, attributes, "scales")
    sizes = None if old else integers(arguments, 3, {}, "sizes")
    roi = None if old else numbers(arguments, 1, {}, "roi")
    axes = wrapped(list(attributes.get("axes") or range(x.dim())), x.dim())
    return _resized(x, axes, scales, sizes or None, roi, _old(attributes) if old else attributes)


def upsample(arguments: Arguments, attributes: Attributes, opset: int) -> Tensor:
    """Enlarge by nearest or linear interpolation; scales are an input since opset 9."""
    x = flowing(arguments)
    scales = numbers(arguments, 1, attributes, "scales")
    if scales is None and "height_scale" in attributes:
        scales = [1.0, 1.0, float(attributes["height_scale"]), float(attributes["width_scale"])]
    return _resized(x, list(range(x.dim())), scales, None, None, _old(attributes))


def _old(attributes: Attributes) -> dict[str, object]:
    """Return the attributes as opset 11 would have them: what is now an option was then fixed."""
    mode = text(attributes, "mode", "nearest").replace("bilinear", "linear")
    return {"mode": mode, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "simple"}


def _resized(
    x: Tensor,
    axes: Sequence[int],
    scales: Sequence[float] | None,
    sizes: Sequence[int] | None,
    roi: Sequence[float] | None,
    attributes: Attributes,
) -> Tensor:
    lengths = [x.shape[axis] for axis in axes]
    if sizes is not None:
        factors = [size / n for size, n in zip(sizes, lengths, strict=True)]
        policy = text(attributes, "keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            common = min(factors) if policy == "not_larger" else max(factors)
            factors = [common] * len(factors)
            sizes = [floor(common * n + 0.5) for n in lengths]
    elif scales is not None:
        factors = list(scales)
        # Sizes are computed in float32 wherever ONNX is implemented: 10 · 2.3 is 23 there and 22 in float64.
        sizes = [floor(np.float32(n) * np.float32(scale)) for n, scale in zip(lengths, factors, strict=True)]
    else:
        raise OperatorError("a resize without scales and sizes")
    for place, (axis, n, size, factor) in enumerate(zip(axes, lengths, sizes, factors, strict=True)):
        region = (roi[place], roi[place + len(axes)]) if roi and len(roi) == 2 * len(axes) else (0.0, 1.0)
        whole = text(attributes, "coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
        if size == n and factor == 1.0 and (whole or region == (0.0, 1.0)):
            continue
        x = resize_taps(n, size, factor, region, attributes).apply(x, axis)
    return x


def resize_taps(n: int, size: int, scale: float, roi: tuple[float, float], attributes: Attributes) -> Taps:
    """Return the 1-D operator that resizes n positions to ``size``.

    Args:
        n: Input length.
        size: Output length.
        scale: Their ratio as the model states it.
        roi: Start and end of the region that ``tf_crop_and_resize`` cuts out, in units of the input.
        attributes: Attributes of ``Resize`` since opset 11.
    """
    transformation = text(attributes, "coordinate_transformation_mode", "half_pixel")
    at = _source(np.arange(size, dtype=np.float64), n, size, scale, roi, transformation)
    match text(attributes, "mode", "nearest"):
        case "nearest":
            mode = text(attributes, "nearest_mode", "round_prefer_floor")
            places = np.clip(_nearest(at, mode, scale), 0, n - 1)[None, :]
            weights = np.ones((1, size))
        case "linear":
            places, weights = _linear(at)
        case "cubic":
            places, weights = _cubic(at, float(attributes.get("cubic_coeff_a", -0.75)))
        case other:
            raise OperatorError(f"resize mode {other!r} is not supported")
    if attributes.get("exclude_outside"):
        weights = np.where((places >= 0) & (places < n), weights, 0.0)
        sums = weights.sum(axis=0, keepdims=True)
        weights = weights / np.where(sums == 0, 1.0, sums)
    if transformation == "tf_crop_and_resize":
        # Outside of the input a constant is put in, which is no part of the linear operator.
        weights = np.where((at < 0) | (at > n - 1), 0.0, weights)
    return Taps(np.clip(places, 0, n - 1).astype(np.int64), weights)


def _source(
    y: np.ndarray, n: int, size: int, scale: float, roi: tuple[float, float], transformation: str
) -> np.ndarray:
    """Return where in the input each output position lies."""
    match transformation:
        case "half_pixel":
            return (y + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            return n / 2 * (1 - size / (scale * n)) + (y + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (y + 0.5) / scale - 0.5 if size > 1 else np.zeros_like(y)
        case "asymmetric":
            return y / scale
        case "align_corners":
            return y * (n - 1) / (size - 1) if size > 1 else np.zeros_like(y)
        case "tf_half_pixel_for_nn":
            return (y + 0.5) / scale
        case "tf_crop_and_resize":
            start, end = roi
            if size > 1:
                return start * (n - 1) + y * (end - start) * (n - 1) / (size - 1)
            return np.full_like(y, 0.5 * (start + end) * (n - 1))
    raise OperatorError(f"coordinate transformation {transformation!r} is not supported")


def _nearest(at: np.ndarray, mode: str, scale: float) -> np.ndarray:
    match mode:
        case "round_prefer_floor":
            result = np.ceil(at - 0.5)
        case "round_prefer_ceil":
            result = np.floor(at + 0.5)
        case "floor":
            result = np.floor(at)
        case "ceil":
            result = np.ceil(at)
        case "simple":
            result = np.ceil(at) if scale < 1 else np.floor(at)
        case _:
            raise OperatorError(f"nearest mode {mode!r} is not supported")
    return result.astype(np.int64)


def _linear(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left = np.floor(at)
    ratio = at - left
    return np.stack([left, left + 1]).astype(np.int64), np.stack([1 - ratio, ratio])


def _cubic(at: np.ndarray, a: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the four taps of cubic convolution interpolation.

    **Source:** Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 15 with a for −1/2.
    """
    left = np.floor(at)
    places, weights = [], []
    for offset in (-1, 0, 1, 2):
        distance = np.abs(at - (left + offset))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        places.append(left + offset)
        weights.append(np.where(distance <= 1, near, far))
    return np.stack(places).astype(np.int64), np.stack(weights)


RESAMPLE: Mapping[str, Implementation] = {
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "Resize": resize,
    "Upsample": upsample,
}
