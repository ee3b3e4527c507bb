"""A fixed share of the search for operators that break an interval or a claim; all of it: ``tests/adversaries``.

What the search found, and what was reasoned out, stands in ``test_found`` and behind it with the numbers that make it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from adversaries.base import Draw
from adversaries.judge import Run, judged
from adversaries.search import FAMILIES, Search, play
from hypothesis import HealthCheck, given, settings, target
from hypothesis import strategies as st

from spectool.errors import OperatorError
from spectool.linear import Composed, ConvGeometry, ConvMap, DiagonalMap, FunctionMap, MatrixMap, SeparableMap
from spectool.spectrum import svds
from spectool.spectrum.starts import Stream, fingerprint

QUICK = sorted(set(FAMILIES) - {"needles"})


@pytest.mark.parametrize("family", QUICK)
@settings(
    max_examples=120,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(st.floats(0.0, 1.0, exclude_max=True), max_size=30), st.integers(0, 1 << 30))
def test_nothing_breaks_an_interval(family: str, numbers: list[float], seed: int) -> None:
    draw = Draw(numbers, seed)
    adversary = FAMILIES[family](draw)
    if adversary is None:
        return
    run = Run.drawn(draw, adversary)
    verdict = judged(adversary, run)
    target(min(verdict.pressure, 1.0))
    assert verdict.failures == (), (adversary, run)


def test_nor_does_a_search_uphill() -> None:
    search = Search(3, tuple(QUICK))
    steps = search.steps()
    for _ in range(400):
        found = next(steps)
        assert found.verdict.failures == (), (found.family, found.text, found.run, found.numbers)
    assert min(search.tried.values()) >= 10


def test_needles() -> None:
    for seed in range(6):
        draw = Draw((0.1,), seed)
        adversary = FAMILIES["needles"](draw)
        assert adversary is not None
        run = Run.drawn(draw, adversary)
        assert judged(adversary, run).failures == (), (adversary, run)


# --- one by one ---------------------------------------------------------------------------------------------


def overlapping(size: float, n: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((2 * n, 2 * n)))[0]
    return torch.from_numpy(q[:n].copy()), torch.from_numpy((q[n:] + size * q[:n]).T.copy())


@pytest.mark.parametrize("method", ["auto", "exact", "lanczos", "power", "powerqr"])
@pytest.mark.parametrize("size", [1e-8, 1e-12, 1e-16])
def test_projections_that_nearly_miss_each_other(size: float, method: str) -> None:
    # σ₁ ≈ size, but the product is only known to 1e-16: said to be within 1e-14 of it, and converged, before.
    import mpmath

    parts = overlapping(size)
    with mpmath.workdps(60):
        product = mpmath.matrix(parts[0].tolist()) * mpmath.matrix(parts[1].tolist())
        truth = [float(value) for value in mpmath.svd_r(product, compute_uv=False)]
    found = svds(Composed(*(MatrixMap(part) for part in parts)), 3, method=method, max_matvecs=1500)  # type: ignore[arg-type]
    for low, true, high in zip(found.lower, truth, found.upper, strict=False):
        assert low <= true <= high
    if size < 1e-9:
        assert not found.converged
        assert "not converged" in found.note


def test_a_norm_that_was_computed_bounds_nothing() -> None:
    # Found by the search: the product is 1e-11 and known to 4e-4 of that only. ‖A‖_F from such values left σ₂ too
    # little room.
    import mpmath

    parts = (
        [
            [-0.673477609990667, 0.2906731673675215, -0.3213116499068512, -0.5989122158112394],
            [-0.5535630137020693, -0.662445463490289, -0.2530125089168322, 0.43671348512935687],
        ],
        [
            [0.4894878307350455, 0.019938963308730573],
            [-0.3728979836616755, 0.5810526752755382],
            [-0.7045975657347474, -0.5799015126156142],
            [-0.353399246892271, 0.5706964709575799],
        ],
    )
    with mpmath.workdps(60):
        product = mpmath.matrix(parts[0]) * mpmath.matrix(parts[1])
        truth = mpmath.svd_r(product, compute_uv=False)
    found = svds(Composed(*(MatrixMap(torch.tensor(part, dtype=torch.float64)) for part in parts)), 2)
    for low, true, high in zip(found.lower, truth, found.upper, strict=True):
        assert low <= true <= high
    assert not found.converged


def test_a_composition_that_rounding_swallows_is_no_zero_operator() -> None:
    parts = [[[1.0, -1.0]], [[1.0, 1.0], [1.0, 0.0]], [[1e20], [1.0]]]  # (1e20 + 1) − 1e20 = 1
    A = Composed(*(MatrixMap(torch.tensor(part, dtype=torch.float64)) for part in parts))
    for method in ("auto", "lanczos"):
        found = svds(A, 1, method=method)  # type: ignore[arg-type]
        assert found.upper[0] >= 1.0
        assert not found.converged


def test_exponents_of_factors_are_added() -> None:
    # 1e-200·1e-200 underflows where it is multiplied out first.
    A = Composed(*(MatrixMap(torch.eye(3, dtype=torch.float64) * 10.0**e) for e in (-200, -200, 200, 200)))
    assert math.isclose(svds(A, 1).values[0], 1.0, rel_tol=1e-12)


def test_values_beyond_float64_are_refused_and_subnormal_ones_enclosed() -> None:
    with pytest.raises(OperatorError, match="beyond float64"):
        svds(MatrixMap(torch.full((4, 4), 1e308, dtype=torch.float64)), 1)
    tiny = 5e-324  # the smallest number there is; σ₁ = 2·tiny, √2·tiny and so on are not all representable
    for rows, true in ((1, 3), (3, 3)):
        found = svds(MatrixMap(torch.full((rows, 3), tiny, dtype=torch.float64)), 1)
        assert found.lower[0] <= tiny * math.floor(math.sqrt(rows * true))
        assert found.upper[0] >= tiny * math.ceil(math.sqrt(rows * true) - 1e-9)


def test_a_group_far_smaller_than_the_others_keeps_its_values() -> None:
    # Squares of 1e-170 underflow: the second group's upper end was 0.
    for channels in (1, 3):
        weight = torch.randn(2 * channels, channels, 3, generator=torch.Generator().manual_seed(0)).double()
        weight[channels:] = weight[:channels] * 2.0**-560
        A = ConvMap(weight, (2 * channels, 40), ConvGeometry((1,), ((1, 1),), (1,), 2, "circular"))
        found = svds(A, 80 * channels, method="exact")
        small = [value for value in found.upper if value < 1e-100]
        assert len(small) == 40 * channels
        assert min(small) > 0.0 or channels > 1


def test_averages_behind_differences() -> None:
    rough, smooth = np.eye(6) - np.eye(6, k=1), np.full((6, 6), 0.1)
    rough[-1, 0] = -1.0
    A = Composed(*(SeparableMap(2, (torch.from_numpy(part),)) for part in (rough, smooth)))
    found = svds(A, 1, method="exact")
    assert found.lower[0] == 0.0  # the product is zero but for rounding
    assert not found.converged


def test_a_function_whose_parts_cancel() -> None:
    rng = np.random.default_rng(4)
    first = torch.from_numpy(rng.standard_normal((12, 12))).float()
    second = torch.from_numpy(-first.numpy() + 1e-3 * rng.standard_normal((12, 12))).float()
    truth = np.linalg.svd(first.double().numpy() + second.double().numpy(), compute_uv=False)
    for method in ("auto", "lanczos", "power", "powerqr"):
        A = FunctionMap(lambda x: x @ first.T + x @ second.T, (12,))
        found = svds(A, 3, method=method, max_matvecs=1500)  # type: ignore[arg-type]
        for low, true, high in zip(found.lower, truth, found.upper, strict=False):
            assert low <= true * (1 + 1e-12)
            assert true * (1 - 1e-12) <= high
        assert not found.converged


def test_functions_at_the_ends_of_float32_go_on_in_float64() -> None:
    for scale in (1e38, 1e-42):
        weight = (torch.eye(40, dtype=torch.float64) * scale).float()

        def make(dtype: torch.dtype, device: object = None, weight: torch.Tensor = weight) -> object:
            return lambda x: x @ weight.to(dtype)

        A = FunctionMap(make(torch.float32), (40,), remake=make)  # type: ignore[arg-type]
        found = svds(A, 2, method="lanczos")
        assert found.converged
        assert found.lower[0] <= float(weight[0, 0]) <= found.upper[0]


def test_values_closer_than_their_residuals_are_not_called_converged() -> None:
    # Two values 5e-6 apart among many: vectors with residuals below the tolerance can be mixtures of the two.
    n = 300
    values = np.r_[1.0, 1.0 - 5e-6, np.linspace(0.99, 0.1, n - 2)]
    A = MatrixMap(torch.from_numpy(np.diag(values)))
    for method in ("lanczos", "power", "powerqr"):
        for seed in range(4):
            found = svds(A, 1, method=method, seed=seed, max_matvecs=1500)  # type: ignore[arg-type]
            assert not found.converged or abs(found.values[0] - 1.0) <= 1e-6


def test_copies_are_not_counted_before_they_are_known() -> None:
    values = np.linspace(1.0, 0.1, 100)
    found = svds(MatrixMap(torch.from_numpy(np.diag(values))), 4, method="power", max_matvecs=30)
    assert not found.converged
    assert found.multiplicity == 1


def test_values_that_are_proven_to_differ_are_no_copies() -> None:
    scale = torch.tensor([1.0, 1.0 - 1e-11, 0.5], dtype=torch.float64)
    assert svds(DiagonalMap(scale, (3,)), 3).multiplicity == 1
    assert svds(MatrixMap(torch.diag(scale)), 3).multiplicity == 1


# --- start vectors ------------------------------------------------------------------------------------------


def test_start_vectors_use_more_than_32_bits_of_their_key() -> None:
    # torch's CPU generator does not: seeds that differ by 2**32 give the same numbers.
    assert not torch.equal(Stream(5).normal(1, 4), Stream(5 + 2**32).normal(1, 4))
    assert not torch.equal(Stream(5).normal(1, 4), Stream(5 + 2**100).normal(1, 4))


def test_the_start_vector_of_a_region_depends_on_its_weights() -> None:
    # Else weights can be made whose largest singular vector is orthogonal to it.
    from spectool.api.operators import function_map

    prints = set()
    for value in (1.0, 2.0):
        layer = torch.nn.Linear(4, 4)
        torch.nn.init.constant_(layer.weight, value)
        torch.nn.init.zeros_(layer.bias)
        prints.add(fingerprint(function_map(layer, (4,))))
    assert len(prints) == 2


def test_eigenvalues_of_the_bound_are_as_wrong_as_the_largest_is() -> None:
    # Groups 2^10 apart: σ₉ is 1e-4 of σ₁, and its upper end was 1.6e-9 too low.
    numbers = (
        0.9873361001705597,
        0.8847108913427206,
        0.6645383547801755,
        0.7040459323389526,
        0.9060028228589255,
        0.19887696591544868,
        0.35843167711813617,
        0.8139130413427167,
        0.30567779094464,
        0.9641776152133523,
        0.8288456480931423,
        0.27525626541891535,
        0.7548365503280554,
        0.3797594699652328,
        0.5608158489917485,
        0.39852617680699787,
        0.7261102145972113,
        0.9577985047235639,
        0.6739168051810794,
        0.9697933925340843,
        0.27539712069743394,
        0.9826544089168632,
        0.63866634839959,
        0.2445495617286254,
        0.48292512645073793,
        0.7401841478885627,
        0.03284449681004342,
        0.1306777944272952,
        0.7590495542873139,
        0.58170130331402,
        0.7579406233332868,
        0.9602170842339417,
        0.490822573079568,
        0.136669947976077,
        0.6558703439446455,
        0.24831345420167283,
        0.7470734687138333,
        0.8605045328544021,
        0.8067168814449538,
        0.07799933495913947,
        0.5189673544363459,
        0.5251082164226291,
        0.4474976741253761,
    )
    found = play("convolutions", numbers, 0)
    assert found is not None
    assert found.run.method == "power"
    assert found.verdict.failures == ()
