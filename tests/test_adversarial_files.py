"""Files that are hard on the numbers, through the public functions: nothing printed of them may be wrong.

Truth: every layer is applied to unit vectors by PyTorch in float64, or written out by numpy (``dense.py``); singular
values of that by LAPACK, in 80 digits where the matrix is small, or known from the construction.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import onnx_models
import pytest
import torch
from dense import Matrix, conv_matrix
from onnx_models import Array, node
from safetensors.torch import save_file
from torch import nn

import spectool

TINY = 5e-324
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CONVS = (nn.Conv1d, nn.Conv2d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def strict(report: Any) -> dict[str, Any]:
    """The JSON document of a report, after a parser that knows no NaN and no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the JSON")

    document: dict[str, Any] = json.loads(json.dumps(report.to_dict()), parse_constant=refuse)
    return document


def assert_honest(row: dict[str, Any], truth: Sequence[Any], k: int, error: float) -> None:
    """Hold every number of a row against all singular values of its operator, known to ``error``·σ₁."""
    first = truth[0]
    assert row["status"] == "ok", row["note"]
    assert len(row["sigma"]) == min(k, len(truth))
    assert ("clamped" in row["note"]) == (k > len(truth))
    assert (row["lower"], row["upper"]) == (row["sigma_lower"][0], row["sigma_upper"][0])
    slack = error * first + (TINY if error > 1e-60 else 0.0)
    for low, value, high, true in zip(
        row["sigma_lower"], row["sigma"], row["sigma_upper"], truth, strict=False
    ):
        assert low <= value <= high
        assert low <= true + slack
        assert true - slack <= high
        if row["converged"]:
            assert abs(value - true) <= 1.0001e-6 * first + TINY
    if first == 0:
        assert row["sigma"][0] <= 1e-300
        return
    if row["converged"]:
        near, same = (sum(true >= (1 - gap) * first for true in truth) for gap in (3e-9, 1e-13))
        assert row["multiplicity"] <= near
        assert not row["multiplicity_exact"] or row["multiplicity"] >= same or first < 1e-300
    if row["fro"] is not None and first > 1e-300:
        ratio = math.sqrt(math.fsum(float(true / first) ** 2 for true in truth))
        assert row["fro"] == pytest.approx(float(ratio * first), rel=1e-9)
        if row["converged"]:
            assert row["stable_rank"] == pytest.approx(ratio**2, rel=1e-5)


def dense_values(matrix: Matrix) -> Matrix:
    # A power of two keeps LAPACK away from both ends of the range, and rounds nothing.
    peak = 2.0 ** np.clip(np.floor(np.log2(np.abs(matrix).max() or 1.0)), -1000, 1000)
    values: Matrix = np.linalg.svd(matrix / peak, compute_uv=False) * peak
    return values


# --- modules -----------------------------------------------------------------------------------------------------


def graded(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    weight = rng.standard_normal(shape)
    match rng.integers(7):
        case 0:
            weight *= 10.0 ** rng.uniform(-10, 10, shape)
        case 1:
            weight *= (10.0 ** rng.uniform(-10, 10, shape[0])).reshape(-1, *[1] * (len(shape) - 1))
        case 2:
            weight *= 10.0 ** rng.uniform(-45, -38)
        case 3:
            weight *= 1e37
        case 4:
            weight[:] = 1.0
        case 5:
            weight *= rng.random(shape) < 0.3
    return torch.from_numpy(weight).float()


def norm(rng: np.random.Generator, channels: int, axes: int) -> nn.Module:
    layer = NORMS[axes - 1](channels, eps=float(rng.choice([0.0, 1e-12, 1e-5])))
    variance = rng.choice([0.0, 1e-30, 1e-40, 1e-45, 1.0, 2.5, 1e30, 1e-5], channels)
    scale = rng.choice([0.0, -1.0, -1e10, 1e10, 1e-20, 3e38, 1e-45, 2.5], channels)
    layer.running_var.copy_(torch.from_numpy(variance))
    layer.weight.data.copy_(torch.from_numpy(scale))
    return layer


def convolution(rng: np.random.Generator, axes: int, inputs: int, outputs: int, zeros: bool) -> nn.Module:
    kernel, stride, padding, dilation = (
        [int(value) for value in rng.choice(options, axes)]
        for options in ([1, 2, 3], [1, 1, 2, 3, 5], [0, 0, 1, 2, 5], [1, 1, 2, 3, 7])
    )
    groups = math.gcd(inputs, outputs) if rng.random() < 0.3 else 1
    layer: nn.Module
    if rng.random() < 0.2:
        layer = TRANSPOSED[axes - 1](
            inputs, outputs, kernel, stride, padding, groups=groups, dilation=dilation
        )
    else:
        mode = "zeros" if zeros else str(rng.choice(["zeros", "circular", "reflect", "replicate"]))
        layer = CONVS[axes - 1](inputs, outputs, kernel, stride, padding, dilation, groups, padding_mode=mode)
    layer.weight.data = graded(rng, tuple(layer.weight.shape))
    return layer


def scales(layer: nn.Module) -> torch.Tensor:
    return layer.weight.double() / torch.sqrt(layer.running_var.double() + layer.eps)


def applied(layers: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        if isinstance(layer, NORMS):
            x = x * scales(layer).reshape(1, -1, *[1] * (x.ndim - 2))
        else:
            layer = copy.deepcopy(layer).double()
            if getattr(layer, "bias", None) is not None:
                layer.bias.data.zero_()
            x = layer(x)
    return x


def matrix_of(layers: Sequence[nn.Module], shape: Sequence[int]) -> Matrix:
    size = math.prod(shape)
    image = applied(layers, torch.eye(size, dtype=torch.float64).reshape(size, *shape))
    matrix: Matrix = image.reshape(size, -1).T.numpy()
    return matrix


def nets(seeds: range, most: int, zeros: bool = False) -> Iterator[tuple[Any, nn.Sequential, list[Any]]]:
    """Random modules, and the shapes between their layers; those that PyTorch itself refuses are left out."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        axes = int(rng.integers(1, 3))
        shape = tuple(int(n) for n in rng.choice([n for n in (1, 1, 2, 3, 4, 7) if n <= most], axes))
        inputs, outputs = (int(n) for n in rng.choice([1, 1, 2, 4][: most - 1], 2))
        layers = [convolution(rng, axes, inputs, outputs, zeros)]
        form = rng.integers(5)
        layers += [norm(rng, outputs, axes)] if form >= 1 else []
        layers += [convolution(rng, axes, outputs, 2, zeros)] if form == 2 else []
        layers = [norm(rng, inputs, axes), *layers] if form == 3 else layers
        shapes: list[Any] = [(inputs, *shape)]
        try:
            if form == 4:
                features = applied(layers, torch.zeros(1, *shapes[0], dtype=torch.float64))[0].numel()
                layers += [nn.Flatten(), nn.Linear(features, 3)]
                layers[-1].weight.data = graded(rng, (3, features))
            net = nn.Sequential(*layers).eval().to(TYPES[int(rng.integers(4))])
            for layer in net:
                shapes.append(
                    tuple(applied([layer], torch.zeros(1, *shapes[-1], dtype=torch.float64)).shape[1:])
                )
        except RuntimeError:
            continue
        stored = net.state_dict().values()
        if all(math.prod(shape) for shape in shapes) and all(torch.isfinite(one).all() for one in stored):
            yield rng, net, shapes


def rows_of(document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Rows with the first and the last layer they hold."""
    for row in document["rows"]:
        places = sorted({int(name.split(".")[0]) for name in row["weights"]})
        yield row, places[0], places[-1] + 1


@torch.no_grad()
@pytest.mark.parametrize("block", range(4))
def test_convolutions_and_batch_norms(tmp_path: Path, block: int) -> None:
    seen = {"ok": 0, "failed": 0}
    for rng, net, shapes in nets(range(60 * block, 60 * (block + 1)), most=7):
        torch.save(net, tmp_path / "net.pt")
        k, method = int(rng.choice([1, 3, 200])), str(rng.choice(["auto", "auto", "lanczos"]))
        options = {"k": k, "method": method, "certify": bool(rng.integers(2))}
        report = spectool.inspect(tmp_path / "net.pt", input_shape=(1, *shapes[0]), **options)  # type: ignore[arg-type]
        for row, first, end in rows_of(strict(report)):
            seen[row["status"]] += 1
            matrix = matrix_of(net[first:end], shapes[first])
            if np.isfinite(matrix).all():
                assert_honest(row, dense_values(matrix).tolist(), k, 1e-13)
            else:
                assert row["status"] == "failed"
                assert "NaN or infinite" in row["note"]
    assert seen["ok"] > 60
    assert seen["failed"] > 0


@torch.no_grad()
def test_to_the_last_digit_without_a_tolerance(tmp_path: Path) -> None:
    compared = 0
    for _, net, shapes in nets(range(1000, 1140), most=3, zeros=True):
        torch.save(net, tmp_path / "net.pt")
        report = spectool.inspect(tmp_path / "net.pt", k=99, input_shape=(1, *shapes[0]))
        for row, first, end in rows_of(strict(report)):
            if row["status"] == "ok" and max(max(map(math.prod, shapes[first : end + 1])), 1) <= 8:
                assert_honest(row, precise_values(net[first:end], shapes[first:end]), 99, 1e-70)
                compared += 1
    assert compared > 100


def precise_values(layers: Sequence[nn.Module], shapes: Sequence[Any]) -> list[Any]:
    with mpmath.workdps(80):
        product = mpmath.eye(math.prod(shapes[0]))
        for layer, shape in zip(layers, shapes, strict=True):
            if isinstance(layer, NORMS):
                copies = math.prod(shape) // shape[0]
                roots = [
                    mpmath.mpf(float(g)) / mpmath.sqrt(mpmath.mpf(float(v)) + mpmath.mpf(layer.eps))
                    for g, v in zip(layer.weight, layer.running_var, strict=True)
                ]
                product = mpmath.diag([root for root in roots for _ in range(copies)]) * product
            else:
                # With zero padding an entry is one weight or 0: exact.
                product = mpmath.matrix(matrix_of([layer], shape).tolist()) * product
        return digits(product)


def digits(matrix: Any) -> list[Any]:
    with mpmath.workdps(80):
        tall = matrix if matrix.rows >= matrix.cols else matrix.T
        return sorted(mpmath.svd_r(tall, compute_uv=False), reverse=True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("weights", "scale", "variance"),
    [
        ([1e-200, 1e-190], [1e-200, 1e-190], 1.0),  # products of 1e-380 are 0 in float64
        ([1e-200, 1e-190], [1e-121, 1e-131], 1.0),  # products of 1e-321 have two digits
        ([1e-300, 1e-305], [1e-18, 1e-18], 1.0),
        ([1.0, 1.0], [1e-200, -1e-210], 1e300),  # γ/sqrt(var) is 0 in float64
        ([1e200, 1e190], [1e-200, 0.0], 1.0),
        ([1e-200, 0.0], [0.0, 1e-200], 1.0),  # zero indeed
    ],
)
def test_products_below_float64(
    tmp_path: Path, weights: list[float], scale: list[float], variance: float
) -> None:
    # Said to be the zero operator, its upper end 0, before.
    net = nn.Sequential(nn.Conv1d(2, 2, 2, padding=1, bias=False), nn.BatchNorm1d(2, eps=0.0)).eval().double()
    net[0].weight.copy_(
        torch.tensor(weights, dtype=torch.float64).reshape(2, 1, 1) * torch.tensor([1.0, 3.0])
    )
    net[1].weight.copy_(torch.tensor(scale, dtype=torch.float64))
    net[1].running_var.fill_(variance)
    torch.save(net, tmp_path / "net.pt")
    for method in ("auto", "lanczos"):
        report = spectool.inspect(tmp_path / "net.pt", k=4, input_shape=(1, 2, 3), method=method)  # type: ignore[arg-type]
        for row, first, end in rows_of(strict(report)):
            assert_honest(row, precise_values(net[first:end], [(2, 3), (2, 4)][first:end]), 4, 1e-70)


# --- tensors -----------------------------------------------------------------------------------------------------


def extreme(rng: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    weight = rng.standard_normal(shape)
    tiny = max(info.smallest_normal * info.eps, TINY)
    # A float64 matrix of largest numbers has values beyond float64.
    most = info.max / 64 if dtype == torch.float64 else info.max
    match rng.integers(7):
        case 0:
            weight = most * np.sign(weight)
        case 1:
            weight = tiny * rng.integers(-3, 4, shape)
        case 2:
            weight = weight / np.abs(weight).max() * most
        case 3:
            weight *= 10.0 ** rng.uniform(math.log10(tiny), math.log10(info.max) - 2, shape)
        case 4:
            weight = np.outer(weight[:, 0], weight[0])
        case 5:
            weight = 1.0 + info.eps * rng.integers(0, 2, shape)
        case 6:
            weight *= 0.0
    return torch.from_numpy(weight).to(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_matrices_near_the_ends_of_their_type(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "net.safetensors"
    for seed in range(40):
        rng = np.random.default_rng(seed)
        shape = [(1, 1), (1, 5), (5, 1), (3, 3), (6, 4), (2, 7)][int(rng.integers(6))]
        weight = extreme(rng, shape, dtype)
        if not torch.isfinite(weight).all():
            continue
        save_file({"fc.weight": weight}, path)
        k, method = int(rng.choice([1, 4, 99])), str(rng.choice(["auto", "lanczos", "power"]))
        (row,) = strict(spectool.inspect(path, k=k, method=method))["rows"]  # type: ignore[arg-type]
        assert_honest(row, digits(mpmath.matrix(weight.double().tolist())), k, 1e-70)


def test_onnx_convolutions_with_batch_norms(tmp_path: Path) -> None:
    compared = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        inputs, outputs, n = (int(value) for value in rng.choice([1, 2, 5], 3))
        kernel, stride, dilation = (int(rng.choice(options)) for options in ([1, 2, 3], [1, 2, 5], [1, 2, 7]))
        pads = (int(rng.choice([0, 1, 6])), int(rng.choice([0, 1, 6])))
        if n + sum(pads) <= dilation * (kernel - 1):
            continue
        weight = rng.standard_normal((outputs, inputs, kernel)) * 10.0 ** rng.uniform(
            -10, 10, (outputs, 1, 1)
        )
        epsilon = float(np.float32(rng.choice([0.0, 1e-12, 1e-5])))
        tensors: dict[str, Array] = {
            "w": weight.astype(np.float32),
            "g": rng.choice([0, -1, 1e10, 1e-30, -3e38, 1e-45], outputs).astype(np.float32),
            "z": np.zeros(outputs, np.float32),
            "v": rng.choice([0, 1e-30, 1e-45, 1e30, 2], outputs).astype(np.float32),
        }
        conv = {"strides": [stride], "dilations": [dilation], "pads": list(pads), "kernel_shape": [kernel]}
        nodes = [
            node("Conv", "x w", "y", **conv),
            node("BatchNormalization", "y g z z v", "o", epsilon=epsilon),
        ]
        made = onnx_models.model(onnx_models.graph(nodes, {"x": (1, inputs, n)}, "o", tensors))
        (tmp_path / "net.onnx").write_bytes(made.SerializeToString())
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = tensors["g"].astype(float) / np.sqrt(tensors["v"].astype(float) + epsilon)
        plain = conv_matrix(tensors["w"].astype(float), (n,), (stride,), (pads,), (dilation,))
        copies = len(plain) // outputs
        for row in strict(spectool.inspect(tmp_path / "net.onnx", k=99))["rows"]:
            if "g" in row["weights"] and not np.isfinite(scale).all():
                assert row["status"] == "failed"
                continue
            matrix = plain if "w" in row["weights"] else np.eye(len(plain))
            if "g" in row["weights"]:
                matrix = matrix * np.repeat(scale, copies)[:, None]
            assert_honest(row, dense_values(matrix).tolist(), 99, 1e-13)
            compared += 1
    assert compared > 60


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails_alone(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "net.safetensors"
    broken = torch.ones(3, 3)
    broken[1, 2] = bad
    save_file({"a.weight": broken, "b.weight": torch.eye(3) * 0.5, "b.bias": torch.full((3,), bad)}, path)
    failed, fine = strict(spectool.inspect(path))["rows"]
    assert (failed["status"], failed["sigma"], failed["upper"]) == ("failed", [], None)
    assert "1 NaN or infinite value" in failed["note"]
    assert_honest(fine, [0.5] * 3, 8, 0.0)
    found = spectool.check(path, 1.0)
    strict(found)
    assert [row.verdict for row in found.rows] == ["undecided", "proven"]
    clipped = spectool.clip(path, max=0.25, dry_run=True)
    strict(clipped)
    assert [row.action for row in clipped.rows] == ["refused", "clipped"]


@torch.no_grad()
def test_clip_says_what_would_become_of_them(tmp_path: Path) -> None:
    path, clipped = tmp_path / "net.pt", 0
    for rng, net, shapes in nets(range(2000, 2024), most=3):
        torch.save(net, path)
        before, limit = path.read_bytes(), float(10.0 ** rng.uniform(-3, 3))
        report = spectool.clip(path, max=limit, dry_run=True, input_shape=(1, *shapes[0]))
        assert path.read_bytes() == before
        for row, first, end in rows_of(strict(report)):
            matrix = matrix_of(net[first:end], shapes[first])
            if row["before"] is None or not np.isfinite(matrix).all():
                assert not np.isfinite(matrix).all() or row["action"] == "listed"
                continue
            true = float(dense_values(matrix)[0])
            assert row["before"]["lower"] <= true * (1 + 1e-13)
            assert true * (1 - 1e-13) <= row["before"]["upper"]
            if row["action"] == "clipped":
                clipped += 1
                assert row["after"]["lower"] <= limit
                assert row["after"]["upper"] <= limit * (1 + 1e-9)
            if row["action"] == "kept":
                assert true <= limit * (1 + 1e-9)
    assert clipped >= 5
