"""Lanczos at its edges, its accounting, and the parts it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dense import Matrix
from lanczos_tools import (
    SPECTRA,
    Counting,
    Handing,
    assert_encloses,
    assert_right,
    prescribed,
)

from spectool.errors import OperatorError
from spectool.linear import Composed, ConvGeometry, ConvMap, LinearMap, MatrixMap, adjoint
from spectool.progress import Step
from spectool.spectrum import lanczos as module
from spectool.spectrum.finish import finish
from spectool.spectrum.gram import Gram
from spectool.spectrum.krylov import Krylov
from spectool.spectrum.lanczos import lanczos
from spectool.spectrum.polish import polish
from spectool.spectrum.probabilistic import enclose
from spectool.spectrum.starts import fingerprint, generator

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
    # A foreign map's arithmetic cannot be seen: 24 are spent whatever the cap is, 16 to measure its rounding and 8 in
    # the polish. A stored matrix takes none of them.
    assert estimate.matvecs <= max(cap + 2, 4 * k + 20 + 24)
    stored = lanczos(MatrixMap(torch.from_numpy(matrix)), k, max_matvecs=cap)
    assert stored.matvecs <= max(cap + 2, 4 * k + 20)
    assert_encloses(estimate, truth)
    if cap < 100:
        assert not estimate.converged
        assert "not converged: residual" in estimate.note


def test_default_cap() -> None:
    matrix = prescribed(1 - 0.9 * np.linspace(0, 1, 300) ** 6)
    A = Counting(matrix)
    estimate = lanczos(A, 2)
    assert not estimate.converged
    # The 24 are set aside that a foreign map's rounding may take; of a stored matrix nothing is.
    assert 2 * 400 - 20 - 24 <= A.count[0] <= 2 * 400
    assert 2 * 400 - 20 <= lanczos(MatrixMap(torch.from_numpy(matrix)), 2).matvecs <= 2 * 400
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
        float(generator(digest, seed, purpose).normal(1, 1))
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


def test_a_run_that_found_only_the_null_space_says_so() -> None:
    """A division by zero: what remained was rounding, and of σ₁ there was nothing to compare it with."""
    A = Composed(
        MatrixMap(torch.diag(torch.tensor([1.0, 0, 0, 0]).double()), dtype=torch.float64),
        MatrixMap(torch.eye(4).double(), dtype=torch.float64),
    )
    gram = Gram(A)
    null = torch.eye(4, dtype=torch.float64)[2:]
    found = finish(
        gram, null, 1, 1e-5, tau=1.0, sure=1.0, ceiling=2.0, converged=True, note="", most=0
    )  # fmt: skip
    assert found.values.tolist() == [0.0]
    assert not found.converged
    assert "rounding within the operator is all that is left" in found.note
    assert found.tau >= 1.0
