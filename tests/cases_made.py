"""Diagonals, pools, up-samplings, padding, and maps made from other maps or from functions."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from cases_base import Case, double, gaussian, row
from dense import (
    Matrix,
    adaptive_matrix,
    avgpool_matrix,
    conv_matrix,
    conv_transpose_matrix,
    diagonal_matrix,
    padded_reads,
    upsample_matrix,
)

from spectool.linear import (
    Composed,
    ConvGeometry,
    ConvMap,
    DiagonalMap,
    FunctionMap,
    LinearMap,
    MatrixMap,
    Reshaped,
    Scaled,
    SeparableMap,
    adjoint,
)

CASES: list[Case] = []


def _diagonal(name: str, scale: torch.Tensor, shape: tuple[int, ...], *tags: str, axis: int = 0) -> None:
    CASES.append(
        row(
            f"diagonal {name}",
            lambda: DiagonalMap(scale, shape, axis=axis),
            lambda: diagonal_matrix(double(scale), shape, axis),
            tags,
        )
    )


_GAMMA = torch.tensor([0.5, -2.0, 0.0, 1.5, -0.25])
_diagonal("batch norm, negative and zero gamma", _GAMMA, (5, 6, 6))
_diagonal("flat batch norm", _GAMMA, (5,))
_diagonal("last axis", _GAMMA, (4, 3, 5), axis=-1)
_diagonal("full", gaussian("full", 3, 4, 5), (3, 4, 5))
_diagonal("mask", (torch.arange(60).reshape(3, 20) % 3 > 0).float(), (3, 20), "multiplicity")
_diagonal("zero", torch.zeros(4), (4, 3), "zero")
_diagonal("fp16", _GAMMA.half(), (5, 4), "half")
_diagonal("scale 1e-20", _GAMMA * 1e-20, (5, 4), "scale")


def _separable(
    name: str, channels: int, factors: Sequence[Matrix], dense: Callable[[], Matrix], *tags: str
) -> None:
    tensors = tuple(torch.from_numpy(np.asarray(factor)) for factor in factors)
    CASES.append(row(f"separable {name}", lambda: SeparableMap(channels, tensors), dense, tags))


def _pool(
    name: str, channels: int, size: tuple[int, ...], k: int, s: int, p: int, ceil: bool, count: bool
) -> None:
    dims = len(size)

    def factor(n: int) -> Matrix:
        return avgpool_matrix(1, [n], [k], [s], [p], ceil=ceil, count_include_pad=count)

    _separable(
        f"avgpool {name}",
        channels,
        [factor(n) for n in size],
        lambda: avgpool_matrix(
            channels, size, [k] * dims, [s] * dims, [p] * dims, ceil=ceil, count_include_pad=count
        ),
        "pool",
    )


_pool("2x2", 3, (8, 8), 2, 2, 0, False, True)
_pool("3x3 s2 p1", 3, (9, 8), 3, 2, 1, False, True)
_pool("3x3 s2 p1, padding not counted", 3, (9, 8), 3, 2, 1, False, False)
_pool("3x3 s2 p1 ceil", 3, (8, 10), 3, 2, 1, True, True)
_pool("3x3 s2 ceil, padding not counted", 3, (8, 10), 3, 2, 1, True, False)
_pool("5 s1 p2 1d", 4, (20,), 5, 1, 2, False, False)
_pool("2 s2 3d", 2, (4, 6, 4), 2, 2, 0, False, True)


def _resize(name: str, channels: int, size: tuple[int, ...], out: tuple[int, ...], mode: str) -> None:
    make = (
        functools.partial(adaptive_matrix)
        if mode == "adaptive"
        else functools.partial(upsample_matrix, mode=mode)
    )
    pairs = zip(size, out, strict=True)
    _separable(
        name, channels, [make(1, [n], [m]) for n, m in pairs], lambda: make(channels, size, out), "resize"
    )


_resize("adaptive pool 7x10 to 3x4", 4, (7, 10), (3, 4), "adaptive")
_resize("global pool", 8, (6, 6), (1, 1), "adaptive")
_resize("nearest x2", 3, (6, 7), (12, 14), "nearest")
_resize("nearest to odd size", 3, (6, 7), (9, 10), "nearest")
_resize("linear x2", 3, (6, 7), (12, 14), "linear")
_resize("linear, corners aligned", 2, (5, 6), (11, 9), "corners")
_resize("linear 1d", 4, (12,), (30,), "linear")


def _pad_matrix(size: Sequence[int], pads: Sequence[tuple[int, int]], mode: str, channels: int) -> Matrix:
    reads = [padded_reads(n, lo, hi, mode) for n, (lo, hi) in zip(size, pads, strict=True)]
    rows = np.stack([grid.ravel() for grid in np.meshgrid(*reads, indexing="ij")], axis=1)
    one = np.zeros((len(rows), int(np.prod(size))))
    for index, pixel in enumerate(rows):
        if pixel.min() >= 0:
            one[index, np.ravel_multi_index(tuple(pixel), tuple(size))] = 1
    return np.kron(np.eye(channels), one)


for _mode in ("zeros", "reflect"):
    _separable(
        f"pad {_mode}",
        3,
        [_pad_matrix([n], [pad], _mode, 1) for n, pad in ((6, (1, 2)), (7, (3, 0)))],
        functools.partial(_pad_matrix, (6, 7), ((1, 2), (3, 0)), _mode, 3),
        "pad",
    )


# --- made from others ------------------------------------------------------------------------------------------


def _add(
    name: str, build: Callable[[], LinearMap], dense: Callable[[], Matrix], tags: Sequence[str] = ()
) -> None:
    CASES.append(row(name, build, dense, tags))


def _same(weight: torch.Tensor, groups: int = 1, stride: int = 1) -> ConvGeometry:
    p = (weight.shape[2] - 1) // 2
    return ConvGeometry((stride, stride), ((p, p), (p, p)), (1, 1), groups)


def _same_matrix(weight: torch.Tensor, size: tuple[int, int], groups: int = 1, stride: int = 1) -> Matrix:
    p = (weight.shape[2] - 1) // 2
    return conv_matrix(double(weight), size, (stride, stride), ((p, p), (p, p)), (1, 1), groups)


_W3, _W1, _DW = gaussian("w3", 5, 4, 3, 3), gaussian("w1", 6, 5, 1, 1), gaussian("dw", 5, 1, 3, 3)
_add(
    "composed conv and batch norm",
    lambda: Composed(DiagonalMap(_GAMMA, (5, 7, 7)), ConvMap(_W3, (4, 7, 7), _same(_W3))),
    lambda: diagonal_matrix(double(_GAMMA), (5, 7, 7)) @ _same_matrix(_W3, (7, 7)),
)
_add(
    "composed batch norm before a grouped conv",
    lambda: Composed(ConvMap(_DW, (5, 6, 6), _same(_DW, groups=5)), DiagonalMap(_GAMMA, (5, 6, 6))),
    lambda: _same_matrix(_DW, (6, 6), groups=5) @ diagonal_matrix(double(_GAMMA), (5, 6, 6)),
)
_add(
    "composed transposed conv and batch norm",
    lambda: Composed(
        DiagonalMap(_GAMMA, (5, 8, 8)),
        ConvMap(
            gaussian("up", 4, 5, 2, 2),
            (4, 4, 4),
            ConvGeometry((2, 2), ((0, 0), (0, 0)), (1, 1), 1, "zeros", True, (0, 0)),
        ),
    ),
    lambda: (
        diagonal_matrix(double(_GAMMA), (5, 8, 8))
        @ conv_transpose_matrix(double(gaussian("up", 4, 5, 2, 2)), (4, 4), (2, 2), [(0, 0)] * 2, (1, 1))
    ),
)
_add(
    "composed depthwise, batch norm, pointwise",
    lambda: Composed(
        ConvMap(_W1, (5, 6, 6), _same(_W1)),
        DiagonalMap(_GAMMA, (5, 6, 6)),
        ConvMap(_DW, (5, 6, 6), _same(_DW, groups=5)),
    ),
    lambda: (
        _same_matrix(_W1, (6, 6))
        @ diagonal_matrix(double(_GAMMA), (5, 6, 6))
        @ _same_matrix(_DW, (6, 6), groups=5)
    ),
)
_add(
    "composed global pool, flatten, linear",
    lambda: Composed(
        Reshaped(MatrixMap(gaussian("head", 10, 8)), in_shape=(8, 1, 1)),
        SeparableMap(8, (torch.full((1, 6), 1 / 6, dtype=torch.float64),) * 2),
    ),
    lambda: double(gaussian("head", 10, 8)) @ adaptive_matrix(8, (6, 6), (1, 1)),
)
_add(
    "composed chain of linears",
    lambda: Composed(*(MatrixMap(gaussian(f"chain{i}", 30 + 10 * i, 40 + 10 * i)) for i in range(3))),
    lambda: np.linalg.multi_dot([double(gaussian(f"chain{i}", 30 + 10 * i, 40 + 10 * i)) for i in range(3)]),
)
_add(
    "scaled conv",
    lambda: Scaled(ConvMap(_W3, (4, 7, 7), _same(_W3)), -2.5),
    lambda: -2.5 * _same_matrix(_W3, (7, 7)),
)
_add(
    "adjoint strided conv",
    lambda: adjoint(ConvMap(_W3, (4, 8, 8), _same(_W3, stride=2))),
    lambda: _same_matrix(_W3, (8, 8), stride=2).T,
)
_add(
    "adjoint linear bf16",
    lambda: adjoint(MatrixMap(gaussian("adjoint", 60, 90).bfloat16())),
    lambda: double(gaussian("adjoint", 60, 90).bfloat16()).T,
    ["half"],
)


# --- functions --------------------------------------------------------------------------------------------


def _module(
    name: str,
    make: Callable[[], torch.nn.Module],
    in_shape: tuple[int, ...],
    dense: Callable[[], Matrix],
    *tags: str,
) -> None:
    def build() -> FunctionMap:
        module = make().eval()
        return FunctionMap(
            module,
            in_shape,
            remake=lambda dtype, device: copy.deepcopy(module).to(device=device, dtype=dtype),
        )

    _add(f"function {name}", build, dense, tags)


def _conv_module(weight: torch.Tensor, bias: float, **options: object) -> torch.nn.Conv2d:
    outs, ins, k, _ = weight.shape
    groups = int(options.get("groups", 1))  # type: ignore[call-overload]
    module = torch.nn.Conv2d(ins * groups, outs, k, **options)  # type: ignore[arg-type]
    module.weight.data = weight.clone()
    torch.nn.init.constant_(module.bias, bias)
    return module


def _head() -> torch.nn.Module:
    head = torch.nn.Linear(48, 10)
    head.weight.data = gaussian("pooled head", 10, 48)
    return head


def _conv_bn() -> torch.nn.Module:
    norm = torch.nn.BatchNorm2d(5)
    norm.weight.data = _GAMMA.clone()
    norm.running_var.fill_(0.25)
    norm.running_mean.fill_(3.0)
    return torch.nn.Sequential(_conv_module(_W3, 1.0, padding=1), norm)


_module(
    "conv with a bias of 1e6",
    lambda: _conv_module(_W3, 1e6, padding=1),
    (4, 7, 7),
    lambda: _same_matrix(_W3, (7, 7)),
    "bias",
)
_module(
    "conv and batch norm",
    _conv_bn,
    (4, 7, 7),
    lambda: diagonal_matrix(double(_GAMMA) / np.sqrt(0.25 + 1e-5), (5, 7, 7)) @ _same_matrix(_W3, (7, 7)),
    "bias",
)
_module(
    "reflect conv, stride 2",
    lambda: _conv_module(_W3, -5.0, padding=1, padding_mode="reflect", stride=2),
    (4, 8, 9),
    lambda: conv_matrix(double(_W3), (8, 9), (2, 2), ((1, 1), (1, 1)), (1, 1), 1, "reflect"),
    "bias",
)
_module(
    "pool, flatten, linear",
    lambda: torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.Flatten(), _head()),
    (3, 8, 8),
    lambda: double(gaussian("pooled head", 10, 48)) @ avgpool_matrix(3, (8, 8), (2, 2), (2, 2), (0, 0)),
    "bias",
)
