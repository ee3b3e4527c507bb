"""The table of operators that every contract runs over. A new kind of operator is one more row.

Each ``Case`` builds its map (float32 arithmetic) and, independently of the package, its dense float64 matrix
(``dense.py``). Use ``pytest.mark.parametrize("case", CASES, ids=str)``, or ``select("conv", "stride")`` for
those that carry every one of some tags. The matrices are here, convolutions in ``cases_conv.py``, the rest in
``cases_made.py``.

Tags: the kind (``linear``, ``conv2d``, ``conv_transpose1d``, ``diagonal``, ``avgpool``, ``separable``,
``composed``, ``function``…), ``conv``/``conv_transpose``, the padding mode, ``stride``, ``dilation``, ``groups``,
``half``, ``scale``, ``zero``, ``rank``, ``vector``, ``multiplicity``, ``cluster``, ``graded``, ``prescribed``,
``structured``, ``reference``.
"""

from __future__ import annotations

from collections.abc import Sequence

import cases_conv
import cases_made
import numpy as np
import torch
from cases_base import Case, double, gaussian, rng, row
from dense import spectrum_matrix

from spectool.linear import MatrixMap

__all__ = ["CASES", "Case", "case_named", "select"]

CASES: list[Case] = []


def _linear(name: str, weight: torch.Tensor, *tags: str) -> None:
    CASES.append(row(f"linear {name}", lambda: MatrixMap(weight), lambda: double(weight), tags))


def _prescribed(name: str, m: int, n: int, values: Sequence[float], *tags: str) -> None:
    # Stored in float64: gaps of 1e-8 would not survive a float32 weight.
    weight = torch.from_numpy(spectrum_matrix(rng(name), m, n, values))
    _linear(name, weight, "prescribed", *tags)


_linear("tall", gaussian("tall", 120, 40))
_linear("wide", gaussian("wide", 40, 120))
_linear("square", gaussian("square", 64, 64))
_linear("1xN", gaussian("1xN", 1, 50), "vector")
_linear("Nx1", gaussian("Nx1", 50, 1), "vector")
_linear("1x1", torch.tensor([[-3.0]]), "vector")
_linear("large tall", gaussian("large tall", 600, 300))
_linear("large wide", gaussian("large wide", 250, 600))
_linear("zero", torch.zeros(30, 20), "zero")
_linear("one row", torch.zeros(30, 20).index_fill(0, torch.tensor([7]), 1.0), "rank")
_linear("rank 5", gaussian("left", 60, 5) @ gaussian("right", 5, 50), "rank")
_linear("identity", torch.eye(40), "multiplicity")
_linear("minus identity", -torch.eye(40), "multiplicity")
_linear("permutation", torch.eye(48)[torch.from_numpy(rng("permutation").permutation(48))], "multiplicity")
_linear("fp16", gaussian("fp16", 80, 60, scale=0.02, dtype=torch.float16), "half")
_linear("bf16", gaussian("bf16", 80, 60, scale=0.02, dtype=torch.bfloat16), "half")
_linear("fp64", gaussian("fp64", 80, 60, scale=0.02, dtype=torch.float64))
_linear("stored by columns", gaussian("stored by columns", 70, 90).T)
_linear("bf16 by columns", gaussian("bf16 by columns", 70, 90, dtype=torch.bfloat16).T, "half")
_linear("slice of a larger one", gaussian("slice", 90, 120)[10:70, 20:100])
for _exponent in (-33, -20, 20, 25):
    _linear(f"scale 1e{_exponent}", gaussian(f"scale {_exponent}", 70, 50, scale=10.0**_exponent), "scale")
_linear(
    "graded rows 1e-20..1e20",
    torch.from_numpy(
        np.logspace(-20, 20, 50)[:, None] * rng("graded rows").standard_normal((50, 40))
    ).float(),
    "scale",
    "graded",
)
_prescribed("graded 1..1e-12", 60, 60, np.logspace(0, -12, 60).tolist(), "graded")
_prescribed("heavy tail", 150, 100, (1 / np.arange(1, 101)).tolist())
_prescribed("flat tail", 120, 100, [2.0, *np.linspace(1.0, 0.9, 99)])
_prescribed("one dominant", 80, 60, [1e6, *np.linspace(1.0, 0.1, 59)])
_prescribed("pair 1e-8 apart", 90, 90, [1.0, 1 - 1e-8, *np.linspace(0.9, 0.01, 88)], "cluster")
_prescribed(
    "12-fold cluster 1e-8 apart",
    200,
    150,
    [*(1 - 1e-8 * np.arange(12)), *np.linspace(0.95, 0.05, 138)],
    "cluster",
)
_prescribed("12-fold exact", 200, 150, [1.0] * 12 + np.linspace(0.9, 0.05, 138).tolist(), "multiplicity")
_prescribed(
    "20-fold below the top", 120, 100, [2.0, *[1.0] * 20, *np.linspace(0.5, 0.01, 79)], "multiplicity"
)
_prescribed("cluster 1e-4 apart", 150, 120, np.linspace(1.0, 0.9881, 120).tolist(), "cluster")
_prescribed("all equal", 80, 60, [3.0] * 60, "multiplicity")


CASES += cases_conv.CASES + cases_made.CASES


def select(*tags: str) -> list[Case]:
    """Cases that carry all of ``tags``."""
    return [case for case in CASES if case.tags.issuperset(tags)]


def case_named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)
