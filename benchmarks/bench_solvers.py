"""Lanczos, power iteration, PowerQR and SciPy's ARPACK side by side: applications, time and true error.

    python benchmarks/bench_solvers.py [--quick] [-o results/solvers.json]

One run, one thread, one machine: trust ratios, not seconds. ``lanczos`` always includes its verification and its
float64 polish. ARPACK appears twice: as most people call it, ``svds(A, k, tol=1e-5)`` on float32 products, and at
equal accuracy, i.e. on float64 products with the loosest tolerance of a ladder whose true error is no larger than
that of ``lanczos`` (or 1e-9). The power methods run to a residual of 1e-3, where ``lanczos`` is run again at that
tolerance: they do not reach 1e-5 on most of these operators.

True values: a theorem where there is one (dilation, depthwise, 1×1, prescribed spectrum), a dense float64
eigenvalue problem up to 2500 rows, else two float64 ARPACK runs to machine precision from different starts that
must agree to 1e-11.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh, svds

import spectool
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
from spectool.spectrum.estimate import Estimate
from spectool.spectrum.lanczos import lanczos
from spectool.spectrum.power import power, powerqr
from spectool.spectrum.probabilistic import enclose

K = 8
LADDER = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
QUICK = (
    "conv 3x3 s2 64-128 n16",
    "linear 1000x512 gaussian",
    "12-fold cluster gap 1e-8",
    "1x1 conv, generic",
)


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


# --- runs ---------------------------------------------------------------------------------------------------


def arpack(A: LinearMap, k: int, tol: float, dtype: torch.dtype) -> tuple[np.ndarray | None, int]:
    """Return (values or None where it gave up, applications)."""
    A, count = A.to(dtype=dtype), 0
    m, n = size(A)

    def apply(f: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> Callable[[Any], Any]:
        def product(x: np.ndarray) -> np.ndarray:
            nonlocal count
            count += 1
            return f(torch.from_numpy(np.ascontiguousarray(x)).reshape(1, *shape)).reshape(-1).numpy()

        return product

    operator = LinearOperator(
        (m, n),
        matvec=apply(A.matvec, A.in_shape),
        rmatvec=apply(A.rmatvec, A.out_shape),
        dtype=np.float32 if dtype == torch.float32 else np.float64,
    )
    start = np.random.default_rng(0).standard_normal(min(m, n)).astype(operator.dtype)
    try:
        _, values, _ = svds(operator, k=k, tol=tol, v0=start)
    except ArpackNoConvergence:
        return None, count
    return np.sort(values)[::-1], count


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Return (result, least wall time)."""
    best, result = math.inf, None
    for _ in range(repeats):
        begin = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - begin)
    return result, best


def error(values: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(values - truth[: len(values)]).max() / truth[0])


def own(run: Callable[[], Estimate], truth: np.ndarray, repeats: int) -> dict[str, Any]:
    estimate, seconds = timed(run, repeats)
    lower, upper = enclose(estimate)
    return {
        "matvecs": estimate.matvecs,
        "seconds": seconds,
        "error": error(estimate.values.numpy(), truth),
        "converged": estimate.converged,
        "lower_1": lower[0] / truth[0] - 1,
        "upper_1": upper[0] / truth[0] - 1,
        "encloses": all(
            low <= true * (1 + 1e-12) and true <= high * (1 + 1e-12)
            for low, true, high in zip(lower, truth, upper, strict=False)
        ),
    }


def theirs(A: LinearMap, k: int, truth: np.ndarray, goal: float, repeats: int) -> dict[str, Any]:
    """ARPACK as called by most, and at equal accuracy."""
    (values, count), seconds = timed(lambda: arpack(A, k, 1e-5, torch.float32), repeats)
    out: dict[str, Any] = {
        "usual": {
            "matvecs": count,
            "seconds": seconds,
            "error": None if values is None else error(values, truth),
        }
    }
    for tol in LADDER:
        (values, count), seconds = timed(lambda tol=tol: arpack(A, k, tol, torch.float64), 1)
        if values is not None and error(values, truth) <= goal:
            if repeats > 1:
                seconds = min(
                    seconds, timed(lambda tol=tol: arpack(A, k, tol, torch.float64), repeats - 1)[1]
                )
            out["equal"] = {"matvecs": count, "seconds": seconds, "error": error(values, truth), "tol": tol}
            return out
    out["equal"] = None
    return out


def bench(operator: Operator, quick: bool) -> dict[str, Any]:
    A, truth = operator.build(), operator.truth()
    repeats = 1 if quick else 3
    lanczos(A, 1)
    row: dict[str, Any] = {"operator": operator.name, "size": list(size(A))}
    for k in (K, 1):
        mine = own(lambda k=k: lanczos(A, k), truth, repeats)
        row[f"k{k}"] = {"lanczos": mine, "arpack": theirs(A, k, truth, max(1e-9, mine["error"]), repeats)}
    row["to_1e-3"] = {
        "lanczos": own(lambda: lanczos(A, K, tol=1e-3), truth, repeats),
        "powerqr": own(lambda: powerqr(A, K, tol=1e-3), truth, 1),
        "power": own(lambda: power(A, K, tol=1e-3), truth, 1),
    }
    return row


# --- report -------------------------------------------------------------------------------------------------


def ratio(row: dict[str, Any], path: tuple[str, ...], other: tuple[str, ...], what: str) -> float | None:
    """First over second; None where one is missing."""

    def find(keys: tuple[str, ...]) -> Any:
        here: Any = row
        for key in keys:
            here = None if here is None else here[key]
        return here

    mine, their = find(path), find(other)
    return None if mine is None or their is None else mine[what] / their[what]


COMPARED = [
    ("k8 lanczos / ARPACK tol=1e-5", ("k8", "lanczos"), ("k8", "arpack", "usual")),
    ("k8 lanczos / ARPACK equal accuracy", ("k8", "lanczos"), ("k8", "arpack", "equal")),
    ("k1 lanczos / ARPACK tol=1e-5", ("k1", "lanczos"), ("k1", "arpack", "usual")),
    ("k1 lanczos / ARPACK equal accuracy", ("k1", "lanczos"), ("k1", "arpack", "equal")),
    ("to 1e-3: powerqr / lanczos", ("to_1e-3", "powerqr"), ("to_1e-3", "lanczos")),
    ("to 1e-3: power / lanczos", ("to_1e-3", "power"), ("to_1e-3", "lanczos")),
]


def show(row: dict[str, Any]) -> None:
    print(f"\n{row['operator']}  {row['size'][0]} x {row['size'][1]}")
    lines: list[tuple[str, dict[str, Any] | None]] = []
    for k in (K, 1):
        part = row[f"k{k}"]
        equal = part["arpack"]["equal"]
        label = "ARPACK equal accuracy" + (f" (tol {equal['tol']:g})" if equal else "")
        lines += [
            (f"k={k} lanczos", part["lanczos"]),
            (f"k={k} ARPACK tol=1e-5", part["arpack"]["usual"]),
            (f"k={k} {label}", equal),
        ]
    lines += [(f"k={K} {name} to 1e-3", result) for name, result in row["to_1e-3"].items()]
    for label, result in lines:
        if result is None:
            print(f"  {label:38s} never that accurate")
            continue
        wrong = "failed" if result["error"] is None else f"{result['error']:.1e}"
        extra = ""
        if "converged" in result:
            extra = f"  sigma_1 in [{result['lower_1']:+.0e}, {result['upper_1']:+.0e}]"
            extra += "" if result["converged"] else "  not converged"
            extra += "" if result["encloses"] else "  INTERVAL WRONG"
        print(
            f"  {label:38s} {result['matvecs']:6d} applications {result['seconds']:8.3f} s  error {wrong}{extra}"
        )


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    medians: dict[str, Any] = {}
    for label, path, other in COMPARED:
        medians[label] = {}
        for what in ("matvecs", "seconds"):
            ratios = [r for r in (ratio(row, path, other, what) for row in rows) if r is not None]
            medians[label][what] = statistics.median(ratios) if ratios else None
        medians[label]["compared"] = len(ratios)
    slower = {
        label: [
            row["operator"]
            for row in rows
            if (value := ratio(row, path, other, "matvecs")) is not None and value > 1
        ]
        for label, path, other in COMPARED[:4]
    }
    wrong = {
        f"k{k}": [row["operator"] for row in rows if (row[f"k{k}"]["arpack"]["usual"]["error"] or 0) > 1e-6]
        for k in (K, 1)
    }
    worst = max(row["k8"]["lanczos"]["error"] for row in rows)
    return {
        "median_ratios": medians,
        "lanczos_takes_more_applications": slower,
        "arpack_silently_wrong_by_more_than_1e-6": wrong,
        "worst_lanczos_error_k8": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four operators, one repetition")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).parent / "results" / "solvers.json"
    )
    options = parser.parse_args()
    if any(os.environ.get(name) != "1" for name in THREADS):
        # SciPy's BLAS reads these once, when it is loaded.
        environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    torch.set_num_threads(1)
    chosen = [op for op in operators() if not options.quick or op.name in QUICK]
    rows = []
    for operator in chosen:
        rows.append(bench(operator, options.quick))
        show(rows[-1])
    summary = summarise(rows)
    print()
    for label, medians in summary["median_ratios"].items():
        if medians["matvecs"] is not None:
            print(
                f"median over {medians['compared']:2d}: {label:40s} applications {medians['matvecs']:6.2f}"
                f"   time {medians['seconds']:6.2f}"
            )
    for label, names in summary["lanczos_takes_more_applications"].items():
        print(f"more applications than ARPACK, {label}: {', '.join(names) or 'none'}")
    for k, names in summary["arpack_silently_wrong_by_more_than_1e-6"].items():
        print(f"ARPACK at tol=1e-5 off by more than 1e-6, {k}: {', '.join(names) or 'none'}")
    print(f"worst true error of lanczos at k = {K}: {summary['worst_lanczos_error_k8']:.1e} of sigma_1")
    document = {
        "benchmark": "solvers",
        "quick": options.quick,
        "versions": {
            "spectool": spectool.__version__,
            "torch": torch.__version__,
            "scipy": scipy.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "threads": 1,
        "summary": summary,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
