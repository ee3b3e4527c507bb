"""Near-copies: values so close that a single-vector search takes two for one, at the end of the wanted ones.

The residuals are small then, the interval of σ₁ holds, and the k-th value is the next one down. Truth is a dense
float64 SVD, a prescribed spectrum, or ARPACK in float64.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense import Matrix
from lanczos_tools import assert_right, prescribed
from scipy.sparse.linalg import LinearOperator, eigsh

from spectool.linear import ConvGeometry, ConvMap, MatrixMap
from spectool.spectrum.lanczos import lanczos

K = 8
GAPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)


def planted(place: int, gap: float, step: float, copies: int = 2) -> Matrix:
    """A spectrum whose values ``place``, ``place`` + 1, … (from 1) are ``gap`` apart; ``step`` below is the next."""
    head = 1 - 4e-3 * np.arange(place)
    cluster = head[-1] * (1 - gap * np.arange(1, copies))
    after = head[-1] * (1 - step - 4e-3 * np.arange(max(1, K - place - copies + 1)))
    bulk = after[-1] * (1 - 1e-3 - 0.9 * np.linspace(0, 1, 280) ** 1.5)
    return np.r_[head, cluster, after, bulk]


def as_map(values: Matrix, kind: str, seed: int) -> MatrixMap:
    if kind == "diagonal":
        order = np.random.default_rng(seed).permutation(len(values))
        return MatrixMap(torch.diag(torch.from_numpy(values[order])))
    return MatrixMap(torch.from_numpy(prescribed(values, seed=seed)))


@pytest.mark.parametrize("step", [4e-5, 3e-4])
@pytest.mark.parametrize("gap", GAPS)
def test_a_pair_at_the_end_and_the_next_value_just_below(gap: float, step: float) -> None:
    # What was returned for the second of the pair, "converged", was the next value: wrong by the step.
    values = planted(K - 1, gap, step)
    for seed in range(2):
        assert_right(lanczos(as_map(values, "rotated", seed), K, seed=seed), values, K)


@pytest.mark.parametrize("kind", ["diagonal", "rotated"])
@pytest.mark.parametrize("gap", GAPS)
def test_a_pair_of_which_one_is_wanted(gap: float, kind: str) -> None:
    # What is left on the complement equals the last value: a copy of it, which must not pass for a larger one.
    values = planted(K, gap, 1e-3)
    assert_right(lanczos(as_map(values, kind, 1), K), values, K)


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("copies", [2, 5])
def test_a_small_cluster(copies: int, place: int) -> None:
    values = planted(place, 1e-8, 4e-3, copies)
    A = as_map(values, "rotated", place)
    if (copies, place) != (5, 2):
        assert_right(lanczos(A, 3), values, 3)
        return
    # Two of the three wanted values are copies, three more are outside at the same level: of eight start vectors two
    # reach the default cap of 1000 (one did when near values counted as converged by their residuals alone; the block
    # steps that tell mixtures take about 100, the verification 90 more). They say so; with 200 more all eight converge.
    for seed in (0, 1):
        capped = lanczos(A, 3, seed=seed)
        assert np.abs(capped.values.numpy() - values[:3]).max() < 1e-7
        assert capped.converged or capped.note.startswith("not converged: ")
        assert_right(lanczos(A, 3, seed=seed, max_matvecs=1200), values, 3)


def conv1d(seed: int) -> tuple[ConvMap, Matrix]:
    """Long one-dimensional kernels: frequencies ±f nearly degenerate, as on the benchmark's ``conv1d k9 64-64``."""
    rng = np.random.default_rng(seed)
    channels, width, n = 16, 9, 96
    weight = torch.from_numpy(rng.standard_normal((channels, channels, width))).float()
    dense = np.zeros((channels, n, channels, n))
    for tap in range(width):
        for i in range(n):
            if 0 <= i + tap - width // 2 < n:
                dense[:, i, :, i + tap - width // 2] = weight[:, :, tap].double().numpy()
    truth = np.linalg.svd(dense.reshape(channels * n, channels * n), compute_uv=False)
    return ConvMap(weight, (channels, n), ConvGeometry((1,), ((4, 4),), (1,))), truth


@pytest.mark.parametrize("kernel", range(3))
def test_long_kernels_of_convolutions_in_one_dimension(kernel: int) -> None:
    A, truth = conv1d(kernel)
    for k in (4, K):
        for seed in range(2):
            assert_right(lanczos(A, k, seed=seed), truth, k)


def test_the_operator_it_was_seen_on() -> None:
    # Too large for a dense SVD: ARPACK in float64 on PyTorch's own convolutions, to machine precision.
    weight = np.random.default_rng(10).standard_normal((64, 64, 9)) / math.sqrt(64 * 9)
    single = torch.from_numpy(weight).float()
    double = single.double()

    def normal(x: Matrix) -> Matrix:
        image = F.conv1d(torch.from_numpy(x).reshape(1, 64, 256), double, padding=4)
        return F.conv_transpose1d(image, double, padding=4).reshape(-1).numpy()

    operator = LinearOperator((64 * 256,) * 2, matvec=normal, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(64 * 256)
    found = eigsh(operator, k=10, ncv=60, tol=1e-10, v0=start, return_eigenvectors=False)
    truth = np.sqrt(np.sort(found)[::-1])
    assert truth[6] / truth[7] - 1 < 2e-7 < 1e-5 < truth[7] / truth[8] - 1
    A = ConvMap(single, (64, 256), ConvGeometry((1,), ((4, 4),), (1,)))
    for seed in range(2):
        assert_right(lanczos(A, K, seed=seed), truth, K)
