"""Running means follow clipped weights: closed forms, samples, and networks that run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spectool
from spectool.clip.moments import Moments, moments_of
from spectool.errors import UsageError
from spectool.graph.types import BatchNorm, Node, Opaque

SHAPE = (1, 2, 12, 12)


def net() -> nn.Module:
    """Three conv–BN–ReLU blocks and a head."""
    return nn.Sequential(
        nn.Conv2d(2, 20, 3, 1, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU(),
        nn.Conv2d(20, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 36, 5),
    )  # fmt: skip


def inputs(count: int = 400) -> torch.Tensor:
    """Smooth images whose means are not zero, nor the same at the border."""
    generator = torch.Generator().manual_seed(3)
    rough = torch.randn(count, 2, 12, 12, generator=generator)
    smooth = nn.functional.avg_pool2d(rough, 3, 1, 1)
    hill = torch.hann_window(12, periodic=False)
    return smooth + torch.tensor([1.4, -0.6]).reshape(1, 2, 1, 1) * hill.reshape(12, 1) * hill


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose statistics are those of its inputs."""
    torch.manual_seed(0)
    model = net()
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0.2, 0.4)
    model.train()
    with torch.no_grad():
        model(inputs())
    path = tmp_path_factory.mktemp("nets") / "net.pt"
    torch.save(model.state_dict(), path)
    return path


def clip(path: Path, out: Path, **options: object) -> tuple[dict, spectool.ClipReport]:
    """Clip by a method; return the written tensors and the report."""
    report = spectool.clip(
        path, out=out, k=1, arch=f"{__name__}:net", input_shape=SHAPE, **{"method": "scale", **options}
    )
    return torch.load(out, weights_only=True), report


def test_a_scaled_first_layer_moves_its_mean_by_the_same_factor(trained: Path, tmp_path: Path) -> None:
    old = torch.load(trained, weights_only=True)
    new, report = clip(trained, tmp_path / "o.pt", max={"0.weight": 1.0})
    factor = float((new["0.weight"] / old["0.weight"]).mean())
    assert factor < 0.9
    # 18 taps explain 20 means; the ridge leaves a thousandth or so.
    error = new["1.running_mean"] - factor * old["1.running_mean"]
    assert float(error.norm()) < 2e-3 * float(old["1.running_mean"].norm())
    assert not torch.equal(new["1.running_mean"], old["1.running_mean"])
    for name in ("1.running_var", "1.weight", "1.bias", "3.weight", "4.running_var"):
        assert torch.equal(new[name], old[name]), name
    row = next(row for row in report.rows if row.row.layer.startswith("0.weight"))
    assert row.recentered == ("1.running_mean",)


def test_means_behind_come_nearer_to_what_data_say(trained: Path, tmp_path: Path) -> None:
    old = torch.load(trained, weights_only=True)
    options = {"max": {"0.weight": 1.2}, "method": "auto"}
    alone, _ = clip(trained, tmp_path / "alone.pt", recenter="none", **options)
    moved, _ = clip(trained, tmp_path / "moved.pt", **options)
    truth, report = clip(trained, tmp_path / "truth.pt", calibrate=inputs(), **options)
    assert torch.equal(alone["1.running_mean"], old["1.running_mean"])
    for norm in ("1", "4"):
        scale = old[f"{norm}.running_var"].sqrt()
        wrong = ((alone[f"{norm}.running_mean"] - truth[f"{norm}.running_mean"]) / scale).norm()
        left = ((moved[f"{norm}.running_mean"] - truth[f"{norm}.running_mean"]) / scale).norm()
        assert left < 0.5 * wrong, norm
    assert "1.running_mean" in report.changed


def test_calibrated_means_are_those_of_the_clipped_network(trained: Path, tmp_path: Path) -> None:
    new, report = clip(trained, tmp_path / "o.pt", max={"0.weight": 1.0, "3.weight": 1.0}, calibrate=inputs())
    old = torch.load(trained, weights_only=True)
    moves = {name: (new[name] - old[name]).abs() for name in new if name.endswith("running_mean")}
    assert report.adjusted.keys() == {name for name, move in moves.items() if move.any()} != set()
    for name, shift in report.adjusted.items():
        deviation = old[name.replace("mean", "var")].sqrt()
        assert shift == pytest.approx(float((moves[name] / deviation).max()), rel=1e-3)
    model = net().eval()
    model.load_state_dict(new)
    seen: dict[str, torch.Tensor] = {}
    for name in ("1", "4", "7"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.__setitem__(name, arguments[0].mean((0, 2, 3)))
        )
    with torch.no_grad():
        model(inputs())
    for name, mean in seen.items():
        assert torch.allclose(mean, new[f"{name}.running_mean"], atol=2e-4), name


def test_no_recentre_leaves_every_buffer_alone(trained: Path, tmp_path: Path) -> None:
    old = torch.load(trained, weights_only=True)
    new, report = clip(trained, tmp_path / "o.pt", max=1.0, recenter="none")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == set(report.changed)
    assert all(name.endswith("weight") for name in changed)


def test_inputs_come_from_files(trained: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", inputs=inputs(50).numpy())
    torch.save(inputs(50), tmp_path / "x.pt")
    results = [
        clip(trained, tmp_path / f"{name}.out", max={"0.weight": 1.0}, calibrate=tmp_path / name)[0]
        for name in ("x.npz", "x.pt")
    ]
    assert torch.equal(results[0]["1.running_mean"], results[1]["1.running_mean"])


@pytest.mark.parametrize(
    ("content", "match"),
    [(None, "there is no file"), (b"no archive", "cannot be read as calibration inputs")],
)
def test_bad_calibration_files(trained: Path, tmp_path: Path, content: bytes | None, match: str) -> None:
    path = tmp_path / "bad.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=match):
        clip(trained, tmp_path / "o.pt", max=1.0, calibrate=path)
    assert not (tmp_path / "o.pt").exists()


def test_calibration_needs_a_program_that_may_run(tmp_path: Path) -> None:
    sample = Path(__file__).parents[1] / "sample_models" / "digits_mlp_state.pt"
    with pytest.raises(UsageError, match="no program that may run"):
        spectool.clip(sample, max=1.0, out=tmp_path / "o.pt", calibrate=torch.zeros(4, 64))


def test_moments_of_a_rectified_normal_are_those_of_samples() -> None:
    beta, gamma = torch.tensor([0.5, -1.0, 2.0, 0.3]), torch.tensor([1.0, -0.5, 0.2, 0.0])
    table = {"beta": beta, "gamma": gamma}
    producer = {
        "y": Node("bn", BatchNorm(1e-5), ("x", "gamma", "beta", "mean", "var"), ("y",)),
        "z": Node("relu", Opaque("aten.relu.default"), ("y",), ("z",)),
    }
    factor = np.random.default_rng(1).standard_normal((4, 3))
    old = factor @ factor.T
    old /= np.sqrt(np.diag(old))[:, None] * np.sqrt(np.diag(old))[None, :]
    pair = (torch.from_numpy(old), 0.25 * torch.from_numpy(old))
    found = moments_of(producer, "z", table.__getitem__, {"y": pair})
    assert isinstance(found, Moments)
    source = np.random.default_rng(0).multivariate_normal(np.zeros(4), old, 1_000_000)
    for share, mean, covariance in (
        (1.0, found.mean, found.covariance),
        (0.5, found.new_mean, found.new_covariance),
    ):
        samples = np.maximum(0.0, beta.numpy() + share * gamma.numpy() * source)
        np.testing.assert_allclose(mean.numpy(), samples.mean(0), atol=3e-3)
        truth = np.cov(samples.T)
        np.testing.assert_allclose(np.diag(covariance), np.diag(truth), atol=5e-3)
        # Between channels two terms of a series are taken.
        np.testing.assert_allclose(covariance.numpy(), truth, atol=0.02)
    assert moments_of(producer, "y", table.__getitem__, {}) is None


def test_an_excess_that_was_misjudged_is_so_after_as_well() -> None:
    floor = torch.tensor([0.0, 1.0], dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    before, after = floor + torch.tensor([0.4, 0.1]), floor + torch.tensor([0.2, 0.05])
    found = Moments(before, one, after, one, floor).corrected(torch.tensor([0.1, -0.02], dtype=torch.float64))
    np.testing.assert_allclose(found.mean, [0.5, 1.08])
    np.testing.assert_allclose(found.new_mean, [0.25, 1.04])


class Unknown(nn.Module):
    """A convolution with fewer outputs than taps: its running mean does not tell the mean of its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(4, 2, 3, groups=2), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)).relu()
        return y


@pytest.mark.parametrize("recenter", ["auto", "none"])
def test_a_row_whose_mean_stays_says_why(recenter: str) -> None:
    (row,) = spectool.clip_(Unknown().eval(), 0.3, (1, 4, 6, 6), recenter=recenter).rows
    assert row.recentered == ()
    assert ("means stay: the mean of its input is not known" in row.reason) == (recenter == "auto")
