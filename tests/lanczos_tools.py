"""What the tests of the iterative solvers share."""

from __future__ import annotations

import numpy as np
import torch
from dense import Matrix, spectrum_matrix

from spectool.spectrum.estimate import Estimate
from spectool.spectrum.probabilistic import enclose

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


class Handing:
    """An identity that hands back its argument, or a constant it keeps: solvers must not write into either."""

    in_shape = out_shape = (90,)
    dtype, device = torch.float32, torch.device("cpu")

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        return x

    rmatvec = matvec

    def to(self, *, dtype: object = None, device: object = None) -> Handing:
        return self


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


def random_values(rng: np.random.Generator, n: int) -> Matrix:
    """Spectra of every temper: dense edges, clusters, steps, decay, copies."""
    style = rng.integers(6)
    if style == 0:
        values = rng.random(n)
    elif style == 1:
        values = np.exp(-rng.random() * np.arange(n))
    elif style == 2:
        values = 1 - rng.random(n) ** rng.integers(1, 5)
    elif style == 3:
        values = rng.integers(1, 5, n).astype(np.float64)
    elif style == 4:
        values = np.r_[1 + 1e-6 * rng.random(n // 3), 0.9 * rng.random(n - n // 3)]
    else:
        values = np.abs(rng.standard_cauchy(n))
    return np.sort(np.abs(values) + 1e-9)[::-1]
