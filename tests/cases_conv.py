"""Convolutions and transposed convolutions, one to three dimensions, every geometry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cases_base import Case, double, gaussian, row
from dense import Matrix, conv_matrix, conv_transpose_matrix

from spectool.linear import ConvGeometry, ConvMap

CASES: list[Case] = []


def _pads(padding: int | Sequence[int | tuple[int, int]], dims: int) -> tuple[tuple[int, int], ...]:
    entries = [padding] * dims if isinstance(padding, int) else padding
    return tuple((p, p) if isinstance(p, int) else p for p in entries)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _conv(
    name: str,
    weight: tuple[int, ...] | torch.Tensor,
    in_shape: tuple[int, ...],
    *tags: str,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> None:
    dims = len(in_shape) - 1
    kind = f"conv_transpose{dims}d" if transposed else f"conv{dims}d"
    if not isinstance(weight, torch.Tensor):
        weight = gaussian(kind + name, *weight, scale=scale, dtype=dtype)
    kernel, pads, extra = weight, _pads(padding, dims), _each(output_padding, dims)
    steps, spread, size = _each(stride, dims), _each(dilation, dims), in_shape[1:]
    geometry = ConvGeometry(steps, pads, spread, groups, mode, transposed, extra if transposed else ())

    def dense() -> Matrix:
        if transposed:
            return conv_transpose_matrix(double(kernel), size, steps, pads, spread, groups, extra)
        return conv_matrix(double(kernel), size, steps, pads, spread, groups, mode)

    features = ["conv_transpose" if transposed else "conv", mode, *tags]
    features += ["stride"] * (max(steps) > 1) + ["dilation"] * (max(spread) > 1) + ["groups"] * (groups > 1)
    CASES.append(row(f"{kind} {name}", lambda: ConvMap(kernel, in_shape, geometry), dense, features))


_conv("plain", (6, 5, 3), (5, 30), padding=1)
_conv("valid", (6, 5, 3), (5, 30))
_conv("circular 2 7 -1", torch.tensor([[[2.0, 7.0, -1.0]]]), (1, 20), "reference", padding=1, mode="circular")
_conv("stride 2, nothing left over", (6, 5, 3), (5, 31), stride=2, padding=1)
_conv("stride 3, remainder", (6, 4, 5), (4, 33), stride=3, padding=2)
_conv("dilation 4", (4, 4, 3), (4, 40), padding=4, dilation=4)
_conv("depthwise", (8, 1, 5), (8, 24), padding=2, groups=8)
_conv("groups 3, stride 2", (9, 2, 4), (6, 25), stride=2, padding=1, groups=3)
_conv("padding > kernel", (3, 2, 3), (2, 12), padding=7)
_conv("asymmetric, even kernel", (5, 4, 4), (4, 21), padding=[(1, 2)])
_conv("causal", (5, 4, 3), (4, 21), padding=[(4, 0)], dilation=2)
_conv("cropping", (5, 4, 3), (4, 21), padding=[(-2, 3)], stride=2)
_conv("stride > kernel", (5, 4, 2), (4, 23), stride=5)
_conv("long kernel", (2, 2, 41), (2, 50), padding=20)
_conv("dilation larger than the map", (3, 3, 3), (3, 6), padding=10, dilation=10)
_conv("reflect, stride 2", (4, 4, 5), (4, 20), stride=2, padding=2, mode="reflect")
_conv("replicate, asymmetric", (4, 4, 3), (4, 20), padding=[(3, 1)], mode="replicate")
_conv("circular, even kernel", (4, 4, 4), (4, 20), padding=[(1, 2)], mode="circular")
_conv("circular, padded by the whole map", (2, 2, 5), (2, 6), padding=6, mode="circular")
_conv("reflect, padded to the limit", (2, 2, 5), (2, 6), padding=5, mode="reflect")
_conv("replicate, padding > map", (2, 2, 5), (2, 4), padding=6, mode="replicate", stride=2)

_REFERENCE = torch.tensor([[[[2.0, 7.0, -1.0], [1.0, 3.0, -8.0], [5.0, -3.0, 1.0]]]])
_conv("reference circular", _REFERENCE, (1, 20, 20), "reference", padding=1, mode="circular")
_conv("reference zeros", _REFERENCE, (1, 20, 20), "reference", padding=1)
_conv("reference stride 2", _REFERENCE, (1, 20, 20), "reference", padding=1, stride=2)
_conv("reference valid", _REFERENCE, (1, 20, 20), "reference")
_conv("reference dilation 2", _REFERENCE, (1, 20, 20), "reference", padding=2, dilation=2)
for _mode in ("zeros", "reflect", "replicate"):
    _conv(f"box {_mode}", torch.ones(1, 1, 3, 3), (1, 20, 20), "reference", padding=1, mode=_mode)
_conv("binomial", torch.tensor([[[[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]]]), (1, 20, 20), "reference", padding=1)
_conv(
    "laplacian",
    torch.tensor([[[[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]]]),
    (1, 20, 20),
    "reference",
    padding=1,
)
_conv("3x3", (8, 6, 3, 3), (6, 8, 8), padding=1)
_conv("3x3 valid, oblong", (4, 3, 3, 3), (3, 9, 14))
_conv("3x3 stride 2", (8, 6, 3, 3), (6, 9, 9), stride=2, padding=1)
_conv("3x3 stride 2, even map", (8, 6, 3, 3), (6, 10, 10), stride=2, padding=1)
_conv("7x7 stride 2, few channels", (8, 3, 7, 7), (3, 14, 14), stride=2, padding=3)
_conv("7x7 stride 2, many channels", (6, 12, 7, 7), (12, 7, 7), stride=2, padding=3)
_conv("11x11 stride 4", (8, 3, 11, 11), (3, 15, 15), stride=4, padding=2)
_conv("strides 2, 3", (5, 4, 3, 5), (4, 11, 13), stride=(2, 3), padding=[1, 2])
_conv("stride 2, dilation 2", (5, 4, 3, 3), (4, 12, 11), stride=2, padding=2, dilation=2)
_conv("stride 3, dilation 2", (5, 4, 3, 2), (4, 12, 11), stride=3, padding=2, dilation=2)
_conv("dilations 1, 3", (4, 4, 3, 3), (4, 9, 12), padding=[1, 3], dilation=(1, 3))
_conv("dilation larger than the map", (3, 3, 3, 3), (3, 5, 5), padding=6, dilation=6)
_conv("depthwise", (10, 1, 3, 3), (10, 7, 7), padding=1, groups=10)
_conv("depthwise, multiplier 2, stride 2", (8, 1, 3, 3), (4, 11, 11), stride=2, padding=1, groups=4)
_conv("groups 2", (6, 4, 3, 3), (8, 7, 7), padding=1, groups=2)
_conv("groups 4, dilation 2", (8, 2, 3, 3), (8, 8, 8), padding=2, groups=4, dilation=2)
_conv("groups 3, stride 2, reflect", (6, 2, 3, 3), (6, 9, 9), stride=2, padding=1, groups=3, mode="reflect")
_conv("1x1", (12, 8, 1, 1), (8, 6, 6), "structured")
_conv("1x1 stride 2", (12, 8, 1, 1), (8, 7, 7), "structured", stride=2)
_conv("1x1 padded", (6, 5, 1, 1), (5, 6, 6), "structured", padding=2)
_conv("patches", (16, 3, 4, 4), (3, 12, 12), "structured", stride=4)
_conv("patches, remainder", (16, 3, 4, 4), (3, 14, 15), "structured", stride=4)
_conv("stride > kernel", (7, 4, 2, 2), (4, 13, 13), "structured", stride=4)
_conv("padding > kernel", (3, 2, 3, 3), (2, 6, 6), padding=5)
_conv("padding > kernel, stride 3", (3, 2, 2, 2), (2, 7, 7), padding=4, stride=3)
_conv("single position", (20, 6, 5, 5), (6, 5, 5), "structured")
_conv("single pixel", (5, 7, 3, 3), (7, 1, 1), padding=1)
_conv("single pixel, 1x1", (5, 7, 1, 1), (7, 1, 1), "structured")
_conv("single channel, 5x5", (1, 1, 5, 5), (1, 15, 15), padding=2)
_conv("one axis only", (5, 4, 1, 7), (4, 8, 12), padding=[0, 3])
_conv("even kernel", (6, 5, 4, 4), (5, 9, 9), padding=1)
_conv("even kernel, same", (6, 5, 2, 4), (5, 8, 8), padding=[(0, 1), (1, 2)])
_conv("even kernel, same, stride 2", (6, 5, 3, 4), (5, 8, 8), padding=[(0, 1), (1, 1)], stride=2)
_conv("asymmetric", (4, 5, 3, 3), (5, 8, 9), padding=[(2, 0), (0, 3)])
_conv("asymmetric, stride 2, few channels", (6, 3, 3, 3), (3, 12, 11), padding=[(0, 2), (3, 0)], stride=2)
_conv("cropping", (4, 5, 3, 3), (5, 9, 10), padding=[(-1, 2), (1, -3)])
_conv("cropping, stride 2", (4, 10, 3, 3), (10, 9, 8), padding=[(-2, 0), (0, -1)], stride=2)
_conv("circular", (6, 5, 3, 3), (5, 8, 8), padding=1, mode="circular")
_conv("circular 5x5, oblong", (3, 4, 5, 5), (4, 6, 9), padding=2, mode="circular")
_conv("circular, stride 2", (6, 5, 3, 3), (5, 8, 8), padding=1, mode="circular", stride=2)
_conv("circular, stride does not divide", (6, 5, 3, 3), (5, 9, 9), padding=1, mode="circular", stride=2)
_conv("circular, too little padding", (4, 4, 5, 5), (4, 8, 8), padding=1, mode="circular")
_conv(
    "circular, groups 2, dilation 2",
    (6, 3, 3, 3),
    (6, 8, 8),
    padding=2,
    dilation=2,
    groups=2,
    mode="circular",
)
_conv("circular, dilated past the map", (3, 3, 3, 3), (3, 4, 4), padding=4, dilation=4, mode="circular")
_conv("reflect", (6, 5, 3, 3), (5, 8, 8), padding=1, mode="reflect")
_conv("reflect 5x5, asymmetric", (3, 4, 5, 5), (4, 7, 9), padding=[(2, 1), (0, 3)], mode="reflect")
_conv("reflect, stride 2, few channels", (6, 3, 5, 5), (3, 11, 12), padding=2, stride=2, mode="reflect")
_conv("replicate", (6, 5, 3, 3), (5, 8, 8), padding=1, mode="replicate")
_conv(
    "replicate, stride 2, dilation 2",
    (4, 9, 3, 3),
    (9, 8, 7),
    padding=3,
    stride=2,
    dilation=2,
    mode="replicate",
)
_conv("replicate, padding > map", (3, 3, 3, 3), (3, 3, 4), padding=5, mode="replicate")
_conv("replicate, depthwise", (6, 1, 3, 3), (6, 8, 8), padding=1, groups=6, mode="replicate")
_conv("zero", torch.zeros(4, 3, 3, 3), (3, 6, 6), "zero", padding=1)
_conv(
    "identity kernel",
    torch.eye(4)[:, :, None, None] * torch.eye(3)[1:2].T @ torch.eye(3)[1:2],
    (4, 7, 7),
    "multiplicity",
    padding=1,
)
_conv("fp16", (6, 5, 3, 3), (5, 8, 8), "half", padding=1, dtype=torch.float16, scale=0.1)
_conv("bf16", (6, 5, 3, 3), (5, 8, 8), "half", padding=1, dtype=torch.bfloat16, scale=0.1)
_conv("fp64", (6, 5, 3, 3), (5, 8, 8), padding=1, dtype=torch.float64)
_conv("scale 1e-33", (6, 5, 3, 3), (5, 8, 8), "scale", padding=1, scale=1e-33)
_conv("scale 1e25", (6, 5, 3, 3), (5, 8, 8), "scale", padding=1, scale=1e25)

_conv("3x3x3", (4, 3, 3, 3, 3), (3, 5, 5, 5), padding=1)
_conv("stride 2", (4, 3, 3, 3, 3), (3, 6, 5, 6), stride=2, padding=1)
_conv("stride 2, many channels", (3, 9, 3, 3, 3), (9, 4, 4, 4), stride=2, padding=1)
_conv(
    "everything differs",
    (4, 2, 2, 3, 1),
    (4, 5, 6, 7),
    stride=(1, 2, 3),
    padding=[(1, 0), 2, (0, 1)],
    dilation=(2, 1, 1),
    groups=2,
)
_conv("depthwise", (5, 1, 3, 3, 3), (5, 4, 5, 4), padding=1, groups=5)
_conv("patches", (8, 2, 2, 2, 2), (2, 6, 6, 6), "structured", stride=2)
_conv("circular", (3, 3, 3, 3, 3), (3, 5, 5, 5), padding=1, mode="circular")
_conv("reflect", (3, 3, 3, 3, 3), (3, 4, 5, 6), padding=[1, 2, 1], mode="reflect")
_conv(
    "replicate, stride 2", (3, 3, 3, 3, 3), (3, 5, 6, 5), padding=[1, (0, 2), 1], stride=2, mode="replicate"
)

_conv("plain", (5, 4, 3), (5, 15), transposed=True, padding=1)
_conv("stride 2, output padding", (5, 4, 3), (5, 15), transposed=True, stride=2, padding=1, output_padding=1)
_conv(
    "stride 3, dilation 2, asymmetric",
    (4, 3, 3),
    (4, 12),
    transposed=True,
    stride=3,
    padding=[(2, 0)],
    dilation=2,
)
_conv("output padding beyond the stride", (3, 3, 3), (3, 9), transposed=True, dilation=3, output_padding=2)
_conv("upsampler 4x4 s2", (4, 5, 4, 4), (4, 6, 6), transposed=True, stride=2, padding=1)
_conv(
    "3x3 stride 2, output padding",
    (4, 5, 3, 3),
    (4, 5, 6),
    transposed=True,
    stride=2,
    padding=1,
    output_padding=1,
)
_conv("3x3", (5, 4, 3, 3), (5, 8, 8), transposed=True, padding=1)
_conv("3x3, all of it", (5, 4, 3, 3), (5, 7, 7), transposed=True)
_conv("2x2 s2", (6, 4, 2, 2), (6, 5, 5), "structured", transposed=True, stride=2)
_conv("stride > kernel", (6, 4, 2, 2), (6, 4, 5), "structured", transposed=True, stride=3)
_conv("stride > kernel, output padding", (6, 4, 2, 2), (6, 4, 5), transposed=True, stride=3, output_padding=2)
_conv("depthwise, stride 2", (6, 1, 4, 4), (6, 4, 4), transposed=True, stride=2, padding=1, groups=6)
_conv("groups 2, stride 2", (6, 4, 3, 3), (6, 4, 5), transposed=True, stride=2, padding=1, groups=2)
_conv("groups 2", (6, 4, 3, 3), (6, 6, 5), transposed=True, padding=1, groups=2, dilation=2)
_conv(
    "asymmetric",
    (4, 3, 3, 3),
    (4, 6, 6),
    transposed=True,
    stride=2,
    padding=[(0, 1), (2, 0)],
    output_padding=(1, 0),
)
_conv("padding > kernel", (4, 3, 2, 2), (4, 8, 8), transposed=True, padding=3)
_conv("padding > kernel, stride 2", (4, 9, 2, 2), (4, 6, 6), transposed=True, padding=3, stride=2)
_conv("negative padding", (4, 3, 3, 3), (4, 5, 5), transposed=True, padding=[(-1, 0), (-2, -1)], stride=2)
_conv("dilation 2, stride 2", (4, 3, 3, 3), (4, 6, 5), transposed=True, padding=2, stride=2, dilation=2)
_conv("single pixel", (7, 5, 4, 4), (7, 1, 1), "structured", transposed=True)
_conv(
    "nothing but padding",
    (2, 2, 1, 1),
    (2, 1, 1),
    "zero",
    transposed=True,
    stride=9,
    padding=2,
    output_padding=8,
)
_conv("fp16", (4, 5, 4, 4), (4, 6, 6), "half", transposed=True, stride=2, padding=1, dtype=torch.float16)
_conv("2x2x2 s2", (4, 3, 2, 2, 2), (4, 4, 3, 4), "structured", transposed=True, stride=2)
_conv(
    "3x3x3 s2", (3, 3, 3, 3, 3), (3, 3, 4, 3), transposed=True, stride=2, padding=1, output_padding=(1, 0, 1)
)
_conv(
    "groups 2, dilation 2",
    (4, 2, 2, 3, 2),
    (4, 4, 4, 4),
    transposed=True,
    padding=1,
    dilation=(1, 2, 1),
    groups=2,
)
