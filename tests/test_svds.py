"""``svds``: arguments, the choice of a method, every method over the table of operators, vectors, certificates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, case_named, select

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
    to_dense,
)
from spectool.progress import Step
from spectool.spectrum import Spectrum, svds


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def conv(*shape: int, n: int, **options: Any) -> ConvMap:
    settings = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "padding_mode": "zeros", **options}
    pads = ((settings["padding"],) * 2,) * 2
    geometry = ConvGeometry(
        (settings["stride"],) * 2,
        pads,
        (settings["dilation"],) * 2,
        settings["groups"],
        settings["padding_mode"],
    )
    return ConvMap(gaussian(*shape), (shape[1] * settings["groups"], n, n), geometry)


def assert_right(spectrum: Spectrum, case: Case, k: int, tolerance: float = 1e-6) -> None:
    """The promise: σ₁ … σ_k within 1e-6·σ₁ where converged, and inside their intervals always."""
    sigma = case.sigma()[:k]
    values, lower, upper = (
        np.array(entries) for entries in (spectrum.values, spectrum.lower, spectrum.upper)
    )
    slack = 1e-12 * sigma[0]
    assert len(values) == len(sigma)
    assert (lower <= sigma + slack).all()
    assert (sigma <= upper + slack).all()
    assert (lower <= values).all()
    assert (values <= upper).all()
    if spectrum.converged:
        assert np.abs(values - sigma).max() <= tolerance * sigma[0]
    if sigma[0] > 0 and spectrum.converged:
        assert 1 <= spectrum.multiplicity <= int((case.sigma() >= sigma[0] * (1 - 1e-6)).sum())


# --- every operator by every method (``auto`` is in test_exact.py) ---------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact(case: Case) -> None:
    spectrum = svds(case.build(), 8, method="exact")
    assert spectrum.converged
    assert spectrum.upper_kind == "exact"
    assert_right(spectrum, case, 8, 1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lanczos(case: Case) -> None:
    spectrum = svds(case.build(), 8, method="lanczos")
    assert spectrum.converged
    assert spectrum.method == "lanczos"
    assert_right(spectrum, case, 8)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", ["power", "powerqr"])
def test_power_methods_are_right_or_say_that_they_are_not(method: str, case: Case) -> None:
    spectrum = svds(case.build(), 2, method=method, max_matvecs=400)  # type: ignore[arg-type]
    assert spectrum.method == method
    assert_right(spectrum, case, 2)


# --- the choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("A", "method", "kind"),
    [
        (MatrixMap(gaussian(200, 90)), "dense", "exact"),
        (conv(8, 8, 3, 3, n=10), "dense", "exact"),
        (conv(8, 8, 1, 1, n=40, padding=0), "exact:non-overlapping", "exact"),
        (conv(6, 4, 3, 3, n=24), "lanczos", "probabilistic"),
        (conv(4, 4, 3, 3, n=40, padding=2, dilation=2), "lanczos", "symbol"),
        (conv(12, 6, 3, 3, n=24, groups=2), "lanczos", "probabilistic"),
    ],
    ids=["matrix", "small conv", "1x1", "large conv", "dilated", "groups"],
)
def test_choice_and_its_reason(A: LinearMap, method: str, kind: str) -> None:
    spectrum = svds(A, 2)
    assert spectrum.method == method
    assert spectrum.upper_kind in (kind, "symbol")
    assert spectrum.why
    assert spectrum.converged


def test_dilated_convolution_is_iterated_once_for_all_its_copies() -> None:
    """Four copies of one 28 × 28 problem: fewer applications, and the multiplicity for nothing."""
    A = conv(3, 3, 3, 3, n=48, padding=2, dilation=2)
    split, whole = svds(A, 4), svds(A, 4, method="lanczos")
    assert split.multiplicity == 4
    assert np.allclose(split.values, whole.values, rtol=1e-7)
    assert split.matvecs < whole.matvecs
    assert "4 independent problems, 1 of them different" in split.why


def test_groups_without_a_theorem_are_iterated_one_by_one() -> None:
    A = conv(4, 2, 3, 3, n=23, groups=2)
    found = svds(A, 6)
    own = [
        np.linalg.svd(
            to_dense(
                ConvMap(A.weight[2 * g : 2 * g + 2], (2, 23, 23), dataclasses.replace(A.geometry, groups=1))
            ),
            compute_uv=False,
        )[:6]
        for g in range(2)
    ]
    truth = np.sort(np.concatenate(own))[::-1][:6]
    assert np.allclose(found.values, truth, rtol=1e-7)
    assert (np.array(found.lower) <= truth * (1 + 1e-12)).all()
    assert (truth <= np.array(found.upper) * (1 + 1e-12)).all()


def test_many_similar_groups_are_iterated_together() -> None:
    weight = gaussian(1, 1, 3, 3).repeat(12, 1, 1, 1) * (1 + 1e-5 * torch.arange(12).reshape(12, 1, 1, 1))
    A = ConvMap(weight, (12, 36, 36), ConvGeometry((1, 1), ((1, 1),) * 2, (1, 1), 12))
    found = svds(A, 3)
    alone = svds(ConvMap(weight[-1:], (1, 36, 36), ConvGeometry((1, 1), ((1, 1),) * 2, (1, 1))), 1)
    assert found.method == "lanczos"
    assert found.values[0] == pytest.approx(alone.values[0], rel=1e-7)


def test_exact_lifts_the_size_limit_and_streams() -> None:
    A = conv(2, 2, 3, 3, n=23)  # 1058 on both sides: too large for auto
    assert svds(A, 2).method == "lanczos"
    exact = svds(A, 2, method="exact")
    truth = np.linalg.svd(to_dense(A).numpy(), compute_uv=False)[:2]
    assert exact.method == "dense"
    assert np.allclose(exact.values, truth, rtol=1e-9)


def test_exact_refuses_what_no_memory_holds() -> None:
    A = conv(64, 64, 3, 3, n=56)
    with pytest.raises(OperatorError, match=r"200704 × 200704 operator needs 322 GB"):
        svds(A, 2, method="exact")


def test_function_is_solved_in_float64_where_it_can_be_remade() -> None:
    weight = gaussian(5, 4, 3, 3).double()

    def make(dtype: torch.dtype, device: object) -> Any:
        return lambda x: torch.nn.functional.conv2d(x, weight.to(dtype), padding=1) + 7.0

    A = FunctionMap(make(torch.float32, None), (4, 8, 8), remake=make)
    B = ConvMap(weight, (4, 8, 8), ConvGeometry((1, 1), ((1, 1),) * 2, (1, 1)))
    stuck = FunctionMap(make(torch.float32, None), (4, 8, 8))
    exact, remade, rough = svds(B, 4), svds(A, 4), svds(stuck, 4)
    assert remade.method == "dense"
    assert remade.matvecs == 256
    assert np.allclose(remade.values, exact.values, rtol=1e-13)
    truth = np.array(exact.values)
    assert (np.array(rough.lower) <= truth).all()
    assert (truth <= np.array(rough.upper)).all()
    assert rough.upper[0] - rough.lower[0] > 1e-7 * truth[0]  # float32 cannot promise more
    assert np.allclose(rough.values, truth, rtol=1e-6)


# --- certificates and intervals ----------------------------------------------------------------------------------


def test_certificate_is_deterministic_and_estimate_is_the_same() -> None:
    A = conv(6, 4, 3, 3, n=24)
    plain, proven = svds(A, 4), svds(A, 4, certify=True)
    assert proven.upper_kind == "symbol"
    assert proven.values == plain.values
    assert proven.lower == plain.lower
    assert all(a <= b * (1 + 1e-12) for a, b in zip(plain.upper, proven.upper, strict=True))
    assert proven.upper[0] <= 1.01 * proven.values[0]


@pytest.mark.parametrize("method", ["lanczos", "power", "powerqr"])
def test_unconverged_runs_still_enclose(method: str) -> None:
    case = case_named("linear cluster 1e-4 apart")
    spectrum = svds(case.build(), 4, method=method, max_matvecs=40)  # type: ignore[arg-type]
    assert not spectrum.converged
    assert_right(spectrum, case, 4)
    assert math.isfinite(spectrum.upper[0])


@pytest.mark.parametrize("case", select("conv", "stride"), ids=str)
def test_certified_lanczos_encloses(case: Case) -> None:
    spectrum = svds(case.build(), 3, method="lanczos", certify=True)
    assert spectrum.upper_kind not in ("probabilistic", "none")
    assert_right(spectrum, case, 3)


def test_lists_descend_and_contain_their_values() -> None:
    spectrum = svds(conv(6, 4, 3, 3, n=24), 12)
    for entries in (spectrum.values, spectrum.lower, spectrum.upper):
        assert list(entries) == sorted(entries, reverse=True)
    assert all(a <= b <= c for a, b, c in zip(spectrum.lower, spectrum.values, spectrum.upper, strict=True))


def test_frobenius_norm_leaves_no_room_for_further_values() -> None:
    """Rank 1 in disguise: what is left of the Frobenius norm bounds σ₂ … even where the solver proves less."""
    weight = gaussian(1500, 1) @ gaussian(1, 1400, seed=1)
    spectrum = svds(MatrixMap(weight.double()), 3, method="lanczos")
    assert spectrum.upper[1] <= 1e-4 * spectrum.values[0]


@pytest.mark.parametrize(
    "name", ["linear tall", "conv2d 3x3 stride 2", "conv2d circular", "diagonal last axis"]
)
def test_frobenius_norm(name: str) -> None:
    case = case_named(name)
    assert svds(case.build(), 1).fro == pytest.approx(np.linalg.norm(case.dense()), rel=1e-12)


# --- vectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "exact", "lanczos"])
@pytest.mark.parametrize(
    "name",
    [
        "linear wide",
        "linear 12-fold exact",
        "conv2d 3x3 stride 2",
        "conv_transpose2d upsampler 4x4 s2",
        "conv2d 1x1",
    ],
)
def test_vectors_satisfy_their_equations(method: str, name: str) -> None:
    case = case_named(name)
    A, matrix = case.build(), case.dense()
    spectrum = svds(A, 3, method=method, vectors=True)  # type: ignore[arg-type]
    assert spectrum.left is not None
    assert spectrum.right is not None
    assert tuple(spectrum.left.shape) == (3, *A.out_shape)
    assert tuple(spectrum.right.shape) == (3, *A.in_shape)
    u, v = spectrum.left.reshape(3, -1).double().numpy(), spectrum.right.reshape(3, -1).double().numpy()
    sigma = np.array(spectrum.values)
    assert np.abs(u @ u.T - np.eye(3)).max() < 1e-9
    assert np.abs(v @ v.T - np.eye(3)).max() < 1e-9
    assert np.abs(v @ matrix.T - sigma[:, None] * u).max() < 2e-5 * sigma[0]
    assert np.abs(u @ matrix - sigma[:, None] * v).max() < 2e-5 * sigma[0]
    assert max(spectrum.residuals) <= 1e-5
    assert_right(spectrum, case, 3)


def test_vectors_of_a_structured_operator_keep_the_theorem() -> None:
    A = conv(8, 6, 1, 1, n=16, padding=0)
    plain, vectors = svds(A, 3), svds(A, 3, vectors=True)
    assert vectors.values == plain.values
    assert vectors.multiplicity == 256
    assert vectors.upper_kind == "exact"
    assert vectors.right is not None


def test_no_vectors_unless_asked_for() -> None:
    spectrum = svds(MatrixMap(gaussian(20, 10)), 2)
    assert spectrum.left is None
    assert spectrum.right is None


# --- arguments ---------------------------------------------------------------------------------------------------


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


# --- determinism, progress, side effects ----------------------------------------------------------------------------


def test_same_seed_same_bits() -> None:
    A = conv(6, 4, 3, 3, n=24)
    assert svds(A, 3, seed=5) == svds(A, 3, seed=5)
    assert svds(A, 3, seed=5).seed == 5
    assert svds(A, 3, seed=6).values == pytest.approx(svds(A, 3, seed=5).values, rel=1e-9)


def test_progress_reports_matvecs_that_grow() -> None:
    steps: list[Step] = []
    spectrum = svds(conv(6, 4, 3, 3, n=24), 3, progress=steps.append)
    spent = [step.matvecs for step in steps]
    assert steps
    assert spent == sorted(spent)
    assert spent[-1] <= spectrum.matvecs


def test_global_state_and_weights_are_left_alone() -> None:
    A = conv(6, 4, 3, 3, n=24)
    before, state = A.weight.clone(), torch.get_rng_state()
    precision, grad = torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    svds(A, 2, certify=True)
    assert torch.equal(A.weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_float32_matmul_precision(), torch.is_grad_enabled()) == (precision, grad)


def test_weights_that_want_gradients_are_fine() -> None:
    weight = torch.nn.Parameter(gaussian(6, 4, 3, 3))
    A = ConvMap(weight, (4, 8, 8), ConvGeometry((1, 1), ((1, 1),) * 2, (1, 1)))
    for method in ("auto", "lanczos"):
        spectrum = svds(A, 2, method=method, certify=True)  # type: ignore[arg-type]
        assert weight.grad is None
        assert math.isfinite(spectrum.upper[0])
