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
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from operators import K, Operator, operators
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, svds

import spectool
from spectool.linear import (
    LinearMap,
    size,
)
from spectool.spectrum.estimate import Estimate
from spectool.spectrum.lanczos import lanczos
from spectool.spectrum.power import power, powerqr
from spectool.spectrum.probabilistic import enclose

LADDER = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
QUICK = (
    "conv 3x3 s2 64-128 n16",
    "linear 1000x512 gaussian",
    "12-fold cluster gap 1e-8",
    "1x1 conv, generic",
)


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
