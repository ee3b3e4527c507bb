"""Weights that a program computes: what is recognised, what only looks like it, and parts and copies of one tensor."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import spectool


def _top(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix, 2))


class Square(nn.Module):
    """A transposed convolution with as many inputs as outputs: nothing but the program tells the rows of its matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.up = parametrizations.spectral_norm(nn.ConvTranspose2d(3, 3, 2, stride=2), n_power_iterations=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x)
        return y


def divisor_of(net: Square) -> float:
    """What spectral norm divides by in evaluation mode."""
    norm, original = net.up.parametrizations.weight[0], net.up.parametrizations.weight.original.detach()
    return float(norm._u @ original.transpose(0, 1).flatten(1) @ norm._v)


def test_the_program_tells_which_axis_spectral_norm_has() -> None:
    net = Square().eval()
    # Vectors that belong to neither matrix.
    net.up.parametrizations.weight[0]._u.copy_(nn.functional.normalize(torch.randn(3), dim=0))
    before, divisor = net.up.weight.detach().double().flatten(1).numpy(), divisor_of(net)
    (row,) = spectool.clip_(net, 0.5 * _top(before), (1, 3, 4, 4)).rows
    after = net.up.weight.detach().double().flatten(1).numpy()
    assert 0.5 * (1 - 3e-4) <= _top(after) / _top(before) <= 0.5 * (1 + 1e-9)
    assert row.raw_change == pytest.approx(row.change, rel=1e-4)
    assert divisor_of(net) == pytest.approx(divisor, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*")
def test_sums_that_cancel_in_a_half_type_are_recognised() -> None:
    """In float64 the program is spectral norm to the last digit; in bfloat16 its divisor is many per cent off."""
    torch.manual_seed(0)
    net = nn.utils.spectral_norm(nn.Linear(48, 32)).to(torch.bfloat16).eval()
    seen = net.weight_orig.detach().T @ net.weight_u
    seen /= seen.norm()
    net.weight_v -= 0.98 * (net.weight_v @ seen) * seen
    run = torch.zeros(1, 48, dtype=torch.bfloat16)
    net(run)
    limit = 0.5 * _top(net.weight.detach().double().numpy())
    (row,) = spectool.clip_(net, limit, (1, 48)).rows
    net(run)
    assert row.action == "clipped"
    assert 0.9 * limit <= _top(net.weight.detach().double().numpy()) <= limit * (1 + 1e-9)


class Lookalike(nn.Module):
    """Parameters named as weight norm's, from which the program makes something else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.weight_g, self.weight_v = nn.Parameter(torch.rand(4, 1) + 1), nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        g, v = self.weight_g, self.weight_v
        length = v.norm(dim=1, keepdim=True)
        made = {
            "right": g * v / length,
            "no norm": g * v,
            "twice": 2 * g * v / length,
            "square": g * v / length**2,
        }
        return nn.functional.linear(x, made[self.how])


@pytest.mark.parametrize("how", ["right", "no norm", "twice", "square"])
def test_names_alone_make_no_weight_norm(how: str) -> None:
    net = Lookalike(how)
    old = copy.deepcopy(net.state_dict())
    (row,) = spectool.clip_(net, 0.3, (1, 6)).rows
    if how == "right":
        assert row.action == "clipped"
        assert (
            _top((net.weight_g * net.weight_v / net.weight_v.norm(dim=1, keepdim=True)).detach().numpy())
            <= 0.3001
        )
        return
    assert row.action == "refused"
    assert "cannot be written back" in row.reason
    assert all(torch.equal(value, old[name]) for name, value in net.state_dict().items())


class Renewing(nn.Module):
    """Spectral norm with a power step in evaluation mode, whose stored vectors are those of the weight already."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight_orig = nn.Parameter(torch.randn(4, 6))
        left, _, right = torch.linalg.svd(self.weight_orig.detach().double())
        self.register_buffer("weight_u", left[:, 0].float())
        self.register_buffer("weight_v", right[0].float())

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight_orig
        u = nn.functional.normalize(w @ self.weight_v, dim=0) + 0 * self.weight_u
        return nn.functional.linear(x, w / torch.dot(u, w @ self.weight_v))


def test_equal_values_alone_make_no_spectral_norm() -> None:
    """What is written goes through the formula; a program that only agrees on the stored values would not."""
    net = Renewing()
    stored = net.weight_orig / (net.weight_u @ net.weight_orig @ net.weight_v)
    torch.testing.assert_close(net(torch.eye(6)).T, stored)
    (row,) = spectool.clip_(net, 0.3, (1, 6)).rows
    assert row.action == "refused"
    assert "cannot be written back" in row.reason


class Shared(nn.Module):
    """One parametrised matrix at two places, which the program computes twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.fc(x).relu())
        return y


def test_a_weight_computed_twice_is_one_weight() -> None:
    net = Shared()
    report = spectool.clip_(net, 0.5, (1, 6))
    assert [row.row.layer for row in report.rows] == ["fc.weight", "fc.weight#2"]
    for row in report.rows:
        assert "2 weights" not in row.solver
        assert row.change <= 1.10 * row.change_lower_bound
    assert 0.5 * (1 - 3e-4) <= _top(net.fc.weight.detach().double().numpy()) <= 0.5 * (1 + 1e-9)


class Attention(nn.Module):
    """Three projections in one tensor, parametrised or not."""

    def __init__(self, parametrised: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        if parametrised:
            parametrizations.weight_norm(self.attention, "in_proj_weight")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


@pytest.mark.parametrize("parametrised", [False, True])
def test_parts_of_one_tensor_are_all_clipped(parametrised: bool) -> None:
    """The last part that was clipped used to overwrite the others."""
    net = Attention(parametrised)
    report = spectool.clip_(net, 0.4, (1, 5, 8))
    assert report.counts["clipped"] == 4
    for part in net.attention.in_proj_weight.detach().double().chunk(3):
        assert 0.4 * (1 - 3e-4) <= _top(part.numpy()) <= 0.4 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(None, torch.float16), (None, torch.bfloat16), (1, torch.float16)]
)
@pytest.mark.parametrize("live", [True, False])
def test_parts_that_share_a_length_obey_together(
    dim: int | None, dtype: torch.dtype, live: bool, tmp_path: Path
) -> None:
    """What was written for one part rounded the others anew, up to 0.5 % above their limit."""
    torch.manual_seed(0)
    net = nn.LSTM(5, 6)
    parametrizations.weight_norm(net, "weight_hh_l0", dim=dim)
    if live:
        net = Attention()
        parametrizations.weight_norm(net.attention, "in_proj_weight", dim=dim)
    net = net.to(dtype).eval()
    if live:
        report = spectool.clip_(net, 0.35, (1, 5, 8))
        parts = net.attention.in_proj_weight.detach().chunk(3)
    else:
        torch.save(net.state_dict(), tmp_path / "net.pt")
        report = spectool.clip(tmp_path / "net.pt", max=0.35, out=tmp_path / "out.pt")
        net.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
        parts = net.weight_hh_l0.detach().chunk(4)
    assert report.exit_code() == 0
    assert max(_top(part.double().numpy()) for part in parts) <= 0.35 * (1 + 1e-9)
    assert max(_top(part.double().numpy()) for part in parts) >= 0.35 * (1 - 1e-2)


def test_gates_of_a_state_dict_are_all_clipped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(nn.LSTM(5, 6).state_dict(), tmp_path / "net.pt")
    spectool.clip(tmp_path / "net.pt", max=0.3, out=tmp_path / "out.pt")
    for name, value in torch.load(tmp_path / "out.pt", weights_only=True).items():
        for gate in value.double().chunk(4) if name.startswith("weight") else ():
            assert 0.3 * (1 - 3e-4) <= _top(gate.numpy()) <= 0.3 * (1 + 1e-9)


class Views(nn.Module):
    """Two matrices that are views of one parameter, given by name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.how, self.w = how, nn.Parameter(torch.randn(5, 5))

    def views(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The two matrices."""
        return {
            "apart": lambda: w.chunk(2),
            "strided": lambda: (w[::2], w[1::2]),
            "overlapping": lambda: (w[:4], w[2:]),
            "whole and part": lambda: (w, w[1:4]),
            "turned": lambda: (w[:3], w.T[:3]),
            "rows and columns": lambda: (w[:4], w[:, :3]),
        }[self.how]()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.views(self.w)
        y: Tensor = nn.functional.linear(x, first).relu().sum() + nn.functional.linear(
            x[:, : second.shape[1]], second
        )
        return y


@pytest.mark.parametrize(
    "how", ["apart", "strided", "overlapping", "whole and part", "turned", "rows and columns"]
)
def test_views_of_one_tensor_are_clipped_to_the_nearest(how: str) -> None:
    """Truth: alternating directions on the tensor. Views used to be weights of their own, and the last one won."""
    net = Views(how)
    old = net.w.detach().double()
    limit = 0.55 * max(_top(view.numpy()) for view in net.views(old))
    rows = [row for row in spectool.clip_(net, limit, (1, 5), exact=True).rows if row.action == "clipped"]
    new = net.w.detach().double()
    assert max(_top(view.numpy()) for view in net.views(new)) <= limit * (1 + 1e-9)
    change = float((new - old).norm())
    assert change <= 1.01 * _least(net, old, limit)
    if how in ("apart", "strided"):
        assert {row.solver for row in rows} == {"svd"}
        parts = [
            float((b - a).norm() / a.norm()) for a, b in zip(net.views(old), net.views(new), strict=True)
        ]
        assert [row.raw_change for row in rows] == pytest.approx(parts, rel=1e-5)
        return
    units = torch.zeros(25, dtype=torch.float64)
    for view in net.views(torch.arange(25).reshape(5, 5)):
        units[view.flatten()] = 1
    size = float((old.flatten() * units).norm())
    for row in rows:
        assert row.change_lower_bound <= row.change <= 1.04 * row.change_lower_bound
        assert row.change == pytest.approx(change / size, rel=1e-5)


def _least(net: Views, old: Tensor, limit: float) -> float:
    """The least change of the tensor, by ADMM."""
    weight, clipped = old, [view.clone() for view in net.views(old)]
    duals = [torch.zeros_like(view) for view in clipped]
    marks = net.views(torch.arange(25).reshape(5, 5))
    for _ in range(3000):
        total, count = old.flatten().clone(), torch.ones(25, dtype=torch.float64)
        for places, z, dual in zip(marks, clipped, duals, strict=True):
            total.index_add_(0, places.flatten(), (z - dual).flatten())
            count.index_add_(0, places.flatten(), torch.ones(places.numel(), dtype=torch.float64))
        weight = (total / count).reshape(5, 5)
        for index, view in enumerate(net.views(weight)):
            left, sizes, right = torch.linalg.svd(view + duals[index], full_matrices=False)
            clipped[index] = left @ (sizes.clamp_max(limit)[:, None] * right)
            duals[index] = duals[index] + view - clipped[index]
    assert max(_top(view.numpy()) for view in net.views(weight)) <= limit * (1 + 1e-4)
    return float((weight - old).norm())
