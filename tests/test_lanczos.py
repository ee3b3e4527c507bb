"""Lanczos against dense float64 SVDs, closed forms and prescribed spectra; its parts against their equations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import CASES, Case
from dense import Matrix, spectrum_matrix

from spectool.errors import OperatorError
from spectool.linear import ConvGeometry, ConvMap, FunctionMap, LinearMap, MatrixMap, adjoint
from spectool.progress import Step
from spectool.spectrum import lanczos as module
from spectool.spectrum.estimate import Estimate
from spectool.spectrum.gram import Gram
from spectool.spectrum.krylov import Krylov
from spectool.spectrum.lanczos import lanczos
from spectool.spectrum.polish import polish
from spectool.spectrum.probabilistic import enclose
from spectool.spectrum.search import Aim, search
from spectool.spectrum.starts import fingerprint, generator
from spectool.spectrum.verify import verify

PROMISE = 1e-6
ROUNDING = 1e-12  # of the dense truth itself


class Counting:
    """A matrix as a map that counts applications on its own, without the package."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype = torch.float32) -> None:
        self.matrix, self.weight, self.dtype = matrix, torch.from_numpy(matrix).to(dtype), dtype
        self.device, self.count = torch.device("cpu"), [0]
        self.in_shape, self.out_shape = (matrix.shape[1],), (matrix.shape[0],)

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        self.count[0] += len(x)
        return x @ self.weight.T

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        self.count[0] += len(y)
        return y @ self.weight

    def to(self, *, dtype: torch.dtype | None = None, device: object = None) -> Counting:
        other = Counting(self.matrix, dtype or self.dtype)
        other.count = self.count
        return other


def prescribed(values: Matrix | list[float], m: int = 0, n: int = 0, seed: int = 0) -> Matrix:
    values = np.asarray(values, dtype=np.float64)
    m, n = m or len(values) + 40, n or len(values)
    return spectrum_matrix(np.random.default_rng(seed), m, n, values.tolist())


def assert_encloses(estimate: Estimate, truth: Matrix) -> None:
    lower, upper = enclose(estimate)
    slack = ROUNDING * truth[0]
    for i, (low, high) in enumerate(zip(lower, upper, strict=True)):
        assert low <= truth[i] + slack, f"lower end of value {i}"
        assert truth[i] <= high + slack, f"upper end of value {i}"
        assert low <= float(estimate.values[i]) <= high


def assert_right(estimate: Estimate, truth: Matrix, k: int, accuracy: float = PROMISE) -> None:
    k = min(k, len(truth))
    assert estimate.values.shape == (k,)
    assert estimate.converged, estimate.note
    assert np.abs(estimate.values.numpy() - truth[:k]).max() <= accuracy * max(truth[0], 1e-300)
    assert_encloses(estimate, truth)


# --- truth --------------------------------------------------------------------------------------------------

SPECIAL = {"cluster", "multiplicity", "graded", "scale", "rank", "vector", "zero", "half", "structured"}
CHOSEN = [case for i, case in enumerate(CASES) if i % 6 == 0 or (case.tags & SPECIAL and "conv" not in case.tags)]


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_every_kind_of_operator(case: Case) -> None:
    estimate = lanczos(case.build(), 8)
    assert_right(estimate, case.sigma(), 8)
    assert_vectors(estimate, case.dense())


def assert_vectors(estimate: Estimate, dense: Matrix) -> None:
    """The triplets and their printed residuals are what they say they are."""
    k = len(estimate.values)
    u, v = estimate.left.reshape(k, -1).numpy(), estimate.right.reshape(k, -1).numpy()
    s = estimate.values.numpy()
    assert np.abs(u @ u.T - np.eye(k)).max() < 1e-12
    assert np.abs(v @ v.T - np.eye(k)).max() < 1e-12
    right = np.linalg.norm(v @ dense.T - s[:, None] * u, axis=1)
    left = np.linalg.norm(u @ dense - s[:, None] * v, axis=1)
    true = np.maximum(right, left) / max(s[0], 1e-300)
    assert np.allclose(estimate.residuals.numpy(), true, rtol=1e-3, atol=1e-11)


N = 260
SPECTRA: dict[str, Matrix] = {
    "geometric .9": 0.9 ** np.arange(N),
    "geometric .3": 0.3 ** np.arange(N),
    "12-fold, gap 1e-8": np.r_[1 - 1e-8 * np.arange(12), np.linspace(0.9, 0.1, N - 12)],
    "12-fold exact": np.r_[np.ones(12), np.linspace(0.9, 0.1, N - 12)],
    "pairs": np.repeat(np.linspace(1, 0.1, N // 2), 2),
    "quadruples": np.repeat(np.linspace(1, 0.1, N // 4), 4),
    "two values": np.r_[2 * np.ones(5), np.ones(N - 5)],
    "one value": 3 * np.ones(N),
    "rank 3": np.r_[3, 2, 1, np.zeros(N - 3)],
    "dense edge": 1 - 0.9 * np.linspace(0, 1, N) ** 1.5,
    "spike 1e3": np.r_[1e3, np.linspace(1, 0.5, N - 1)],
    "spike 1e6": np.r_[1e6, np.linspace(1, 0.5, N - 1)],
    "spike 1e9": np.r_[1e9, np.linspace(1, 0.5, N - 1)],
    "cluster just below": np.r_[1.0, 0.99 - 1e-7 * np.arange(20), np.linspace(0.8, 0.1, N - 21)],
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 8])
def test_prescribed_spectrum(name: str, k: int) -> None:
    matrix = prescribed(SPECTRA[name])
    assert_right(lanczos(MatrixMap(torch.from_numpy(matrix)), k), SPECTRA[name], k)


def test_flipped_side_gives_the_adjoints_triplets() -> None:
    matrix = prescribed(np.linspace(2, 0.1, 90), 90, 200)
    estimate = lanczos(MatrixMap(torch.from_numpy(matrix)), 4)
    assert estimate.left.shape == (4, 90)
    assert estimate.right.shape == (4, 200)
    assert_vectors(estimate, matrix)
    other = lanczos(adjoint(MatrixMap(torch.from_numpy(matrix))), 4)
    assert np.allclose(other.values, estimate.values, rtol=1e-9)
    assert other.left.shape == (4, 200)


KERNEL = torch.tensor([[2.0, 7.0, -1.0], [1.0, 3.0, -8.0], [5.0, -3.0, 1.0]]).reshape(1, 1, 3, 3)


@pytest.mark.parametrize(
    ("stride", "pad", "dilation", "mode", "published"),
    [
        (1, 1, 1, "zeros", [22.72753302, 22.72744344, 22.4144093, 22.4144085, 22.22151133]),
        (1, 1, 1, "circular", [22.91221348, 22.91221348, 22.73452631, 22.73452631, 22.59309063]),
        (2, 1, 1, "zeros", [13.81511119, 13.81419628, 13.79273318]),
        (1, 0, 1, "zeros", [22.67943198, 22.67933422, 22.31291351]),
        (1, 2, 2, "zeros", [22.00672288, 22.00672288, 22.00672288]),
    ],
)
def test_reference_values(stride: int, pad: int, dilation: int, mode: str, published: list[float]) -> None:
    geometry = ConvGeometry((stride,) * 2, ((pad, pad),) * 2, (dilation,) * 2, padding_mode=mode)  # type: ignore[arg-type]
    estimate = lanczos(ConvMap(KERNEL, (1, 20, 20), geometry), len(published))
    assert estimate.converged
    assert np.allclose(estimate.values, published, rtol=0, atol=6e-9)


def test_the_tensor_product_of_two_second_differences_of_ones() -> None:
    kernel = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])).reshape(1, 1, 3, 3)
    geometry = ConvGeometry((1, 1), ((1, 1), (1, 1)), (1, 1))
    factors = 2 + 2 * np.cos(np.arange(1, 21) * math.pi / 21)
    truth = np.sort(np.outer(factors, factors).reshape(-1))[::-1]
    assert_right(lanczos(ConvMap(kernel, (1, 20, 20), geometry), 12), truth, 12, 1e-9)


# --- what used to go wrong ----------------------------------------------------------------------------------


def clustered() -> tuple[MatrixMap, Matrix]:
    return MatrixMap(torch.from_numpy(prescribed(SPECTRA["12-fold exact"]))), SPECTRA["12-fold exact"]


def test_small_residuals_do_not_reveal_a_missed_copy() -> None:
    # Why there is a verification: the search alone is wrong by a tenth, and "converged".
    A, truth = clustered()
    gram = Gram(A)
    gram.prescale(generator(b"", 0, "scale"))
    nothing = torch.empty(0, gram.size)
    found = search(
        gram, nothing, np.empty(0), Aim(8, 1e-5, 900), 1, generator(b"", 0, "x"), lambda step: None
    )
    assert found.converged
    wrong = np.sqrt(found.values) * gram.unit
    assert np.abs(wrong - truth[:8]).max() > 0.05
    assert_right(lanczos(A, 8), truth, 8, 1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("missing", [0, 3, 7])
def test_verification_catches_a_copy_that_was_left_out(missing: int, seed: int) -> None:
    values = np.r_[1.0, 1.0, 1.0, 0.97, 0.97, 0.95, 0.93, 0.93, np.linspace(0.85, 0.1, 150)]
    matrix = prescribed(values, seed=seed)
    gram = Gram(MatrixMap(torch.from_numpy(matrix)))
    gram.prescale(generator(b"", seed, "scale"))
    v = torch.from_numpy(np.linalg.svd(matrix)[2])
    kept = torch.cat([v[:missing], v[missing + 1 : 8]])
    squares = (values[:8] / gram.unit) ** 2

    def verdict(rows: torch.Tensor) -> object:
        return verify(
            gram,
            rows,
            float(squares[0]),
            float(squares[7]),
            lambda suffix: generator(b"", seed, f"v{suffix}"),
            pairs=200,
            tight=False,
            tol=1e-5,
            failure=1e-9,
        )

    complete = verdict(v[:8])
    assert complete.proven
    assert not complete.above
    assert values[8] <= complete.tau * gram.unit <= 1.051 * values[7]
    # Another direction in place of the missing one leaves the count right and the copy outside.
    incomplete = verdict(torch.cat([kept, v[100:101]]))
    # The last of the eight is level with the limit itself; of the others the verification must see something.
    assert not incomplete.proven or missing == 7
    assert incomplete.above or missing == 7


def test_a_rescaled_unverified_run_at_extreme_scales() -> None:
    base = prescribed(0.95 ** np.arange(120))
    for exponent in (-42, -38, -33, -20, 12, 25, 36):
        weight = torch.from_numpy(base * 10.0**exponent).float()
        truth = np.linalg.svd(weight.double().numpy(), compute_uv=False)
        assert_right(lanczos(MatrixMap(weight), 5), truth, 5)


def test_float64_takes_over_where_float32_cannot_resolve() -> None:
    values = np.r_[1.0, 1e-2, 1e-3, 1e-4, np.linspace(5e-5, 1e-5, 150)]
    matrix = prescribed(values)
    estimate = lanczos(MatrixMap(torch.from_numpy(matrix)), 4)
    assert_right(estimate, values, 4, 1e-9)
    tight = lanczos(MatrixMap(torch.from_numpy(prescribed(SPECTRA["geometric .9"]))), 4, tol=1e-11)
    assert tight.converged
    assert float(tight.residuals.max()) <= 1e-11


def test_a_float32_only_function_is_honest() -> None:
    weight = torch.from_numpy(prescribed(0.3 ** np.arange(80))).float()
    estimate = lanczos(FunctionMap(lambda x: x @ weight.T, (80,)), 8)
    assert not estimate.converged
    assert "float32 only" in estimate.note
    assert_encloses(estimate, np.linalg.svd(weight.double().numpy(), compute_uv=False))
    easy = torch.from_numpy(prescribed(0.95 ** np.arange(80))).float()
    estimate = lanczos(FunctionMap(lambda x: x @ easy.T + 5.0, (80,)), 4)
    assert_right(estimate, np.linalg.svd(easy.double().numpy(), compute_uv=False), 4)
    lower = enclose(estimate)[0][0]
    assert 1e-7 < 1 - lower / float(estimate.values[0]) < 1e-3  # float32's rounding, not float64's


def test_the_identity_breaks_down_and_still_gets_an_interval() -> None:
    for k in (1, 5):
        estimate = lanczos(MatrixMap(2 * torch.eye(150)), k)
        assert_right(estimate, 2 * np.ones(150), k, 1e-12)
        assert estimate.multiplicity == k
        assert enclose(estimate)[1][0] < 2 * (1 + 1e-4)
        assert estimate.matvecs < 80


class Handing:
    """An identity that hands back its argument, or a constant it keeps: solvers must not write into either."""

    in_shape = out_shape = (90,)
    dtype, device = torch.float32, torch.device("cpu")

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        return x

    rmatvec = matvec

    def to(self, *, dtype: object = None, device: object = None) -> Handing:
        return self


def test_a_map_that_returns_its_argument() -> None:
    assert np.allclose(lanczos(Handing(), 3).values, 1.0, atol=1e-7)


def test_a_map_whose_result_is_a_broadcast_view() -> None:
    A = FunctionMap(lambda x: x.sum(1, keepdim=True).expand(-1, 7), (60,))
    assert math.isclose(float(lanczos(A, 1).values[0]), math.sqrt(60 * 7), rel_tol=1e-6)


def test_weights_that_require_gradients_leave_no_graph() -> None:
    weight = torch.from_numpy(prescribed(np.linspace(1, 0.1, 60))).float().requires_grad_()
    estimate = lanczos(MatrixMap(weight), 3)
    assert not estimate.values.requires_grad
    assert not estimate.right.requires_grad


# --- edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (1, 1), (3, 40), (33, 33), (34, 60), (70, 66)])
@pytest.mark.parametrize("k", [1, 3, 30])
def test_small_spaces_are_exhausted_exactly(shape: tuple[int, int], k: int) -> None:
    matrix = np.random.default_rng(7).standard_normal(shape)
    truth = np.linalg.svd(matrix, compute_uv=False)
    assert_right(lanczos(MatrixMap(torch.from_numpy(matrix)), k), truth, k, 1e-9)


def test_k_beyond_the_operator_is_clamped() -> None:
    matrix = np.random.default_rng(7).standard_normal((5, 9))
    assert lanczos(MatrixMap(torch.from_numpy(matrix)), 50).values.shape == (5,)


@pytest.mark.parametrize("shape", [(30, 200), (200, 30), (1, 4)])
def test_zero_operator(shape: tuple[int, int]) -> None:
    estimate = lanczos(MatrixMap(torch.zeros(shape)), 3)
    k = min(3, *shape)
    assert estimate.values.tolist() == [0.0] * k
    assert estimate.converged
    assert enclose(estimate) == ([0.0] * k, [0.0] * k)
    assert estimate.left.shape == (k, shape[0])
    assert torch.linalg.vector_norm(estimate.right, dim=1).tolist() == [1.0] * k


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(OperatorError, match="NaN or infinite"):
        lanczos(MatrixMap(torch.full((60, 60), math.nan)), 2)


@pytest.mark.parametrize("cap", [1, 40, 100, 200])
@pytest.mark.parametrize("k", [1, 8])
def test_at_the_cap_it_says_so_and_the_interval_holds(cap: int, k: int) -> None:
    matrix = np.random.default_rng(3).standard_normal((400, 300))
    truth = np.linalg.svd(matrix, compute_uv=False)
    A = Counting(matrix)
    estimate = lanczos(A, k, max_matvecs=cap)
    assert estimate.matvecs == A.count[0]
    assert estimate.matvecs <= max(cap + 2, 4 * k + 20)
    assert_encloses(estimate, truth)
    if cap < 100:
        assert not estimate.converged
        assert "not converged: residual" in estimate.note


def test_default_cap() -> None:
    matrix = prescribed(1 - 0.9 * np.linspace(0, 1, 300) ** 6)
    A = Counting(matrix)
    estimate = lanczos(A, 2)
    assert not estimate.converged
    assert 2 * 400 - 20 <= A.count[0] <= 2 * 400
    assert_encloses(estimate, np.linalg.svd(matrix, compute_uv=False))


# --- accounting, determinism, progress ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["geometric .9", "12-fold exact", "spike 1e3", "one value"])
def test_every_application_is_counted(name: str) -> None:
    A = Counting(prescribed(SPECTRA[name]))
    assert lanczos(A, 8).matvecs == A.count[0]


def test_same_seed_same_bytes_other_seed_other_vectors() -> None:
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((300, 200))).float()
    one, two, three = (lanczos(MatrixMap(weight.clone()), 5, seed=seed) for seed in (0, 0, 1))
    for name in ("left", "values", "right", "residuals", "ritz", "coupling"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert (one.matvecs, one.tau, one.ceiling) == (two.matvecs, two.tau, two.ceiling)
    assert not torch.equal(one.right, three.right)
    assert torch.allclose(one.values, three.values, rtol=1e-9)


def test_progress_is_told() -> None:
    steps: list[Step] = []
    matrix = np.random.default_rng(1).standard_normal((300, 200))
    estimate = lanczos(MatrixMap(torch.from_numpy(matrix)), 3, progress=steps.append)
    counts = [step.matvecs for step in steps]
    assert len(steps) > 5
    assert counts == sorted(counts)
    assert counts[-1] < estimate.matvecs
    assert steps[-1].residual is not None
    assert steps[-1].residual < 1e-5


def test_about_as_few_applications_as_arpack() -> None:
    from scipy.sparse.linalg import LinearOperator, svds

    for k, most in ((8, 1.1), (1, 0.85)):
        ratios = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            weight = torch.from_numpy(rng.standard_normal((32, 24, 3, 3))).float()
            A = ConvMap(weight, (24, 20, 20), ConvGeometry((1, 1), ((1, 1), (1, 1)), (1, 1)))
            count = 0

            def product(
                f: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
            ) -> Callable[..., Matrix]:
                def apply(x: Matrix) -> Matrix:
                    nonlocal count
                    count += 1
                    return f(torch.from_numpy(x).reshape(1, *shape)).reshape(-1).numpy()

                return apply

            operator = LinearOperator(
                (32 * 400, 24 * 400),
                matvec=product(A.matvec, A.in_shape),
                rmatvec=product(A.rmatvec, A.out_shape),
                dtype=np.float32,
            )
            svds(operator, k=k, tol=1e-5, v0=rng.standard_normal(24 * 400).astype(np.float32))
            estimate = lanczos(A, k)
            assert estimate.converged
            ratios.append(estimate.matvecs / count)
        assert sorted(ratios)[1] <= most, ratios


# --- parts --------------------------------------------------------------------------------------------------


def gram_of(matrix: Matrix, dtype: torch.dtype = torch.float64) -> Gram:
    return Gram(MatrixMap(torch.from_numpy(matrix), dtype=dtype))


@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_basis_keeps_its_equations_to_the_end_of_the_space(
    block: int, copies: int, dtype: torch.dtype
) -> None:
    # Orthogonality to the known rows was once lost by a factor of 3 a step, silently.
    size, p = 48, 8
    matrix = prescribed(np.repeat(np.linspace(1, 0.3, size // copies), copies), size + 5, size)
    gram = gram_of(matrix, dtype)
    known = torch.from_numpy(np.linalg.svd(matrix)[2][:p].copy()).to(dtype)
    outside = torch.eye(size, dtype=torch.float64) - known.double().T @ known.double()
    B = outside @ torch.from_numpy(matrix.T @ matrix) @ outside
    basis = Krylov(gram, known, 30, block, generator(b"", 0, "x"))
    limit = 60 * torch.finfo(dtype).eps
    restarts = 0
    while basis.frontier and basis.size + basis.frontier <= size - p:
        if basis.size + basis.frontier > 30:
            if restarts == 3:
                basis.grow(size - p)
            else:
                values, coordinates, _ = basis.ritz()
                basis.restart(values, coordinates, 16)
                restarts += 1
        basis.expand()
        identity = np.eye(basis.size)
        q = basis.vectors(identity).double()
        f = basis._rows[basis.size : basis.size + basis.frontier].double()
        both = torch.cat([q, f, known.double()])
        assert float((both @ both.T - torch.eye(len(both))).abs().max()) < limit
        right = torch.from_numpy(basis.T) @ q + torch.from_numpy(basis.link).T @ f
        assert float((q @ B - right).abs().max()) < limit
    assert basis.size == size - p
    assert np.allclose(basis.ritz()[0], np.linalg.svd(matrix)[1][p:] ** 2, atol=10 * limit)


def test_gram_acts_on_the_smaller_side_scaled() -> None:
    for shape in ((40, 90), (90, 40)):
        matrix = np.random.default_rng(2).standard_normal(shape) * 1e-10
        gram = Gram(MatrixMap(torch.from_numpy(matrix)))
        assert gram.size == 40
        assert gram.prescale(generator(b"", 0, "scale"))
        B = gram(torch.eye(40)).double().numpy()
        dense = (matrix.T @ matrix if shape[1] == 40 else matrix @ matrix.T) / gram.unit**2
        assert np.allclose(B, dense, rtol=1e-4, atol=1e-4 * np.abs(dense).max())
        assert 1e-2 < np.abs(B).max() < 1e3
        assert gram.applications == 1 + 80
        assert gram.double().applications == gram.applications


def test_polish_is_a_rayleigh_ritz_step_that_counts_its_rounding() -> None:
    matrix = prescribed(np.linspace(1, 0.1, 60))
    gram = gram_of(matrix)
    rows = torch.from_numpy(np.random.default_rng(5).standard_normal((7, 60)))
    pairs = polish(gram, rows)
    basis = np.linalg.qr(rows.numpy().T)[0]
    assert np.allclose(pairs.values, np.linalg.svd(matrix @ basis, compute_uv=False), rtol=1e-13)
    exact = pairs.left.numpy() @ matrix - pairs.values.numpy()[:, None] * pairs.right.numpy()
    assert np.allclose(pairs.remainder, exact, atol=1e-14)
    assert np.abs(basis.T @ np.linalg.qr(pairs.right.numpy().T)[0]).sum() > 0
    assert float(pairs.defect.max()) < pairs.rounding < 1e-12


def test_polish_completes_left_vectors_of_zero_values() -> None:
    matrix = prescribed(np.r_[3.0, 2.0, 1.0, np.zeros(40)])
    pairs = polish(gram_of(matrix), torch.eye(43, dtype=torch.float64)[:8])
    assert np.allclose(pairs.left @ pairs.left.T, np.eye(8), atol=1e-13)


def test_fingerprint_depends_on_weights_and_geometry_alone() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 4, 3, 3))).float()
    plain = ConvGeometry((1, 1), ((1, 1), (1, 1)), (1, 1))
    strided = ConvGeometry((2, 2), ((1, 1), (1, 1)), (1, 1))

    def digest(w: torch.Tensor, geometry: ConvGeometry = plain, n: int = 8, **options: object) -> bytes:
        return fingerprint(ConvMap(w, (4, n, n), geometry, **options))  # type: ignore[arg-type]

    same = digest(weight)
    assert same == digest(weight.clone())
    assert same == digest(weight, dtype=torch.float64)
    assert same == digest(weight.to(memory_format=torch.channels_last))
    changed = weight.clone()
    changed[5, 3, 2, 2] += 1e-6
    others = [digest(changed), digest(weight, strided), digest(weight, n=9), digest(weight.half())]
    others.append(fingerprint(adjoint(ConvMap(weight, (4, 8, 8), plain))))
    others.append(fingerprint(MatrixMap(weight.reshape(6, 36))))
    assert len({same, *others}) == 7


def test_generators_differ_by_seed_and_purpose() -> None:
    draws = {
        float(torch.randn(1, dtype=torch.float64, generator=generator(digest, seed, purpose)))
        for digest in (b"a", b"b")
        for seed in (0, 1)
        for purpose in ("search 0", "verify 0")
    }
    assert len(draws) == 8


def test_rounds_do_not_exceed_the_failure_probability() -> None:
    from spectool.spectrum.search import CEILING_SHARE

    shares = CEILING_SHARE + sum(0.7 / 4.0**number for number in range(module.ROUNDS))
    assert shares <= 1.0


def test_maps_are_the_protocol() -> None:
    assert isinstance(Counting(np.eye(3)), LinearMap)
    assert isinstance(Handing(), LinearMap)
