"""The data metric for every kind of layer.

Truth: what the new weights do to the layer's outputs, by running torch's own layer on the calibration inputs; the
least change by an alternating-direction solver in numpy on dense matrices; and random weights within the limit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import spectool
from spectool.api import covariances
from spectool.clip import measure
from spectool.clip.coordinates import Covariance, Rows
from spectool.clip.weighted import nearest_matrix
from spectool.report.clip import ClipRow

Array = NDArray[np.float64]
SIDE = 5


def layers() -> dict[str, nn.Module]:
    """The kinds of layers, small enough to be dense."""
    torch.manual_seed(5)
    return {
        "conv": nn.Conv2d(4, 3, 3, padding=1),
        "stride, dilation": nn.Conv2d(4, 3, 2, stride=2, dilation=2, padding=1),
        "circular": nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
        "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
        "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "transposed": nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        "transposed, groups": nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
        "weight norm": parametrizations.weight_norm(nn.Conv2d(4, 3, 3, padding=1)),
        "matrix": nn.Linear(SIDE, 4),
        "1x1": nn.Conv2d(4, 5, 1, stride=2),
        "windows": nn.Conv2d(4, 3, 2, stride=2),
        "transposed windows": nn.ConvTranspose2d(4, 3, 2, stride=2),
    }


class Net(nn.Module):
    """A convolution, which mixes what the layer in question sees, and that layer."""

    def __init__(self, kind: str = "conv") -> None:
        super().__init__()
        self.layer = layers()[kind]
        torch.manual_seed(1)
        self.first = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.first(x).relu())
        return y


def factory(kind: str = "conv") -> Net:
    """What ``--arch`` calls."""
    return Net(kind)


def images() -> Tensor:
    """Smooth images: their pixels are far from uncorrelated."""
    rough = torch.randn(60, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    return nn.functional.avg_pool2d(rough, 3, 1, 1)


class Truth:
    """One layer, its dense operator and what it does to data, all by torch's own layer in float64."""

    def __init__(self, kind: str) -> None:
        net = Net(kind).double()
        with torch.no_grad():
            self.seen = net.first(images().double()).relu()
            self.weight = net.layer.weight.detach().clone()
        self.layer = layers()[kind].double()
        if kind == "weight norm":
            torch.nn.utils.parametrize.remove_parametrizations(self.layer, "weight")
        self.layer.requires_grad_(False).bias.zero_()
        self.shape = (SIDE,) if kind == "matrix" else (4, SIDE, SIDE)
        self.ridge = 0.03 * self._variance()

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """The layer with another weight."""
        self.layer.weight.copy_(weight)
        y: Tensor = self.layer(x)
        return y

    def _variance(self) -> float:
        """The mean variance of a tap, over samples and positions: that of the output of one tap alone."""
        # Every tap is there once for each output of its group, all equally often.
        return float(np.mean([self.spread(unit, ridge=False) for unit in self.units()]))

    def spread(self, change: Tensor, *, ridge: bool = True) -> float:
        """The mean square that a change of the weight makes in the outputs, means off, summed over channels."""
        y = self.apply(change, self.seen)
        y = y if isinstance(self.layer, nn.Linear) else y.movedim(1, -1)
        y = y.reshape(-1, y.shape[-1])
        made = float((y - y.mean(dim=0)).square().mean(dim=0).sum())
        return made + self.ridge * float(change.square().sum()) if ridge else made

    def matrix(self, weight: Tensor) -> Array:
        """The dense operator."""
        units = torch.eye(int(np.prod(self.shape)), dtype=torch.float64).reshape(-1, *self.shape)
        return self.apply(weight, units).flatten(1).T.numpy()

    def top(self, weight: Tensor) -> float:
        """σ₁."""
        return float(np.linalg.norm(self.matrix(weight), 2))

    def units(self) -> list[Tensor]:
        """The weights with one entry."""
        return list(torch.eye(self.weight.numel(), dtype=torch.float64).reshape(-1, *self.weight.shape))

    def least(self, limit: float, steps: int) -> float:
        """The least ``spread`` of a change within the limit, by ADMM on W and Z = A(W), ‖Z‖ ≤ limit."""
        basis = np.stack([self.matrix(unit).ravel() for unit in self.units()], axis=1)
        gram = self._quadratic()
        start = self.weight.numpy().ravel()
        shape = self.matrix(self.weight).shape
        rho = np.trace(gram) / np.trace(basis.T @ basis) * 20
        solve = np.linalg.inv(gram + rho * basis.T @ basis)
        z, dual = basis @ start, np.zeros(basis.shape[0])
        w = start
        for _ in range(steps):
            w = solve @ (gram @ start + rho * basis.T @ (z - dual))
            # LAPACK's divide and conquer fails where values coincide to the last digit.
            moved = (basis @ w + dual).reshape(shape)
            u, s, v = scipy.linalg.svd(moved, full_matrices=False, lapack_driver="gesvd")
            z = ((u * np.minimum(s, limit)) @ v).ravel()
            dual += basis @ w - z
        assert np.linalg.norm((basis @ w).reshape(shape), 2) <= limit * (1 + 1e-3)
        return float((w - start) @ gram @ (w - start))

    def _quadratic(self) -> Array:
        """The matrix of ``spread``, by polarisation."""
        units = self.units()
        own = np.array([self.spread(unit) for unit in units])
        made = np.zeros((len(units), len(units)))
        for i, first in enumerate(units):
            made[i, i] = own[i]
            for j in range(i):
                made[i, j] = made[j, i] = 0.5 * (self.spread(first + units[j]) - own[i] - own[j])
        return made


def clipped(kind: str, limit: float, folder: Path, **options: object) -> tuple[ClipRow, Tensor]:
    """The row and the new weight, as torch computes it."""
    torch.save(Net(kind).state_dict(), folder / "net.pt")
    report = spectool.clip(
        folder / "net.pt",
        max={"layer*": limit},
        out=folder / "out.pt",
        arch=f"{__name__}:factory",
        arch_args={"kind": kind},
        input_shape=(1, 2, SIDE, SIDE),
        calibrate=images(),
        exact=True,
        k=1,
        **options,
    )
    again = Net(kind)
    again.load_state_dict(torch.load(folder / "out.pt", weights_only=True))
    return next(row for row in report.rows if row.action == "clipped"), again.layer.weight.detach().double()


@pytest.mark.parametrize("kind", list(layers()))
def test_the_change_is_that_of_the_outputs(kind: str, tmp_path: Path) -> None:
    truth = Truth(kind)
    limit = 0.6 * truth.top(truth.weight)
    row, weight = clipped(kind, limit, tmp_path)
    assert row.metric == "data"
    assert "not data" not in row.reason
    assert limit * (1 - 3e-4) <= truth.top(weight) <= limit * (1 + 1e-9)
    change = (truth.spread(weight - truth.weight) / truth.spread(truth.weight)) ** 0.5
    assert row.change == pytest.approx(change, rel=1e-4)
    assert row.change_lower_bound <= row.change <= 1.01 * row.change_lower_bound
    assert row.change < row.change_scaling
    # No other weights within the limit change less.
    source, size = torch.Generator().manual_seed(0), truth.weight.norm()
    for width in (0.01, 0.1, 0.5, 1.0) * 8:
        near = truth.weight if width > 0.2 else weight
        other = near + width * size / near.numel() ** 0.5 * torch.randn(
            near.shape, generator=source, dtype=torch.float64
        )
        other *= min(1.0, limit / truth.top(other))
        assert (
            truth.spread(other - truth.weight) / truth.spread(truth.weight)
        ) ** 0.5 >= row.change_lower_bound


@pytest.mark.parametrize("kind", ["depthwise", "transposed, groups", "matrix", "stride, dilation"])
def test_the_lower_bound_is_below_the_least_change(kind: str, tmp_path: Path) -> None:
    truth = Truth(kind)
    limit = 0.6 * truth.top(truth.weight)
    row, _ = clipped(kind, limit, tmp_path)
    least = (truth.least(limit, 250) / truth.spread(truth.weight)) ** 0.5
    assert row.change_lower_bound <= least * (1 + 1e-4)
    assert least * (1 - 1e-3) <= row.change <= least * 1.01


def test_every_batch_and_chunk_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(covariances, "_BATCH", 7)
    monkeypatch.setattr(covariances, "_CHUNK", 3000)
    monkeypatch.setattr(covariances, "_PLAIN", 4)  # products in float32
    truth = Truth("groups")
    row, weight = clipped("groups", 0.6 * truth.top(truth.weight), tmp_path)
    change = (truth.spread(weight - truth.weight) / truth.spread(truth.weight)) ** 0.5
    assert row.change == pytest.approx(change, rel=1e-4)


class Fallbacks(nn.Module):
    """What the data metric cannot measure: a chain, an attention, and a layer with more taps than are kept."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.chain = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))
        self.wide = nn.Linear(25, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0].relu()
        made: Tensor = self.wide(self.chain(y).relu().flatten(1))
        return made


def reasons(folder: Path, inputs: Tensor, **options: object) -> dict[str, tuple[str | None, str]]:
    torch.save(Fallbacks().state_dict(), folder / "net.pt")
    report = spectool.clip(
        folder / "net.pt", max=0.2, dry_run=True, arch=f"{__name__}:Fallbacks", input_shape=(1, 5, 6), calibrate=inputs,
        **options,
    )  # fmt: skip
    return {row.row.layer: (row.metric, row.reason) for row in report.rows if row.action == "clipped"}


def test_a_row_says_why_it_is_not_measured_by_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(covariances, "TAPS", 24)
    found = reasons(tmp_path, torch.randn(9, 5, 6))
    wanted = {
        "attention.in_proj_weight[0:6]": "no convolution or linear layer of the network has it",
        "attention.out_proj.weight": "its layer was not called",
        "chain.0.weight + chain.1.weight": "several weights at once",
        "wide.weight": "25 taps to an output, and covariances are made of 24",
    }
    for key, reason in wanted.items():
        assert found[key][0] == "weights"
        assert f"metric weights, not data: {reason}" in found[key][1]


def test_other_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"layers": ["wide.*"]}
    assert reasons(tmp_path, torch.randn(9, 5, 6), **options) == {"wide.weight": ("data", "")}
    assert "saw nothing that varies" in reasons(tmp_path, torch.ones(9, 5, 6), **options)["wide.weight"][1]
    assert (
        "scale does not minimise it"
        in reasons(tmp_path, torch.randn(9, 5, 6), method="scale", **options)["wide.weight"][1]
    )


def test_a_kernel_may_be_too_large_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_TURNED", 100)
    truth = Truth("conv")
    row, _ = clipped("conv", 0.6 * truth.top(truth.weight), tmp_path)
    assert row.metric == "weights"
    assert "metric weights, not data: 108 entries" in row.reason
    truth = Truth("matrix")
    limit = 0.6 * truth.top(truth.weight)
    assert clipped("matrix", limit, tmp_path, force=True)[0].metric == "data"
    monkeypatch.setattr(measure, "WORK", 79)
    assert "a matrix 4×5 takes too long" in clipped("matrix", limit, tmp_path, force=True)[0].reason


def test_a_matrix_with_more_weights_than_pairs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(wide().state_dict(), tmp_path / "net.pt")
    inputs = torch.randn(200, 40) @ torch.randn(40, 40)
    old = torch.load(tmp_path / "net.pt", weights_only=True)["0.weight"].double()
    limit = 0.5 * float(torch.linalg.matrix_norm(old, 2))
    (row,) = spectool.clip(
        tmp_path / "net.pt", max=limit, out=tmp_path / "out.pt", calibrate=inputs,
        arch=f"{__name__}:wide", input_shape=(1, 40),
    ).rows  # fmt: skip
    new = torch.load(tmp_path / "out.pt", weights_only=True)["0.weight"].double()
    covariance = np.cov(inputs.double().numpy(), rowvar=False, bias=True)
    covariance += 0.03 * np.trace(covariance) / 40 * np.eye(40)
    cost = [float(np.trace(w.numpy() @ covariance @ w.numpy().T)) for w in (new - old, old)]
    assert row.metric == "data"
    assert row.change == pytest.approx((cost[0] / cost[1]) ** 0.5, rel=1e-4)
    assert row.change <= 1.05 * row.change_lower_bound
    assert limit * (1 - 3e-4) <= float(torch.linalg.matrix_norm(new, 2)) <= limit * (1 + 1e-9)


def wide() -> nn.Module:
    """One matrix."""
    return nn.Sequential(nn.Linear(40, 36))


@pytest.mark.parametrize("share", [0.5, 1e-6])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (5, 1)])
def test_the_nearest_matrix_obeys_and_nothing_is_nearer(shape: tuple[int, int], share: float) -> None:
    source = np.random.default_rng(0)
    start, factor = (
        source.standard_normal(shape),
        source.standard_normal((shape[1], shape[1])) + 2 * np.eye(shape[1]),
    )
    root = np.linalg.cholesky(factor @ factor.T)
    limit = share * float(np.linalg.norm(start, 2))
    made = nearest_matrix(torch.from_numpy(start), torch.from_numpy(root), limit, gap=0.001)
    assert np.linalg.norm(made.weight.numpy(), 2) <= limit * (1 + 1e-9)
    change = np.linalg.norm((made.weight.numpy() - start) @ root)
    assert made.lower <= change <= 1.001 * made.lower
    for width in np.geomspace(1e-4, 3, 40):
        other = made.weight.numpy() + width * limit * source.standard_normal(shape)
        other *= min(1.0, limit / np.linalg.norm(other, 2))
        assert np.linalg.norm((other - start) @ root) >= made.lower


@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("plain", [4, 512])
def test_numbers_whose_squares_no_float32_holds(
    size: float, plain: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(covariances, "_PLAIN", plain)
    inputs = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3.0, 40)
    wanted, row = (_one_matrix(inputs * factor, tmp_path) for factor in (1.0, size))
    assert (wanted.metric, row.metric) == ("data", "data")
    assert row.change == pytest.approx(wanted.change, rel=1e-4)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e3, 1e-30])
def test_what_only_roundings_vary_is_constant(value: float, tmp_path: Path) -> None:
    inputs = torch.full((50, 40), value)
    inputs[1::2] = inputs[1::2].nextafter(torch.tensor(np.inf))
    assert "its layer saw nothing that varies" in _one_matrix(inputs, tmp_path).reason


def test_a_covariance_that_has_no_factor_is_not_used() -> None:
    matrix = torch.tensor([[[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    root = Covariance(matrix, Rows(groups=2)).root
    assert bool(root[0].isnan().all())
    assert torch.equal(root[1], matrix[1])


def _one_matrix(inputs: Tensor, folder: Path) -> ClipRow:
    torch.manual_seed(0)
    torch.save(wide().state_dict(), folder / "net.pt")
    (row,) = spectool.clip(
        folder / "net.pt", max=0.5, dry_run=True, calibrate=inputs, arch=f"{__name__}:wide", input_shape=(1, 40), k=1
    ).rows  # fmt: skip
    return row


class Tied(nn.Module):
    """One matrix at two places that see different data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.between(x))
        return y

    def between(self, x: Tensor) -> Tensor:
        """What the second place sees."""
        return torch.tanh(self.a(x)).flip(1) * torch.tensor([9.0, 0.1, 1.0, 3.0])


def test_all_layers_that_share_a_weight_count(tmp_path: Path) -> None:
    net = Tied()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    inputs = torch.randn(99, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [0.1, 3.0, 1.0, 1.0]
    )
    rows = spectool.clip(
        tmp_path / "net.pt", max=0.5, out=tmp_path / "out.pt", calibrate=inputs, arch=f"{__name__}:Tied",
        input_shape=(1, 4), exact=True,
    ).rows  # fmt: skip
    new = torch.load(tmp_path / "out.pt", weights_only=True)["a.weight"].double().numpy()
    with torch.no_grad():
        old, seen = net.a.weight.double().numpy(), (inputs, net.between(inputs))
    covariance = sum(np.cov(x.double().numpy(), rowvar=False, bias=True) for x in seen)
    covariance += 0.03 * np.trace(covariance) / 4 * np.eye(4)
    cost = [float(np.trace(w @ covariance @ w.T)) for w in (new - old, old)]
    clipped_rows = [row for row in rows if row.action == "clipped"]
    assert clipped_rows
    for row in clipped_rows:
        assert row.metric == "data"
        assert row.change == pytest.approx((cost[0] / cost[1]) ** 0.5, rel=1e-4)
        assert row.change <= 1.01 * row.change_lower_bound
