"""Low-rank products: the truth is the dense product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectool.linear import Composed, DiagonalMap, MatrixMap, Scaled
from spectool.spectrum import svds


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m,r,n", [(90, 4, 70), (40, 1, 300), (300, 16, 33)])
def test_low_rank_products_equal_the_dense_product(m: int, r: int, n: int, dtype: torch.dtype) -> None:
    up, down = matrix(m, r, seed=1, dtype=dtype), matrix(r, n, seed=2, dtype=dtype)
    truth = np.linalg.svd(up.double().numpy() @ down.double().numpy(), compute_uv=False)
    got = svds(Composed(MatrixMap(up), MatrixMap(down)), 20)
    assert got.method == "exact:low-rank"
    np.testing.assert_allclose(got.values, truth[:20], rtol=0, atol=1e-12 * truth[0])
    slack = 1e-12 * truth[0]
    assert all(
        lo <= t + slack and t <= up_ + slack for lo, t, up_ in zip(got.lower, truth, got.upper, strict=False)
    )
    assert got.upper[0] <= got.lower[0] * (1 + 1e-9)
    assert got.values[r:] == (0.0,) * (20 - r)
    assert got.matvecs == 0
    assert got.fro == pytest.approx(np.linalg.norm(truth), rel=1e-12)


def test_chains_with_scales_and_several_factors() -> None:
    up, mid, down = matrix(60, 5, seed=3), matrix(5, 40, seed=4), matrix(40, 50, seed=5)
    scale = matrix(5, seed=6)
    chain = Composed(MatrixMap(up), DiagonalMap(scale, (5,)), MatrixMap(mid), MatrixMap(down))
    truth = np.linalg.svd((up @ torch.diag(scale) @ mid @ down).numpy(), compute_uv=False)
    np.testing.assert_allclose(svds(chain, 5).values, truth[:5], rtol=1e-12)
    scaled = svds(Scaled(Composed(MatrixMap(up), MatrixMap(mid)), 0.25), 3)
    truth = 0.25 * np.linalg.svd((up @ mid).numpy(), compute_uv=False)
    np.testing.assert_allclose(scaled.values, truth[:3], rtol=1e-12)


def test_wide_inner_dimensions_are_no_low_rank_product() -> None:
    chain = Composed(MatrixMap(matrix(30, 20, seed=7)), MatrixMap(matrix(20, 25, seed=8)))
    assert svds(chain, 3).method == "dense"
