"""What clipping changes: scaling, FastClip, clip-and-crop by FFT, the symbol and the exact projection.

    python benchmarks/bench_clip.py [--quick] [-o results/clip.json]

Every method ends with σ₁ of the operator measured in float64 and one rescale to exactly c, a fraction of σ₁ of the
given weight, so that only the *change* ‖W′ − W‖/‖W‖ differs. ``lower`` is the dual bound: no weight that obeys changes
less. One run, one thread, one machine: trust ratios, not seconds.

Weights are seeded. "heavy" is trained-like: random orthonormal singular vectors of the kernel as a matrix
(out × in·k), singular values (1 + i)^−0.35; "gaussian" is independent normal.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spectool
from spectool.clip.bundle import Projection, bundle
from spectool.clip.family import ConvFamily, Family, MatrixFamily
from spectool.clip.published import fastclip, rescaled, scale, sedghi, svd_clip, top_value
from spectool.clip.symbol import exact_grid, project_measured, project_symbol
from spectool.errors import OperatorError
from spectool.linear import ConvGeometry

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
COLUMNS = ("scale", "fastclip", "sedghi", "sedghi60", "symbol", "exact")


# --- operators ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One operator and the fractions of σ₁ to clip to; a matrix has no geometry."""

    name: str
    weight: torch.Tensor
    in_shape: tuple[int, ...]
    geometry: ConvGeometry | None
    fractions: tuple[float, ...]
    quick: bool = False

    def family(self, part: torch.Tensor | None = None) -> Family:
        weight = self.weight if part is None else part
        if self.geometry is None:
            return MatrixFamily(weight)
        if part is None:
            return ConvFamily(weight, self.in_shape, self.geometry)
        channels = self.in_shape[0] // self.geometry.groups
        return ConvFamily(weight, (channels, *self.in_shape[1:]), replace(self.geometry, groups=1))


def heavy(*shape: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    columns = math.prod(shape[1:])
    rank = min(shape[0], columns)
    u = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, rank)))[0]
    return torch.from_numpy(((u * (1.0 + np.arange(rank)) ** -0.35) @ v.T).reshape(shape))


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def conv(pad: int, *, dims: int = 2, **options: Any) -> ConvGeometry:
    stride = options.pop("stride", 1)
    mode, transposed = options.pop("mode", "zeros"), options.pop("transposed", False)
    return ConvGeometry(
        (stride,) * dims,
        ((pad, pad),) * dims,
        (1,) * dims,
        options.pop("groups", 1),
        mode,
        transposed,
        (0,) * dims,
    )


def cases() -> list[Case]:
    both, high = (0.95, 0.8), (0.95,)
    return [
        Case("3x3 16-16 n12", heavy(16, 16, 3, 3, seed=1), (16, 12, 12), conv(1), both, True),
        Case("3x3 32-32 n14 gaussian", gaussian(32, 32, 3, 3, seed=3), (32, 14, 14), conv(1), both),
        Case("depthwise 3x3 64 n16", gaussian(64, 1, 3, 3, seed=6), (64, 16, 16), conv(1, groups=64), both),
        Case("groups 4, 3x3 64-64 n16", heavy(64, 16, 3, 3, seed=7), (64, 16, 16), conv(1, groups=4), high),
        Case(
            "reflect 3x3 32-32 n16", heavy(32, 32, 3, 3, seed=8), (32, 16, 16), conv(1, mode="reflect"), high
        ),
        Case(
            "ConvT 4x4 s2 32-16 n8",
            heavy(32, 16, 4, 4, seed=9),
            (32, 8, 8),
            conv(1, stride=2, transposed=True),
            high,
        ),
        Case("Conv1d k9 32-32 n64", heavy(32, 32, 9, seed=10), (32, 64), conv(4, dims=1), both, True),
        Case("linear 1000x512", heavy(1000, 512, seed=11), (512,), None, both, True),
        Case(
            "circular 3x3 32-32 n16",
            heavy(32, 32, 3, 3, seed=12),
            (32, 16, 16),
            conv(1, mode="circular"),
            both,
            True,
        ),
        Case("3x3 s2 64-128 n16", heavy(128, 64, 3, 3, seed=4), (64, 16, 16), conv(1, stride=2), both),
        Case("7x7 s2 3-64 n32", heavy(64, 3, 7, 7, seed=5), (3, 32, 32), conv(3, stride=2), both),
        Case("3x3 64-64 n16", heavy(64, 64, 3, 3, seed=2), (64, 16, 16), conv(1), both),
    ]


# --- runs ---------------------------------------------------------------------------------------------------


def symbol(case: Case, limit: float) -> Projection | None:
    """The symbol: one solve on the exact grid where circular, else two with σ₁ measured between."""
    geometry = case.geometry
    if geometry is None or geometry.padding_mode not in ("zeros", "circular"):
        return None
    grid = exact_grid(geometry, case.in_shape[1:], tuple(case.weight.shape[2:]))
    family = case.family()
    if grid is None:
        found = project_measured(case.weight, geometry, limit, lambda weight: top_value(family, weight))
    else:
        found = project_symbol(case.weight, geometry, limit, grid=grid)
    return Projection(found.weight, found.lower or 0.0, "symbol", found.iterations, family.applications)


def exact(case: Case, limit: float) -> Projection:
    """The projection: SVD of a matrix, else the bundle, group by group."""
    if case.geometry is None:
        return svd_clip(case.weight, limit)
    if case.geometry.groups == 1:
        return bundle(case.family(), limit)
    made = []
    for part in case.weight.chunk(case.geometry.groups):
        family = case.family(part)
        if top_value(family, part) <= limit:
            made.append(Projection(part, 0.0, "none", 0, family.applications))
        else:
            made.append(bundle(family, limit))
    return Projection(
        torch.cat([one.weight for one in made]),
        math.sqrt(sum(one.lower**2 for one in made)),
        "bundle, group by group",
        sum(one.iterations for one in made),
        sum(one.applications for one in made),
    )


def clip_and_crop(case: Case, limit: float, alternations: int) -> Projection | None:
    if case.geometry is None:
        return None
    try:
        return sedghi(case.weight, case.geometry, case.in_shape, limit, alternations=alternations)
    except OperatorError:
        return None


def bench(case: Case, fraction: float) -> dict[str, Any]:
    size = float(torch.linalg.vector_norm(case.weight))
    top = top_value(case.family(), case.weight)
    limit = fraction * top
    methods: dict[str, Callable[[], Projection | None]] = {
        "scale": lambda: scale(case.family(), limit),
        "fastclip": lambda: fastclip(case.family(), limit),
        "sedghi": lambda: clip_and_crop(case, limit, 1),
        "sedghi60": lambda: clip_and_crop(case, limit, 60),
        "symbol": lambda: symbol(case, limit),
        "exact": lambda: exact(case, limit),
    }
    row: dict[str, Any] = {"operator": case.name, "fraction": fraction, "sigma_1": top}
    lower = 0.0
    for name, method in methods.items():
        begin = time.perf_counter()
        found = method()
        seconds = time.perf_counter() - begin
        if found is None:
            row[name] = None
            continue
        weight = rescaled(case.family(), found.weight, limit)
        row[name] = {
            "change": float(torch.linalg.vector_norm(weight - case.weight)) / size,
            "seconds": seconds,
            "applications": found.applications,
            "iterations": found.iterations,
            "method": found.method,
        }
        lower = max(lower, found.lower / size)
    row["lower"] = lower
    return row


# --- report -------------------------------------------------------------------------------------------------


def show(row: dict[str, Any]) -> None:
    cells = [f"{row['operator']:24s} {row['fraction']:4.2f}"]
    cells += ["      - " if row[name] is None else f"{row[name]['change']:8.5f}" for name in COLUMNS]
    cells.append(f"{row['lower']:8.5f}")
    cells.append(f"{row['exact']['change'] / row['lower'] - 1:7.2%}")
    print("  ".join(cells), flush=True)


def show_costs(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'seconds / operator applications':30s} " + " ".join(f"{name:>16s}" for name in COLUMNS))
    for row in rows:
        cells = [
            "-" if row[name] is None else f"{row[name]['seconds']:.2f} / {row[name]['applications']}"
            for name in COLUMNS
        ]
        print(f"{row['operator']:25s} {row['fraction']:4.2f} " + " ".join(f"{cell:>16s}" for cell in cells))


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def ratios(name: str, what: str) -> list[float]:
        return [row[name][what] / row["exact"][what] for row in rows if row[name] and row["exact"][what]]

    loss = [row["exact"]["change"] / row["lower"] - 1 for row in rows]
    return {
        "exact_never_above_fastclip": all(
            row["exact"]["change"] <= row["fastclip"]["change"] * (1 + 1e-9) for row in rows
        ),
        "exact_never_above_scaling": all(
            row["exact"]["change"] <= row["scale"]["change"] * (1 + 1e-9) for row in rows
        ),
        "largest_gap_of_exact": max(loss),
        "median_change_over_exact": {
            name: float(np.median(ratios(name, "change"))) for name in COLUMNS if ratios(name, "change")
        },
        "median_seconds_over_exact": {
            name: float(np.median(ratios(name, "seconds"))) for name in COLUMNS if ratios(name, "seconds")
        },
    }


def write(path: Path, rows: list[dict[str, Any]], quick: bool) -> None:
    document = {
        "benchmark": "clip",
        "quick": quick,
        "versions": {
            "spectool": spectool.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "threads": 1,
        "summary": summarise(rows),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four operators")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "clip.json")
    options = parser.parse_args()
    if any(os.environ.get(name) != "1" for name in THREADS):
        # The BLAS reads these once, when it is loaded.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **dict.fromkeys(THREADS, "1")})
    torch.set_num_threads(1)
    print(
        f"{'change, by method':24s}    c  " + "  ".join(f"{name:>8s}" for name in (*COLUMNS, "lower", "gap"))
    )
    rows = []
    for case in cases():
        if case.quick or not options.quick:
            for fraction in case.fractions:
                rows.append(bench(case, fraction))
                show(rows[-1])
                write(options.output, rows, options.quick)  # after each: a run may be cut short
    show_costs(rows)
    print()
    for label, value in summarise(rows).items():
        print(f"{label}: {value}")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
