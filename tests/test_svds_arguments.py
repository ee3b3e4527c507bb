"""``svds``: which arguments and which operators are refused, and the edges of what is not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import case_named, select
from layers import gaussian

from spectool.errors import OperatorError, UsageError
from spectool.linear import (
    Composed,
    ConvGeometry,
    ConvMap,
    DiagonalMap,
    FunctionMap,
    LinearMap,
    MatrixMap,
    Scaled,
    SeparableMap,
)
from spectool.spectrum import svds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": -3}, "k must be at least 1, got -3"),
        ({"k": True}, "k must be an integer, got True"),
        ({"k": 2.0}, "k must be an integer, got 2.0"),
        ({"k": "8"}, "k must be an integer, got '8'"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"method": None}, "unknown method None"),
        ({"tol": -1e-5}, "tol must lie between 0 and 1, got -1e-05"),
        ({"tol": 0}, "tol must lie between 0 and 1, got 0"),
        ({"tol": math.nan}, "tol must lie between 0 and 1, got nan"),
        ({"tol": True}, "tol must lie between 0 and 1, got True"),
        ({"tol": "1e-5"}, "tol must lie between 0 and 1, got '1e-5'"),
        ({"max_matvecs": 0}, "max_matvecs must be at least 1, got 0"),
        ({"max_matvecs": 1.5}, "max_matvecs must be an integer, got 1.5"),
        ({"certify": 1}, "certify must be True or False, got 1"),
        ({"vectors": "yes"}, "vectors must be True or False, got 'yes'"),
        ({"seed": -1}, r"seed must be between 0 and 2\*\*63 - 1, got -1"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"progress": 3}, "progress must be callable, got int"),
    ],
)
def test_unusable_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        svds(MatrixMap(gaussian(5, 4)), **options)


def test_unusable_operator() -> None:
    with pytest.raises(UsageError, match="svds needs a LinearMap, got Tensor"):
        svds(gaussian(5, 4))  # type: ignore[arg-type]
    with pytest.raises(OperatorError, match=r"the operator is empty: \(0, 4\) to \(0, 4\)"):
        svds(FunctionMap(lambda x: 2 * x, (0, 4)))


def test_numpy_integers_are_integers() -> None:
    assert len(svds(MatrixMap(gaussian(5, 4)), np.int64(2), seed=np.int32(3)).values) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["auto", "exact", "lanczos"])
def test_k_is_clamped_with_a_note(method: str) -> None:
    spectrum = svds(MatrixMap(gaussian(5, 4)), 9, method=method)  # type: ignore[arg-type]
    assert len(spectrum.values) == len(spectrum.lower) == len(spectrum.upper) == 4
    assert "k = 9 clamped to 4, the smaller side" in spectrum.note
    assert "clamped" not in svds(MatrixMap(gaussian(5, 4)), 4).note


def _with(weight: torch.Tensor, value: float, count: int) -> torch.Tensor:
    weight = weight.clone()
    weight.flatten()[:count] = value
    return weight


@pytest.mark.parametrize(
    ("A", "message"),
    [
        (MatrixMap(_with(gaussian(6, 5), math.nan, 1)), "1 of 30 weights are NaN or infinite"),
        (MatrixMap(_with(gaussian(6, 5), math.inf, 3)), "3 of 30 weights are NaN or infinite"),
        (
            ConvMap(_with(gaussian(2, 2, 3), -math.inf, 2), (2, 9), ConvGeometry.plain(1)),
            "2 of 12 weights are NaN or infinite",
        ),
        (
            Composed(DiagonalMap(torch.tensor([1.0, math.nan]), (2,)), MatrixMap(gaussian(2, 3))),
            "1 of 8 weights are NaN or infinite",
        ),
        (Scaled(DiagonalMap(torch.tensor([math.nan]), (1,)), 2.0), "1 of 1 weights are NaN or infinite"),
        (SeparableMap(2, (torch.tensor([[math.inf]]),)), "1 of 1 weights are NaN or infinite"),
        (FunctionMap(lambda x: x / 0.0, (3,)), "the operator gives NaN or infinite values"),
    ],
    ids=["nan", "inf", "conv", "chain", "scaled", "separable", "function"],
)
def test_weights_that_are_no_numbers(A: LinearMap, message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        svds(A, 2)


@pytest.mark.parametrize("method", ["auto", "exact", "lanczos", "power", "powerqr"])
@pytest.mark.parametrize("name", [str(case.name) for case in select("zero")])
def test_zero_operators_have_zeros(method: str, name: str) -> None:
    A = case_named(name).build()
    spectrum = svds(A, 3, method=method)  # type: ignore[arg-type]
    assert set(spectrum.values) == set(spectrum.lower) == set(spectrum.upper) == {0.0}
    assert spectrum.converged
    assert "zero operator" in spectrum.note


def test_large_zero_matrix() -> None:
    spectrum = svds(MatrixMap(torch.zeros(1500, 1300)), 2)
    assert spectrum.values == (0.0, 0.0)
    assert spectrum.upper == (0.0, 0.0)


@pytest.mark.parametrize("exponent", [-300, -100, 100, 300])
def test_extreme_float64_weights(exponent: int) -> None:
    weight = gaussian(30, 20).double()
    plain = np.linalg.svd(weight.numpy(), compute_uv=False)
    for A in (
        MatrixMap(weight * 10.0**exponent),
        ConvMap(weight[..., None] * 10.0**exponent, (20, 3), ConvGeometry.plain(1)),
    ):
        spectrum = svds(A, 2, method="auto")
        assert spectrum.values[0] == pytest.approx(plain[0] * 10.0**exponent, rel=1e-11)
        assert spectrum.lower[0] <= plain[0] * 10.0**exponent * (1 + 1e-12)
        assert spectrum.upper[0] >= plain[0] * 10.0**exponent * (1 - 1e-12)
