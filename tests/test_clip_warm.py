"""What training adds to the projections: rows that follow a weight, and projections that start from them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from spectool.clip.family import ConvFamily
from spectool.clip.warm import first_rows, follow, thorough, warm_bundle, warm_svd
from spectool.linear import ConvGeometry, MatrixMap


def test_following_gives_the_leading_values_whatever_the_scale() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(30, 20)
    truth = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    for factor in (1e-12, 1.0, 1e12):
        A = MatrixMap(matrix * factor)
        rows = first_rows(A, 4, torch.Generator().manual_seed(0))
        values, rows = follow(A, rows, 60)
        np.testing.assert_allclose(values[:2].numpy() / factor, truth[:2], rtol=1e-3)
        assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-5)
    values, rows = follow(MatrixMap(torch.zeros(3, 5)), torch.eye(2, 5), 1)
    assert values.tolist() == [0.0, 0.0]
    assert torch.isfinite(rows).all()


def test_kept_triplets_give_the_projection_of_a_large_matrix() -> None:
    torch.manual_seed(0)
    left, right = (np.linalg.qr(torch.randn(n, 520).double().numpy())[0] for n in (600, 520))
    values = np.concatenate([[3.0, 2.5, 2.0], np.linspace(1.4, 0.1, 517)])
    matrix = torch.tensor(left @ np.diag(values) @ right.T, dtype=torch.float32)
    wanted = left @ np.diag(np.minimum(values, 1.5)) @ right.T
    rows = torch.tensor(right[:, :4].T + 0.01, dtype=torch.float32)
    made = warm_svd(matrix, 1.5, rows, torch.Generator().manual_seed(0))
    assert made is not None
    np.testing.assert_allclose(made[0].numpy(), wanted, atol=1e-5)
    assert warm_svd(matrix, 0.5, rows, torch.Generator().manual_seed(0)) is None


def test_the_warm_projection_obeys_and_changes_less_than_scaling() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    geometry = ConvGeometry((1, 1), ((1, 1), (1, 1)), (1, 1))
    family = ConvFamily(weight, (4, 6, 6), geometry)

    def norm(w: Tensor) -> float:
        jacobian = torch.autograd.functional.jacobian(
            lambda x: nn.functional.conv2d(x, w, padding=1), torch.zeros(1, 4, 6, 6, dtype=torch.float64)
        )
        return float(np.linalg.norm(jacobian.reshape(-1, 144).numpy(), 2))

    top = norm(weight)
    source = torch.Generator().manual_seed(0)
    rows = first_rows(family.at(weight), 4, source)
    made = warm_bundle(family, 0.9 * top, rows, source)
    assert made is not None
    assert 0.9 * top * (1 - 1e-3) <= norm(made.weight) <= 0.9 * top * (1 + 1e-4)
    # Scaling changes it by 0.1.
    assert float((made.weight - weight).norm() / weight.norm()) < 0.08
    assert made.gap <= 0.05


def test_a_value_that_rose_beside_converged_rows_is_found() -> None:
    # The kept rows are singular vectors to the last digit; a random row beside them alone ended the iteration.
    torch.manual_seed(0)
    left, right = (np.linalg.qr(torch.randn(n, n).double().numpy())[0] for n in (60, 60))
    values = np.concatenate([np.full(8, 1.0), [1.003], np.linspace(0.99, 0.1, 51)])
    A = MatrixMap(torch.tensor(left @ np.diag(values) @ right.T, dtype=torch.float32))
    rows = torch.tensor(right[:, :4].T.copy(), dtype=torch.float32)
    for seed in range(10):
        found = thorough(A, rows, torch.Generator().manual_seed(seed), 4)
        assert abs(float(found.values[0]) - 1.003) <= 1e-4
