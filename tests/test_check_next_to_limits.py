"""Verdicts where the limit is σ₁ itself or a few units in the last place away: none may be wrong.

σ₁² is known from the construction as a fraction, so that it and a limit are compared without rounding.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from dense import Matrix
from safetensors.torch import save_file
from torch import nn

import spectool


def hadamard(n: int) -> Matrix:
    return np.ones((1, 1)) if n == 1 else np.kron(hadamard(n // 2), [[1.0, 1.0], [1.0, -1.0]])


_ROTATION = np.array([[1.0, 2.0, 2.0], [2.0, 1.0, -2.0], [2.0, -2.0, 1.0]])  # three times an orthogonal one

# Matrices of whole numbers, and the square of their σ₁.
KNOWN = {
    "diagonal": (np.diag([3.0, 2.0, 1.0]), 9),
    "permutation": (np.diag(2.0 ** np.arange(8))[np.random.default_rng(0).permutation(8)], 2**14),
    "hadamard 4": (hadamard(4), 4),
    "hadamard 8, irrational": (hadamard(8), 8),
    "half a hadamard": (hadamard(16)[:, :5], 16),
    "3-4-5": (np.kron([[3.0, -4.0], [4.0, 3.0]], np.diag([4.0, 2.0, 1.0])), 400),
    "rotated": (_ROTATION @ np.diag([7.0, 2.0, 1.0]) @ _ROTATION.T, 63**2),
    "rank one": (np.outer([3.0, 4.0], [5.0, 12.0]), 65**2),
    "column": (np.array([[3.0], [4.0]]), 25),
    "row of ones, irrational": (np.ones((1, 7)), 7),
    "ones": (np.ones((7, 7)), 49),
    "one": (np.ones((1, 1)), 1),
}


def around(value: float) -> list[float]:
    """A number and its neighbours, up to 64 units in the last place away."""
    unit = math.ulp(value)
    return [value + step * unit for step in (-64, -16, -4, -2, -1, 0, 1, 2, 4, 16, 64)]


def assert_never_wrong(verdicts: list[str], limits: list[float], square: Fraction) -> None:
    for verdict, limit in zip(verdicts, limits, strict=True):
        beyond = square > Fraction(limit) ** 2
        assert verdict != ("proven" if beyond else "violated"), limit


@pytest.mark.parametrize("name", KNOWN)
def test_verdicts_next_to_the_limit(tmp_path: Path, name: str) -> None:
    path = tmp_path / "net.safetensors"
    matrix, whole = KNOWN[name]
    for dtype, exponent in ((torch.float32, -140), (torch.float64, 990), (torch.bfloat16, 0)):
        weight = torch.from_numpy(matrix * 2.0**exponent).to(dtype)
        assert np.array_equal(weight.double().numpy(), matrix * 2.0**exponent)
        save_file({"fc.weight": weight.contiguous()}, path)
        square = whole * Fraction(2) ** (2 * exponent)
        limits = around(math.sqrt(whole) * 2.0**exponent)
        verdicts = [spectool.check(path, limit).rows[0].verdict for limit in limits]
        assert_never_wrong(verdicts, limits, square)
        far = [math.sqrt(whole) * 2.0**exponent * factor for factor in (1 - 1e-12, 1 + 1e-12)]
        assert [spectool.check(path, limit).rows[0].verdict for limit in far] == ["violated", "proven"]


@pytest.mark.parametrize(("scale", "variance"), [(3.0, 7.0), (-1.1, 0.3), (1e30, 1e-30), (1e-40, 3e38)])
def test_verdicts_next_to_the_limit_of_batch_norms(tmp_path: Path, scale: float, variance: float) -> None:
    path = tmp_path / "net.pt"
    for epsilon in (0.0, 1e-5):
        net = nn.Sequential(nn.BatchNorm1d(2, eps=epsilon), nn.Conv1d(2, 2, 1, bias=False)).eval()
        net[0].weight.data = torch.tensor([scale, 0.0])
        net[0].running_var.copy_(torch.tensor([variance, 1.0]))
        net[1].weight.data = torch.tensor([[3.0, 1.0], [4.0, 1.0]]).unsqueeze(2)
        torch.save(net, path)
        gamma, var = (Fraction(value[0].item()) for value in (net[0].weight.detach(), net[0].running_var))
        square = gamma**2 / (var + Fraction(epsilon))
        for kinds, factor in ((["batchnorm"], 1), ([], 25)):
            limits = around(float(mpmath.sqrt(mpmath.mpf(square.numerator) / square.denominator * factor)))
            verdicts = [
                spectool.check(
                    path, limit, kinds=kinds, input_shape=(1, 2, 3), level="layer" if kinds else "composed"
                )
                .rows[0]
                .verdict
                for limit in limits
            ]
            assert_never_wrong(verdicts, limits, square * factor)
            assert {"violated", "proven"} >= {verdicts[0], verdicts[-1]}
