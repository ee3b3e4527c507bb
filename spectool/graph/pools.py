"""Modules of ``torch.nn`` without parameters that are affine, or at least of known size: pools, pads, views."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import floor, prod
from typing import Any

from spectool.graph.module import Layer, Module, call, expect, per_axis
from spectool.graph.types import Shape

_UPSAMPLE: Mapping[str, Mapping[int, str]] = {
    "nearest": {dims: f"upsample_nearest{dims}d" for dims in (1, 2, 3)},
    "nearest-exact": {dims: f"_upsample_nearest_exact{dims}d" for dims in (1, 2, 3)},
    "linear": {1: "upsample_linear1d"},
    "bilinear": {2: "upsample_bilinear2d"},
    "trilinear": {3: "upsample_trilinear3d"},
    "bicubic": {2: "upsample_bicubic2d"},
}


def _average_pool(module: Module) -> Layer:
    dims = int(module.cls[-2])
    kernel = module.sizes("kernel_size", dims, 1)
    stride = kernel if module.get("stride") is None else module.sizes("stride", dims)
    padding = module.sizes("padding", dims)
    ceil, count = bool(module.get("ceil_mode", False)), bool(module.get("count_include_pad", True))
    out = _pooled(module, kernel, stride, padding, (1,) * dims, ceil)
    if out is None:
        return Layer()
    arguments: list[Any] = [list(kernel), list(stride), list(padding), ceil, count]
    if dims > 1:
        arguments.append(module.get("divisor_override"))
    return call(module, f"aten.avg_pool{dims}d.default", arguments, out, "avgpool")


def _max_pool(module: Module) -> Layer:
    dims = int(module.cls[-2])
    kernel = module.sizes("kernel_size", dims, 1)
    stride = kernel if module.get("stride") is None else module.sizes("stride", dims)
    dilation = module.sizes("dilation", dims, 1)
    padding = module.sizes("padding", dims)
    return Layer(
        out_shape=_pooled(module, kernel, stride, padding, dilation, bool(module.get("ceil_mode", False)))
    )


def _pooled(
    module: Module,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil: bool,
) -> Shape | None:
    shape = module.shape
    if shape is None or len(shape) != len(kernel) + 1:
        return None
    sizes = []
    for n, k, s, p, d in zip(shape[1:], kernel, stride, padding, dilation, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        size = (-(-room // s) if ceil else room // s) + 1
        if ceil and (size - 1) * s >= n + p:
            size -= 1  # the last window may not start in the trailing padding
        sizes.append(size)
    expect(module, min(sizes) > 0, f"room for a window of {kernel}")
    return (shape[0], *sizes)


def _adaptive(module: Module) -> Layer:
    dims = int(module.cls[-2])
    shape = module.shape
    if shape is None or len(shape) != dims + 1:
        return Layer()
    wanted = module.get("output_size", 1)
    entries = (wanted,) * dims if wanted is None or isinstance(wanted, int) else tuple(wanted)
    entries = entries * dims if len(entries) == 1 else entries
    sizes = tuple(n if size is None else int(size) for n, size in zip(shape[1:], entries, strict=True))
    if "Max" in module.cls:
        return Layer(out_shape=(shape[0], *sizes))
    if sizes == shape[1:]:
        return Layer(neutral=True, out_shape=shape)
    # Under the names that a traced program shows; the plain ones check more and do the same.
    name = (
        f"aten.adaptive_avg_pool{dims}d.default" if dims == 1 else f"aten._adaptive_avg_pool{dims}d.default"
    )
    return call(module, name, [list(sizes)], (shape[0], *sizes), "avgpool")


def _flatten(module: Module) -> Layer:
    shape = module.shape
    if shape is None:
        return Layer()
    rank = len(shape) + 1
    start, end = (
        int(module.get(key, default)) % rank for key, default in (("start_dim", 1), ("end_dim", -1))
    )
    if start < 1 or end < start:
        return Layer()
    out = (*shape[: start - 1], prod(shape[start - 1 : end]), *shape[end:])
    return Layer(neutral=True, out_shape=out) if out == shape else _view(module, out)


def _unflatten(module: Module) -> Layer:
    shape, sizes = module.shape, module.get("unflattened_size")
    axis = module.get("dim")
    if shape is None or not isinstance(axis, int) or not isinstance(sizes, (list, tuple)):
        return Layer()
    at = axis % (len(shape) + 1) - 1
    if at < 0 or not all(isinstance(size, int) for size in sizes):
        return Layer()
    known = prod(size for size in sizes if size != -1)
    filled = [shape[at] // known if size == -1 else size for size in sizes]
    return _view(module, (*shape[:at], *filled, *shape[at + 1 :]))


def _upsample(module: Module) -> Layer:
    shape = module.shape
    mode = str(module.get("mode", "bilinear" if "Bilinear" in module.cls else "nearest"))
    if shape is None or mode not in _UPSAMPLE or not 2 <= len(shape) <= 4:
        return Layer()
    dims = len(shape) - 1
    size, factor = module.get("size"), module.get("scale_factor")
    scales: list[float | None] = [None] * dims
    if size is not None:
        sizes = per_axis(size, dims)
    elif factor is not None:
        factors = (
            (float(factor),) * dims if isinstance(factor, (int, float)) else tuple(float(f) for f in factor)
        )
        sizes = tuple(floor(n * f) for n, f in zip(shape[1:], factors, strict=True))
        if not module.get("recompute_scale_factor"):
            scales = list(factors)
    else:
        return Layer()
    stem = _UPSAMPLE[mode].get(dims)
    if stem is None:
        return Layer()
    arguments: list[Any] = [list(sizes)]
    if mode not in ("nearest", "nearest-exact"):
        arguments.append(bool(module.get("align_corners") or "Bilinear" in module.cls))
    return call(module, f"aten.{stem}.default", [*arguments, *scales], (shape[0], *sizes), "upsample")


def _pad(module: Module) -> Layer:
    shape = module.shape
    dims = int(module.cls[-2])
    pads = module.sizes("padding", 2 * dims)
    if shape is None or len(shape) != dims + 1 or len(pads) != 2 * dims:
        return Layer()
    pairs = [(pads[2 * axis], pads[2 * axis + 1]) for axis in reversed(range(dims))]
    out = (shape[0], *(n + low + high for n, (low, high) in zip(shape[1:], pairs, strict=True)))
    family = module.cls.removesuffix(f"Pad{dims}d")
    arguments: list[Any] = [list(pads)]
    if family in ("Zero", "Constant"):
        name = "aten.constant_pad_nd.default"
        arguments.append(float(module.get("value", 0.0)))
    elif family == "Circular":
        name = "aten._pad_circular.default"
    else:
        name = f"aten.{family.lower()}_pad{dims}d.default"
    return call(module, name, arguments, out, "pad")


def _shuffle(module: Module) -> Layer:
    shape = module.shape
    if shape is None or len(shape) != 3:
        return Layer()
    channels, height, width = shape
    if module.cls == "PixelShuffle":
        r = int(module.get("upscale_factor", 1))
        expect(module, channels % r**2 == 0, f"a multiple of {r**2} channels")
        out = (channels // r**2, height * r, width * r)
        return call(module, "aten.pixel_shuffle.default", [r], out, "")
    r = int(module.get("downscale_factor", 1))
    expect(module, height % r == 0 and width % r == 0, f"multiples of {r}")
    out = (channels * r**2, height // r, width // r)
    return call(module, "aten.pixel_unshuffle.default", [r], out, "")


def _view(module: Module, out: Shape) -> Layer:
    return call(module, "aten.view.default", [[1, *out]], out, "")


POOLS: Mapping[str, Callable[[Module], Layer]] = {
    **{f"AvgPool{d}d": _average_pool for d in (1, 2, 3)},
    **{f"MaxPool{d}d": _max_pool for d in (1, 2, 3)},
    **{f"Adaptive{kind}Pool{d}d": _adaptive for d in (1, 2, 3) for kind in ("Avg", "Max")},
    **{f"{kind}Pad{d}d": _pad for d in (1, 2, 3) for kind in ("Zero", "Constant", "Circular")},
    **{f"{kind}Pad{d}d": _pad for d in (1, 2, 3) for kind in ("Reflection", "Replication")},
    **dict.fromkeys(("Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"), _upsample),
    **dict.fromkeys(("PixelShuffle", "PixelUnshuffle"), _shuffle),
    "Flatten": _flatten,
    "Unflatten": _unflatten,
}
"""Class of ``torch.nn`` → rule; without a known input size each is a boundary."""
