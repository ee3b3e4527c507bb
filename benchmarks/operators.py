"""The operators of the solver benchmark, with their largest singular values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh

from spectool.linear import (
    ConvGeometry,
    ConvMap,
    FunctionMap,
    LinearMap,
    MatrixMap,
    adjoint,
    normal_matvec,
    size,
    to_dense,
)

K = 8


# --- operators ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """One operator and its largest singular values."""

    name: str
    build: Callable[[], LinearMap]
    truth: Callable[[], np.ndarray]


def weight(*shape: int, seed: int, heavy: bool = False) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    if heavy:
        values *= np.abs(rng.standard_normal(shape)) ** 2
    return torch.from_numpy(values / math.sqrt(math.prod(shape[1:]))).float()


def trained(outs: int, ins: int, kernel: int, seed: int) -> torch.Tensor:
    """Trained-like: the reshaped kernel's singular values decay like 1/sqrt(i)."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((outs, outs)))[0]
    v = np.linalg.qr(rng.standard_normal((ins * kernel**2, outs)))[0]
    flat = (u / np.sqrt(1 + np.arange(outs))) @ v.T
    return torch.from_numpy(flat.reshape(outs, ins, kernel, kernel)).float()


def geometry(dims: int = 2, stride: int = 1, pad: int = 0, **options: Any) -> ConvGeometry:
    dilation = options.pop("dilation", 1)
    return ConvGeometry(
        (stride,) * dims, ((pad, pad),) * dims, (dilation,) * dims, output_padding=(0,) * dims, **options
    )


def iterated_truth(A: LinearMap) -> np.ndarray:
    """Largest 12 values by dense float64 where affordable, else by two float64 ARPACK runs that agree."""
    A = A.to(dtype=torch.float64)
    m, n = size(A)
    if min(m, n) <= 2500:
        dense = to_dense(A)
        small = dense.T @ dense if n <= m else dense @ dense.T
        return torch.linalg.eigvalsh(small).flip(0)[: K + 4].clamp(min=0).sqrt().numpy()
    M = A if n <= m else adjoint(A)

    def apply(x: np.ndarray) -> np.ndarray:
        return normal_matvec(M, torch.from_numpy(x.reshape(1, *M.in_shape))).reshape(-1).numpy()

    operator = LinearOperator((min(m, n),) * 2, matvec=apply, dtype=np.float64)
    runs = []
    for seed in (5, 6):
        start = np.random.default_rng(seed).standard_normal(min(m, n))
        found = eigsh(operator, k=K + 4, ncv=60, tol=1e-15, return_eigenvectors=False, v0=start)
        runs.append(np.sqrt(np.sort(found)[::-1]))
    if np.abs(runs[0] - runs[1]).max() > 1e-11 * runs[0][0]:
        raise RuntimeError("the two reference runs disagree")
    return runs[0]


def conv(name: str, w: torch.Tensor, shape: tuple[int, ...], g: ConvGeometry) -> Operator:
    return Operator(name, lambda: ConvMap(w, shape, g), lambda: iterated_truth(ConvMap(w, shape, g)))


def depthwise() -> Operator:
    w, n = weight(64, 1, 3, 3, seed=4), 32

    def truth() -> np.ndarray:
        parts = [iterated_truth(ConvMap(w[c : c + 1], (1, n, n), geometry(pad=1))) for c in range(64)]
        return np.sort(np.concatenate(parts))[::-1]

    return Operator("depthwise 3x3 64 n32", lambda: ConvMap(w, (64, n, n), geometry(pad=1, groups=64)), truth)


def dilated() -> Operator:
    w = weight(32, 32, 3, 3, seed=6)
    # Dilation 2 on an even size is four copies of the undilated layer on the half grid.
    return Operator(
        "dilated 3x3 d2 32 n32",
        lambda: ConvMap(w, (32, 32, 32), geometry(pad=2, dilation=2)),
        lambda: np.repeat(iterated_truth(ConvMap(w, (32, 16, 16), geometry(pad=1))), 4),
    )


def pointwise() -> Operator:
    w = weight(64, 32, 1, 1, seed=14)
    values = np.linalg.svd(w.double().reshape(64, 32).numpy(), compute_uv=False)
    return Operator(
        "1x1 conv, generic", lambda: ConvMap(w, (32, 16, 16), geometry()), lambda: np.repeat(values, 256)
    )


def composition() -> Operator:
    first, second = weight(32, 16, 3, 3, seed=11), weight(32, 32, 3, 3, seed=12)

    def remake(dtype: torch.dtype, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        a, b = first.to(device, dtype), second.to(device, dtype)
        bias = torch.full((32,), 0.5, dtype=dtype, device=device)
        return lambda x: F.conv2d(F.conv2d(x, a, bias, padding=1), b, None, stride=2, padding=1)

    def build() -> LinearMap:
        return FunctionMap(remake(torch.float32, torch.device("cpu")), (16, 32, 32), remake=remake)

    return Operator("conv -> conv s2, by autograd", build, lambda: iterated_truth(build()))


def cluster() -> Operator:
    rng, n = np.random.default_rng(13), 1500
    values = np.r_[1 - 1e-8 * np.arange(12), np.sort(0.9 * rng.random(n - 12))[::-1]]
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    matrix = torch.from_numpy((u * values) @ v.T)
    return Operator("12-fold cluster gap 1e-8", lambda: MatrixMap(matrix), lambda: values)


def linear(name: str, w: torch.Tensor) -> Operator:
    return Operator(name, lambda: MatrixMap(w), lambda: np.linalg.svd(w.double().numpy(), compute_uv=False))


def operators() -> list[Operator]:
    transposed = geometry(stride=2, pad=1, transposed=True)
    return [
        conv("conv 3x3 64-64 n16", weight(64, 64, 3, 3, seed=0), (64, 16, 16), geometry(pad=1)),
        conv("conv 3x3 64-64 n32", weight(64, 64, 3, 3, seed=1), (64, 32, 32), geometry(pad=1)),
        conv("conv 3x3 64-64 n16 trained-like", trained(64, 64, 3, 2), (64, 16, 16), geometry(pad=1)),
        conv(
            "conv 3x3 s2 64-128 n16", weight(128, 64, 3, 3, seed=3), (64, 16, 16), geometry(stride=2, pad=1)
        ),
        depthwise(),
        conv("conv 7x7 s2 3-64 n64", weight(64, 3, 7, 7, seed=5), (3, 64, 64), geometry(stride=2, pad=3)),
        dilated(),
        conv("conv_transpose 4x4 s2 64-32 n16", weight(64, 32, 4, 4, seed=7), (64, 16, 16), transposed),
        linear("linear 1000x512 gaussian", weight(1000, 512, seed=8)),
        linear("linear 1000x512 heavy-tailed", weight(1000, 512, seed=9, heavy=True)),
        conv("conv1d k9 64-64 n256", weight(64, 64, 9, seed=10), (64, 256), geometry(1, pad=4)),
        composition(),
        cluster(),
        pointwise(),
        conv(
            "conv 3x3 32-32 n24 reflect",
            weight(32, 32, 3, 3, seed=15),
            (32, 24, 24),
            geometry(pad=1, padding_mode="reflect"),
        ),
    ]
