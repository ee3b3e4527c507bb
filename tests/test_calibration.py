"""The data metric: covariances of what layers see, and the nearest weights measured by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import spectool
from spectool.api.covariances import tap_covariances
from spectool.checkpoint import open_checkpoint

SHAPE = (1, 2, 7, 7)


def net() -> nn.Module:
    """Two convolutions, one of stride 2 and one of two groups, and a matrix."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


def inputs() -> torch.Tensor:
    """Smooth images: their pixels are far from uncorrelated."""
    rough = torch.randn(200, 2, 7, 7, generator=torch.Generator().manual_seed(3))
    return nn.functional.avg_pool2d(rough, 3, 1, 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    made = tmp_path_factory.mktemp("nets") / "net.pt"
    torch.save(net().state_dict(), made)
    return made


def patches_covariance(images: torch.Tensor) -> np.ndarray:
    """The ridged covariance of 3×3 patches at stride 2, by torch's unfold and numpy."""
    rows = (
        nn.functional.unfold(images, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 18).double().numpy()
    )
    covariance = np.cov(rows, rowvar=False, bias=True)
    return covariance + 0.03 * np.diag(covariance).mean() * np.eye(18)


def dense(weight: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """The matrix of the first convolution and its batch norm, column by column."""
    units = torch.eye(98, dtype=torch.float64).reshape(98, 2, 7, 7)
    folded = weight.double() * scale.reshape(-1, 1, 1, 1)
    return nn.functional.conv2d(units, folded, stride=2, padding=1).flatten(1).T.numpy()


def test_covariances_are_those_of_patches(path: Path) -> None:
    found = tap_covariances((net(), {}), open_checkpoint(path), inputs()).found
    np.testing.assert_allclose(found["0.weight"][0].numpy(), patches_covariance(inputs()), atol=1e-6)
    assert {name: tuple(matrix.shape) for name, matrix in found.items()} == {
        "0.weight": (1, 18, 18), "3.weight": (2, 27, 27), "6.weight": (1, 64, 64)
    }  # fmt: skip


def test_the_data_metric_is_minimised(path: Path, tmp_path: Path) -> None:
    old = torch.load(path, weights_only=True)
    scale = old["1.weight"].double() / (old["1.running_var"].double() + 1e-5).sqrt()
    limit = 0.6 * float(np.linalg.norm(dense(old["0.weight"], scale), 2))
    covariance = patches_covariance(inputs())
    costs = {}
    for name, more in (("plain", {}), ("data", {"calibrate": inputs()})):
        out = tmp_path / f"{name}.pt"
        report = spectool.clip(
            path,
            max={"0.weight": limit},
            out=out,
            exact=True,
            k=1,
            arch=f"{__name__}:net",
            input_shape=SHAPE,
            **more,
        )
        new = torch.load(out, weights_only=True)
        sigma = float(np.linalg.norm(dense(new["0.weight"], scale), 2))
        assert limit * (1 - 3e-4) <= sigma <= limit * (1 + 1e-9)
        rows = ((new["0.weight"] - old["0.weight"]).double().reshape(6, -1) * scale[:, None]).numpy()
        start = (old["0.weight"].double().reshape(6, -1) * scale[:, None]).numpy()
        costs[name] = float(
            np.sqrt(np.trace(rows @ covariance @ rows.T) / np.trace(start @ covariance @ start.T))
        )
        row = next(row for row in report.rows if row.row.layer.startswith("0.weight"))
        assert row.metric == ("data" if more else "folded")
        if more:
            assert row.change == pytest.approx(costs[name], rel=1e-4)
            assert row.change_lower_bound is not None
            assert row.change_lower_bound <= row.change * (1 + 1e-9)
            assert row.change <= 1.01 * row.change_lower_bound
    assert costs["data"] < 0.97 * costs["plain"]
