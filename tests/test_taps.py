"""What running statistics say of the inputs, against dense covariances written out with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectool.clip import taps

CHANNELS, TAPS, ROWS = 4, 3, 40


def written_out(shares: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """The covariance of all taps of all channels under the four models, channels outermost."""
    diagonal, ones, eye = np.diag(np.diag(covariance)), np.ones((TAPS, TAPS)), np.eye(TAPS)
    models = [
        np.kron(diagonal, eye),
        np.kron(diagonal, ones),
        np.kron(covariance, ones),
        np.kron(covariance, eye),
    ]
    return sum(share * model for share, model in zip(shares, models, strict=True))


def problem(seed: int, *, together: bool = False) -> tuple[np.random.Generator, np.ndarray, torch.Tensor]:
    """A generator, a covariance, and what stands for it."""
    rng = np.random.default_rng(seed)
    if together:
        deviation = rng.uniform(0.5, 2.0, CHANNELS)
        return rng, np.outer(deviation, deviation), torch.from_numpy(deviation)
    factor = rng.standard_normal((CHANNELS, CHANNELS))
    covariance = factor @ factor.T
    return rng, covariance, torch.from_numpy(covariance)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("largest", [2048, 8])
def test_outputs_vary_as_the_dense_covariance_says(
    together: bool, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps, "LARGEST", largest)
    rng, covariance, held = problem(0, together=together)
    sigma = written_out(np.array([0.4, 0.0, 0.9, 0.3]), covariance)
    old, new = rng.standard_normal((2, ROWS, CHANNELS * TAPS))
    narrow = np.diag(rng.uniform(0.3, 0.9, CHANNELS))
    after = narrow @ covariance @ narrow
    moved = written_out(np.array([0.4, 0.0, 0.9, 0.3]), after)
    variance = np.einsum("oi,ij,oj->o", old, sigma, old)
    found = taps.outputs(
        torch.from_numpy(old)[None],
        torch.from_numpy(new)[None],
        held,
        torch.from_numpy(narrow) @ held if together else torch.from_numpy(after),
        torch.from_numpy(variance),
    )
    assert found is not None
    unit = 1.0 / np.sqrt(variance)
    truth = new @ moved @ new.T * unit[:, None] * unit[None, :]
    np.testing.assert_allclose(taps.variances(found[0]), 1.0, rtol=1e-6)
    np.testing.assert_allclose(taps.variances(found[1]), np.diag(truth), rtol=1e-5)
    if largest > ROWS:
        np.testing.assert_allclose(found[1], truth, atol=1e-5 * np.abs(truth).max())


def test_groups_are_a_block_diagonal_matrix() -> None:
    rng, _, held = problem(1)
    old, new = rng.standard_normal((2, 2, ROWS // 2, CHANNELS // 2, TAPS))
    dense = np.zeros((2, ROWS, CHANNELS, TAPS))
    for which, weight in enumerate((old, new)):
        dense[which, : ROWS // 2, : CHANNELS // 2], dense[which, ROWS // 2 :, CHANNELS // 2 :] = weight
    variance = torch.from_numpy(rng.uniform(0.5, 2.0, ROWS))
    grouped = taps.outputs(
        *(torch.from_numpy(weight).flatten(2) for weight in (old, new)), held, 0.5 * held, variance
    )
    whole = taps.outputs(
        *(torch.from_numpy(weight).flatten(1)[None] for weight in dense), held, 0.5 * held, variance
    )
    assert grouped is not None
    assert whole is not None
    for some, other in zip(grouped, whole, strict=True):
        np.testing.assert_allclose(some, other, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_means_are_the_posterior_of_normal_errors(groups: int) -> None:
    rng = np.random.default_rng(2)
    rows, channels = ROWS // groups, CHANNELS // groups
    matrix = rng.standard_normal((groups, rows, channels * TAPS))
    deviation, variance = rng.uniform(0.5, 2.0, CHANNELS), rng.uniform(1.0, 3.0, ROWS)
    missing = rng.standard_normal(ROWS)
    found = taps.explained(*(torch.from_numpy(x) for x in (matrix, missing, deviation, variance)))
    for group in range(groups):
        own = slice(group * rows, (group + 1) * rows)
        scale = np.diag(deviation[group * channels : (group + 1) * channels] ** 2)
        prior = np.kron(scale, 0.2**2 * np.ones((TAPS, TAPS)) + 0.05**2 * np.eye(TAPS))
        weight, noise = matrix[group], np.diag(0.02**2 * variance[own])
        truth = prior @ weight.T @ np.linalg.solve(weight @ prior @ weight.T + noise, missing[own])
        np.testing.assert_allclose(found[group], truth, rtol=1e-6, atol=1e-9)


def test_shapes_that_do_not_go_together_say_nothing() -> None:
    weight = torch.randn(1, 4, 6, dtype=torch.float64)
    assert taps.outputs(weight, weight, torch.ones(4), torch.ones(4), torch.ones(4)) is None
