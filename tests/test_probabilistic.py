"""Probabilistic bounds: never below the truth, as often wrong as they say, and tight where they can be."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dense import Matrix, spectrum_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from lanczos_tools import random_values

from spectool.linear import MatrixMap
from spectool.spectrum.estimate import Estimate
from spectool.spectrum.gram import Gram
from spectool.spectrum.hochstenbach import FAILURE, Sturm, hochstenbach, log_inverse_delta, reaches
from spectool.spectrum.krylov import Krylov
from spectool.spectrum.lanczos import lanczos
from spectool.spectrum.polish import polish
from spectool.spectrum.power import power, powerqr
from spectool.spectrum.probabilistic import enclose, upper
from spectool.spectrum.rounding import rounding_unit
from spectool.spectrum.starts import Stream, generator
from spectool.spectrum.verify import Check, complement_run

NEVER = ((0.0, 400),)  # a goal that is not met: run on


def operator(rng: np.random.Generator, values: Matrix, dtype: torch.dtype) -> Gram:
    matrix = spectrum_matrix(rng, len(values) + int(rng.integers(0, 9)), len(values), values.tolist())
    gram = Gram(MatrixMap(torch.from_numpy(matrix), dtype=dtype))
    gram.prescale(Stream(int(rng.integers(1 << 30))))
    return gram


def nothing(gram: Gram) -> torch.Tensor:
    return torch.empty(0, gram.size, dtype=gram.dtype)


def run(gram: Gram, steps: int, seed: int, failure: float, vectors: torch.Tensor | None = None) -> Check:
    rows = nothing(gram) if vectors is None else vectors
    source = Stream(seed)
    return complement_run(gram, rows, source, above=1e300, goals=((0.0, steps),), failure=failure)


def inflated(gram: Gram, bound: float, first: float) -> float:
    """The bound on σ with its rounding, as the callers form it."""
    return math.sqrt(bound + 2 * rounding_unit(gram) * first) * gram.unit


# --- the bound itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", range(4))
def test_never_below_the_truth(batch: int, dtype: torch.dtype) -> None:
    for draw in range(60):
        rng = np.random.default_rng([batch, draw])
        values = random_values(rng, int(rng.integers(8, 70)))
        gram = operator(rng, values, dtype)
        steps = int(rng.integers(1, 60))
        check = run(gram, steps, draw, FAILURE)
        first = (values[0] / gram.unit) ** 2
        assert inflated(gram, check.bound, first) >= values[0] * (1 - 1e-12), (draw, steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_never_below_the_truth_on_a_complement(dtype: torch.dtype) -> None:
    for draw in range(80):
        rng = np.random.default_rng([17, draw])
        values = random_values(rng, int(rng.integers(12, 60)))
        gram = operator(rng, values, dtype)
        basis = np.linalg.qr(rng.standard_normal((len(values), 5)))[0]
        matrix = (
            gram.map.to(dtype=torch.float64).matvec(torch.eye(len(values), dtype=torch.float64)).T.numpy()
        )
        truth = np.linalg.norm(matrix @ (np.eye(len(values)) - basis @ basis.T), 2)
        check = run(gram, int(rng.integers(1, 40)), draw, FAILURE, torch.from_numpy(basis.T))
        first = (values[0] / gram.unit) ** 2
        assert inflated(gram, check.bound, first) >= truth * (1 - 1e-9), draw


@pytest.mark.parametrize("failure", [0.3, 0.05])
def test_as_often_wrong_as_it_says(failure: float) -> None:
    # With so large a failure probability it must be wrong now and then: a bound that never is proves nothing here.
    wrong, draws = 0, 1200
    values = np.r_[1.0, np.linspace(0.8, 0.1, 29)]
    gram = operator(np.random.default_rng(5), values, torch.float64)
    for seed in range(draws):
        check = run(gram, 4, seed, failure / 0.9)
        wrong += math.sqrt(check.bound) * gram.unit < 1.0
    sigma = math.sqrt(failure * (1 - failure) / draws)
    assert wrong / draws <= failure / 0.9 + 4 * sigma
    assert wrong > 0.1 * failure * draws


def test_the_condition_is_on_the_start_vector_alone() -> None:
    # Just inside the condition the bound holds at every length; far outside it fails: δ is what it should be.
    n, lam = 40, np.r_[1.0, np.linspace(0.7, 0.05, 39)]
    delta = math.exp(-log_inverse_delta(n, FAILURE))
    for dtype, component, holds in [
        (torch.float64, 1.01 * delta, True),
        (torch.float32, 1.01 * delta, True),
        (torch.float64, 1e-6 * delta, False),
    ]:
        diagonal = torch.from_numpy(lam).to(dtype)
        start = np.random.default_rng(1).standard_normal(n)
        start *= math.sqrt(1 - component**2) / np.linalg.norm(start[1:])
        start[0] = component
        stub = Stub(diagonal, start)
        bounds = [
            complement_run(
                stub,
                torch.empty(0, n, dtype=dtype),
                Stream(0),
                above=1e300,
                goals=((0.0, j),),
                failure=FAILURE,
            ).bound
            for j in range(1, 30)
        ]
        slack = 60 * torch.finfo(dtype).eps
        assert all(bound >= 1 - slack for bound in bounds) == holds, dtype


class Stub(Gram):
    """A diagonal B with a start vector of our choice."""

    def __init__(self, diagonal: torch.Tensor, start: Matrix) -> None:
        self.diagonal, self.start = diagonal, torch.from_numpy(start).to(diagonal.dtype)[None]
        self.size = len(start)
        self.map = SimpleNamespace(dtype=diagonal.dtype, device=diagonal.device)  # type: ignore[assignment]

    def random(self, rows: int, source: Stream) -> torch.Tensor:
        return self.start.clone()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.diagonal


def test_excess_shrinks_with_length() -> None:
    values = np.r_[1.0, 0.93, np.linspace(0.9, 0.0, 198)]
    gram = operator(np.random.default_rng(3), values, torch.float64)
    excess = [
        math.sqrt(run(gram, steps, 0, FAILURE).bound) * gram.unit - 1 for steps in (10, 20, 40, 80, 120)
    ]
    assert excess == sorted(excess, reverse=True)
    assert excess[2] < 0.08
    assert excess[4] < 1e-6


@pytest.mark.parametrize("distinct", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_stops_at_breakdown(distinct: int, dtype: torch.dtype) -> None:
    values = np.repeat(np.linspace(1, 0.2, distinct), 60 // distinct)
    gram = operator(np.random.default_rng(4), values, dtype)
    check = run(gram, 200, 0, FAILURE)
    assert check.broke
    assert check.steps <= distinct + 1
    assert check.bound * gram.unit**2 >= 1 - 1e-6


def test_after_a_breakdown_four_short_runs_make_it_tight() -> None:
    bound, matvecs = upper(MatrixMap(3.0 * torch.eye(400)))
    assert 3.0 <= bound < 3.0 * (1 + 1e-6)
    assert matvecs < 20


# --- Sturm and roots ----------------------------------------------------------------------------------------


def tridiagonal(rng: np.random.Generator, j: int) -> tuple[list[float], list[float]]:
    return (rng.random(j) + 0.1).tolist(), (0.5 * rng.random(j) + 0.01).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_the_polynomial_by_its_roots(seed: int) -> None:
    rng = np.random.default_rng(seed)
    alpha, beta = tridiagonal(rng, int(rng.integers(1, 25)))
    roots = np.linalg.eigvalsh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
    for t in roots[-1] + np.array([1e-3, 0.1, 3.0]):
        sturm = Sturm(float(t))
        for a, b in zip(alpha, beta, strict=True):
            sturm.push(a, b)
        assert not sturm.passed
        assert math.isclose(
            sturm.log, np.log(t - roots).sum() - np.log(beta).sum(), rel_tol=1e-7, abs_tol=1e-7
        )
    below = Sturm(float(roots[-1]) - 1e-9)
    for a, b in zip(alpha, beta, strict=True):
        below.push(a, b)
    assert below.passed
    level = float(rng.uniform(1, 40))
    bound = hochstenbach(alpha, beta, level)
    assert reaches(alpha, beta, bound, level)
    assert not reaches(alpha, beta, bound * (1 - 1e-9), level)
    assert bound > roots[-1]


# --- the ceiling of a restarted run -------------------------------------------------------------------------


def ceilings(gram: Gram, steps: int, capacity: int, seed: int, failure: float, every: int = 1) -> list[float]:
    basis = Krylov(gram, nothing(gram), capacity, 1, Stream(seed))
    bounds = []
    for step in range(steps):
        if basis.size + 1 > capacity:
            values, coordinates, _ = basis.ritz()
            basis.restart(values, coordinates, capacity // 3)
        basis.expand()
        if (step + 1) % every == 0:
            bounds.append(basis.certificate(basis.ritz()[0], log_inverse_delta(gram.size, failure)))
        if not basis.frontier:
            break
    return bounds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_restarts_keep_the_certificate(dtype: torch.dtype) -> None:
    for draw in range(60):
        rng = np.random.default_rng([23, draw])
        values = random_values(rng, int(rng.integers(30, 90)))
        gram = operator(rng, values, dtype)
        first = (values[0] / gram.unit) ** 2
        for bound in ceilings(gram, 60, int(rng.integers(6, 20)), draw, FAILURE, 5):
            assert inflated(gram, bound, first) >= values[0] * (1 - 1e-12), draw


def test_restarted_and_unrestarted_ceilings_agree() -> None:
    values = np.r_[1.0, 0.97, np.linspace(0.95, 0.0, 298)]
    gram = operator(np.random.default_rng(6), values, torch.float64)
    short, full = (ceilings(gram, 70, capacity, 1, FAILURE) for capacity in (12, 100))
    assert short[:12] == pytest.approx(full[:12], rel=1e-6)
    for step in (20, 30, 40, 50):
        one, other = short[step] * gram.unit**2 - 1, full[step] * gram.unit**2 - 1
        assert 0 < other <= one < 1.5 * other + 1e-3, step


def test_restarted_ceilings_are_wrong_as_rarely_as_they_say() -> None:
    failure, draws, wrong = 0.2, 600, 0
    gram = operator(np.random.default_rng(7), np.r_[1.0, np.linspace(0.8, 0.1, 39)], torch.float64)
    for seed in range(draws):
        wrong += ceilings(gram, 5, 4, seed, failure, 5)[-1] * gram.unit**2 < 1.0 - 1e-12
    assert wrong / draws <= failure + 4 * math.sqrt(failure * (1 - failure) / draws)
    assert wrong > 0.1 * failure * draws


def test_blocks_and_refills_certify_nothing() -> None:
    rng = np.random.default_rng(8)
    gram = operator(rng, np.linspace(1, 0.1, 60), torch.float64)
    block = Krylov(gram, nothing(gram), 30, 2, Stream(0))
    block.expand()
    assert block.certificate(block.ritz()[0], 20.0) == math.inf
    flat = operator(rng, np.repeat([1.0, 0.5], 30), torch.float64)
    refilled = Krylov(flat, nothing(flat), 30, 1, Stream(0))
    for _ in range(4):
        refilled.expand()
    assert refilled.certificate(refilled.ritz()[0], 20.0) == math.inf


# --- enclosures ---------------------------------------------------------------------------------------------


def estimate_of(
    matrix: Matrix, rows: Matrix, tau: float | None, k: int, ceiling: float = math.inf
) -> Estimate:
    pairs = polish(Gram(MatrixMap(torch.from_numpy(matrix), dtype=torch.float64)), torch.from_numpy(rows))
    return Estimate(
        left=pairs.left[:k],
        values=pairs.values[:k],
        right=pairs.right[:k],
        residuals=torch.zeros(k),
        converged=False,
        matvecs=0,
        tau=tau,
        note="",
        rounding=pairs.rounding,
        multiplicity=1,
        ritz=pairs.values,
        coupling=pairs.remainder @ pairs.remainder.T,
        ceiling=ceiling,
    )


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(9, 40),
    p=st.integers(1, 8),
    noise=st.sampled_from([0.0, 1e-9, 1e-5, 1e-2, 1.0]),
)
def test_enclosures_hold_for_any_subspace(seed: int, n: int, p: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    values = random_values(rng, n)
    matrix = spectrum_matrix(rng, n + 3, n, values.tolist())
    v = np.linalg.svd(matrix)[2]
    rows = np.linalg.qr((v[:p] + noise * rng.standard_normal((p, n))).T)[0].T
    tau = np.linalg.norm(matrix - (matrix @ rows.T) @ rows, 2)
    estimate = estimate_of(matrix, rows, float(tau) * (1 + 1e-12), p)
    lower, high = enclose(estimate)
    truth = np.linalg.svd(matrix, compute_uv=False)[:p]
    slack = 1e-12 * truth[0]
    assert all(low <= true + slack for low, true in zip(lower, truth, strict=True))
    assert all(true <= up + slack for true, up in zip(truth, high, strict=True))
    # Never worse than the first-order bound.
    remainder = math.sqrt(max(0.0, float(np.linalg.eigvalsh(estimate.coupling.numpy())[-1])))
    for up, ritz in zip(high, estimate.values.tolist(), strict=True):
        assert up <= max(ritz, tau) + remainder + 1e-9 * truth[0]


def test_with_a_gap_the_enclosure_is_of_second_order() -> None:
    matrix = spectrum_matrix(
        np.random.default_rng(0), 60, 50, np.r_[1.0, 0.9, np.linspace(0.5, 0.1, 48)].tolist()
    )
    v = np.linalg.svd(matrix)[2]
    rows = np.linalg.qr((v[:2] + 1e-5 * np.random.default_rng(1).standard_normal((2, 50))).T)[0].T
    estimate = estimate_of(matrix, rows, 0.55, 2)
    lower, high = enclose(estimate)
    residual = math.sqrt(float(estimate.coupling.diagonal().max()))
    assert residual > 1e-6
    assert all(up - low < 1e-8 for low, up in zip(lower, high, strict=True))


def test_without_tau_nothing_is_claimed_but_the_ceiling() -> None:
    matrix = spectrum_matrix(np.random.default_rng(0), 30, 20, np.linspace(1, 0.1, 20).tolist())
    rows = np.linalg.svd(matrix)[2][:2]
    assert enclose(estimate_of(matrix, rows, None, 2))[1] == [math.inf, math.inf]
    assert enclose(estimate_of(matrix, rows, None, 2, 1.25))[1] == [1.25, 1.25]
    capped = enclose(estimate_of(matrix, rows, 5.0, 2, 1.25))[1]
    assert capped == pytest.approx([1.25, 1.25], rel=1e-9)


@pytest.mark.parametrize("solver", [lanczos, power, powerqr], ids=lambda f: f.__name__)
def test_solvers_enclose_in_many_small_draws(solver: object) -> None:
    for draw in range(70):
        rng = np.random.default_rng([31, draw])
        values = random_values(rng, int(rng.integers(36, 70)))
        matrix = spectrum_matrix(rng, len(values) + int(rng.integers(0, 9)), len(values), values.tolist())
        k = int(rng.integers(1, 6))
        cap = int(rng.integers(20, 400))
        estimate = solver(MatrixMap(torch.from_numpy(matrix)), k, max_matvecs=cap, seed=draw)  # type: ignore[operator]
        truth = np.linalg.svd(matrix, compute_uv=False)[:k]
        lower, high = enclose(estimate)
        slack = 1e-12 * truth[0]
        assert all(low <= true + slack for low, true in zip(lower, truth, strict=True)), draw
        assert all(true <= up + slack for true, up in zip(truth, high, strict=True)), draw
        if estimate.converged and solver is lanczos:
            assert np.abs(estimate.values.numpy() - truth).max() <= 1e-6 * truth[0], draw


def test_sigma_1_is_tight_at_the_default() -> None:
    rng = np.random.default_rng(9)
    matrix = rng.standard_normal((500, 400))
    truth = np.linalg.svd(matrix, compute_uv=False)
    for k, most in ((8, 1e-3), (1, 1.1e-2)):
        lower, high = enclose(lanczos(MatrixMap(torch.from_numpy(matrix)), k))
        assert truth[0] * (1 - 1e-8) < lower[0] <= truth[0] * (1 + 1e-12)
        assert truth[0] <= high[0] < truth[0] * (1 + most)
    _, high = enclose(lanczos(MatrixMap(torch.from_numpy(matrix)), 1, excess=1e-3))
    assert truth[0] <= high[0] < truth[0] * (1 + 1.1e-3)


# --- a bound of its own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-33, 0, 25])
def test_upper(exponent: int) -> None:
    matrix = np.random.default_rng(2).standard_normal((300, 200)) * 10.0**exponent
    weight = torch.from_numpy(matrix).float()
    truth = np.linalg.norm(weight.double().numpy(), 2)
    bound, matvecs = upper(MatrixMap(weight), max_matvecs=161)
    assert truth <= bound < 1.02 * truth
    assert matvecs <= 161
    early, fewer = upper(MatrixMap(weight), guess=truth, excess=0.05)
    assert truth <= early <= 1.05 * truth * (1 + 1e-12)
    assert fewer < matvecs
    again = upper(MatrixMap(weight), guess=truth, excess=0.05)
    assert again == (early, fewer)
    assert upper(MatrixMap(weight), guess=truth, excess=0.05, seed=1) != again


def test_upper_of_the_zero_operator() -> None:
    assert upper(MatrixMap(torch.zeros(30, 40)))[0] == 0.0


def test_another_generator_for_the_verification() -> None:
    a, b = (generator(b"x", 0, purpose).normal(1, 3) for purpose in ("search 0", "verify 0"))
    assert not torch.equal(a, b)
