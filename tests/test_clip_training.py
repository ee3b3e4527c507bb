"""``SpectralClipper``: truth is numpy's SVD of torch's Jacobian in evaluation mode, after every clip."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import spectool
from spectool.errors import UsageError

SHAPE = (1, 1, 8, 8)


@cache
def images() -> tuple[Tensor, Tensor]:
    """Ten smooth patterns under noise, and which one it is."""
    source = torch.Generator().manual_seed(5)
    coarse = torch.rand(10, 1, 4, 4, generator=source)
    patterns = nn.functional.interpolate(coarse, scale_factor=2.0, mode="bilinear")
    labels = torch.randint(10, (1800,), generator=source)
    noise = 0.15 * torch.randn(1800, 1, 8, 8, generator=source)
    return (patterns[labels] + noise).clamp(0.0, 1.0), labels


def small(*, dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def jacobian_norm(run: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    jacobian = torch.autograd.functional.jacobian(run, torch.zeros(1, *shape, dtype=torch.float64))
    return float(np.linalg.norm(jacobian.reshape(-1, int(np.prod(shape))).numpy(), 2))


def norms(net: nn.Module) -> dict[str, float]:
    """Return the true σ₁ of every operator of ``small``, without touching it."""
    net = copy.deepcopy(net).double().eval().requires_grad_(False)
    return {
        "0.weight + 1.weight": jacobian_norm(net[0:2], (1, 8, 8)),
        "3.weight + 4.weight": jacobian_norm(net[3:5], (6, 4, 4)),
        "8.weight": float(np.linalg.norm(net[8].weight.numpy(), 2)),
    }


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.named_buffers()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


class Training:
    """A few steps on patterns; everything random comes from torch's generator."""

    def __init__(self, net: nn.Module | None = None) -> None:
        self.net = small() if net is None else net
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(1)

    def step(self) -> float:
        x, y = images()
        batch = torch.randint(0, 1500, (32,))
        loss = nn.functional.cross_entropy(self.net(x[batch]), y[batch])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def run(self, steps: int, clipper: spectool.SpectralClipper | None = None) -> None:
        for _ in range(steps):
            self.step()
            if clipper is not None:
                clipper.step()


def test_limits_hold_after_every_clip_and_statistics_stay() -> None:
    training = Training()
    net, losses = training.net, []
    clipper = spectool.SpectralClipper(net, 2.0, every=25, input_shape=SHAPE)
    keys, clipped = list(net.state_dict()), 0
    for number in range(1, 76):
        losses.append(training.step())
        before, weights = statistics(net), {n: p.detach().clone() for n, p in net.named_parameters()}
        sigma = clipper.step()
        assert same(statistics(net), before)
        assert net.training
        if number % 25:
            assert same({n: p.detach() for n, p in net.named_parameters()}, weights)
            continue
        truth = norms(net)
        for key, value in truth.items():
            assert value <= 2.0 * (1 + 1e-4)
            assert sigma[key] == pytest.approx(value, rel=1e-4)
        changed = {n for n, p in net.named_parameters() if not torch.equal(p, weights[n])}
        assert changed <= {"0.weight", "3.weight", "8.weight"}
        clipped += bool(changed)
    assert clipped == 3
    assert list(net.state_dict()) == keys
    assert np.mean(losses[-20:]) < 0.5 < np.mean(losses[:5])
    report = clipper.finish()
    assert all(row.within for row in report.rows)
    assert max(norms(net).values()) <= 2.0 * (1 + 1e-7)


def test_the_composition_goes_down_and_not_up() -> None:
    # The published clip of compositions runs the batch norm in training mode: its saved statistics are polluted,
    # and a composition of 3.64 came out at 6.62.
    net = small()
    net[1].weight.data.mul_(3.0)
    net.train()
    before, saved = norms(net), statistics(net)
    clipper = spectool.SpectralClipper(net, 1.0, every=1, input_shape=SHAPE, layers=["0.weight + 1.weight"])
    clipper.step()
    after = norms(net)
    key = "0.weight + 1.weight"
    assert before[key] > 1.5
    assert 1.0 - 3e-4 <= after[key] <= 1.0 + 1e-4
    assert same(statistics(net), saved)
    assert {name: after[name] for name in after if name != key} == {
        name: before[name] for name in before if name != key
    }


def test_a_limit_that_is_never_reached_changes_no_bit() -> None:
    plain, other = Training(), Training()
    torch.manual_seed(1)
    plain.run(12)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    clipper = spectool.SpectralClipper(other.net, 1e6, every=4, input_shape=SHAPE)
    other.run(12, clipper)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(plain.net.state_dict(), other.net.state_dict())
    assert clipper.applications > 0


def test_estimates_reach_the_truth_and_are_logged() -> None:
    net, seen = small().eval(), []
    clipper = spectool.SpectralClipper(
        net, 1e6, every=1000, input_shape=SHAPE, cheap_steps=2, on_step=lambda sigma: seen.append(dict(sigma))
    )
    for _ in range(30):
        clipper.step()
    assert len(seen) == 30
    for key, value in norms(net).items():
        assert seen[-1][key] == pytest.approx(value, rel=1e-3)
        assert all(logged[key] <= value * (1 + 1e-5) for logged in seen)
    # Four vectors, forth and back, twice, on three operators.
    assert clipper.applications == 30 * 3 * 4 * 2 * 2


def test_schedule() -> None:
    net = small()
    clipper = spectool.SpectralClipper(net, 0.5, every=3, warmup=4, input_shape=SHAPE, layers=["8.weight"])
    tops = []
    for _ in range(7):
        net[8].weight.data.mul_(1.5)
        clipper.step()
        tops.append(norms(net)["8.weight"])
    assert [top <= 0.5 * (1 + 1e-4) for top in tops] == [False] * 5 + [True, False]


def test_half_a_percent_above_is_clipped_and_nothing_above_is_left() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(9, 7)
    limit = float(np.linalg.norm(layer.weight.detach().double().numpy(), 2)) / 1.005
    clipper = spectool.SpectralClipper(layer, limit, every=1)
    assert clipper.clip() == ("weight",)
    kept = layer.weight.detach().clone()
    assert limit * (1 - 1e-5) <= np.linalg.norm(kept.double().numpy(), 2) <= limit * (1 + 1e-4)
    assert clipper.clip() == ()
    assert torch.equal(layer.weight, kept)


def test_resumed_training_is_the_same_bit_by_bit() -> None:
    whole = Training()
    clipper = spectool.SpectralClipper(whole.net, 2.0, every=5, input_shape=SHAPE)
    whole.run(7, clipper)
    file = io.BytesIO()
    torch.save(
        {
            "net": whole.net.state_dict(),
            "optimizer": whole.optimizer.state_dict(),
            "clipper": clipper.state_dict(),
            "random": torch.get_rng_state(),
        },
        file,
    )
    whole.run(5, clipper)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Training()
    fresh = spectool.SpectralClipper(again.net, 2.0, every=5, input_shape=SHAPE)
    again.net.load_state_dict(saved["net"])
    again.optimizer.load_state_dict(saved["optimizer"])
    fresh.load_state_dict(saved["clipper"])
    torch.set_rng_state(saved["random"])
    again.run(5, fresh)
    assert same(whole.net.state_dict(), again.net.state_dict())
    assert dict(clipper.sigma) == dict(fresh.sigma)
    assert clipper.applications == fresh.applications
    assert same(clipper.state_dict()["rows"], fresh.state_dict()["rows"])


def test_autocast_does_not_reach_inside() -> None:
    nets = small(), small()
    results = []
    for net, mixed in zip(nets, (False, True), strict=True):
        clipper = spectool.SpectralClipper(net, 0.3, every=1, input_shape=SHAPE)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            results.append(dict(clipper.step()))
    assert results[0] == results[1]
    assert same(nets[0].state_dict(), nets[1].state_dict())
    assert max(norms(nets[1]).values()) <= 0.3 * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    net = small().to(dtype)
    limit = 0.6 * min(norms(net).values())
    clipper = spectool.SpectralClipper(net, limit, every=1, input_shape=SHAPE)
    clipper.step()
    assert max(norms(net).values()) <= limit * (1 + 1e-4)
    assert {p.dtype for p in net.parameters()} == {dtype}


@pytest.fixture
def alone() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrapper", ["ddp", "ddp of compile"])
def test_wrapped_models_train_as_they_are(wrapper: str) -> None:
    net = small(dropout=0.0)
    wrapped: Any = torch.compile(net, backend="eager") if "compile" in wrapper else net
    if "ddp" in wrapper:
        wrapped = DistributedDataParallel(wrapped)
    training = Training(wrapped)
    keys = list(wrapped.state_dict())
    clipper = spectool.SpectralClipper(wrapped, 1.0, every=2, input_shape=SHAPE)
    training.run(4, clipper)
    assert list(wrapped.state_dict()) == keys
    assert set(clipper.sigma) == {"0.weight + 1.weight", "3.weight + 4.weight", "8.weight"}
    bare = small()
    bare.load_state_dict(net.state_dict())
    assert max(norms(bare).values()) <= 1.0 + 1e-4


def test_weights_replaced_after_the_start_are_seen() -> None:
    net = small()
    clipper = spectool.SpectralClipper(net, 0.5, every=1, input_shape=SHAPE)
    other = {name: value * 1.7 for name, value in small().state_dict().items()}
    net.load_state_dict(other, assign=True)
    clipper.step()
    assert max(norms(net).values()) <= 0.5 * (1 + 1e-4)


def test_a_model_moved_to_another_type_is_followed() -> None:
    net = small()
    clipper = spectool.SpectralClipper(net, 0.5, every=1, input_shape=SHAPE)
    net.to(torch.bfloat16)
    net[1].running_var.mul_(0.1)
    net[1].weight.data.mul_(1.5)
    clipper.step()
    assert max(norms(net).values()) <= 0.5 * (1 + 1e-4)
    assert all(row.within for row in clipper.finish().rows)
    assert max(norms(net).values()) <= 0.5 * (1 + 1e-9)


class Residual(nn.Module):
    def __init__(self, fixed: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.fixed = nn.Linear(5, 5, bias=False), fixed

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fixed * x + self.inner(x)
        return y


def test_a_branch_without_weights_counts() -> None:
    net = Residual(0.5)
    clipper = spectool.SpectralClipper(net, 0.8, every=1, input_shape=(1, 5))
    (key,) = clipper.step()
    truth = np.linalg.norm(0.5 * np.eye(5) + net.inner.weight.detach().double().numpy(), 2)
    assert 0.8 * (1 - 3e-4) <= truth <= 0.8 * (1 + 1e-4)
    assert clipper.sigma[key] == pytest.approx(truth, rel=1e-4)


def test_a_limit_out_of_reach_is_said_once_and_training_goes_on() -> None:
    # What the network only reads cannot be changed by its weight: rows and columns beyond it stay 1.
    net = nn.Sequential(Shared(), nn.ReLU(), nn.Linear(6, 2))
    clipper = spectool.SpectralClipper(net, 0.5, every=1, input_shape=(1, 6))
    with pytest.warns(UserWarning, match="not clipped: 1"):
        clipper.step()
    kept = net[0].inner.weight.detach().clone()
    clipper.step()
    assert len(clipper.refused) == 1
    assert torch.equal(net[0].inner.weight, kept)
    assert float(np.linalg.norm(net[2].weight.detach().double().numpy(), 2)) <= 0.5 * (1 + 1e-4)


class Shared(nn.Module):
    """Half of the input goes through a layer, half of it past it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(x[:, :3]), x[:, 3:]], dim=1)


def test_weights_that_are_not_finite_are_logged_and_left() -> None:
    net = small()
    clipper = spectool.SpectralClipper(net, 0.5, every=1, input_shape=SHAPE)
    clipper.step()
    kept = net[0].weight.detach().clone()
    net[8].weight.data[0, 0] = math.nan
    sigma = clipper.step()
    assert math.isnan(sigma["8.weight"])
    assert torch.equal(net[0].weight, kept)
    net[8].weight.data[0, 0] = 100.0
    clipper.step()
    assert norms(net)["8.weight"] <= 0.5 * (1 + 1e-4)


def test_a_weight_that_cannot_be_set_is_said() -> None:
    torch.manual_seed(0)
    hidden = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    net = nn.Sequential(hidden, nn.ReLU(), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=r"not clipped: 1 \(0.weight"):
        clipper = spectool.SpectralClipper(net, 0.5, every=1, input_shape=(1, 4))
    assert list(clipper.refused) == ["0.weight"]
    clipper.step()
    assert clipper.sigma["0.weight"] == pytest.approx(1.0, rel=1e-4)
    assert clipper.sigma["2.weight"] <= 0.5 * (1 + 1e-4)


def test_what_cannot_be_used_is_said() -> None:
    net = small()
    for options in ({"every": 0}, {"warmup": -1}, {"cheap_steps": 1.5}, {"triplets": True}):
        with pytest.raises(UsageError, match=r"is no whole number from \d up"):
            spectool.SpectralClipper(net, 1.0, input_shape=SHAPE, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="matches no row"):
        spectool.SpectralClipper(net, {"layer9.*": 1.0}, input_shape=SHAPE)
    first = spectool.SpectralClipper(net, 1.0, input_shape=SHAPE)
    second = spectool.SpectralClipper(net, 1.0, input_shape=SHAPE, layers=["8.weight"])
    with pytest.raises(UsageError, match="another model or selection"):
        second.load_state_dict(first.state_dict())


# --- the page --------------------------------------------------------------------------------------------------


def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "training.md", "exec"), names)
    assert "could not be clipped" not in capsys.readouterr().out
    assert len(names["log"]) == 40
    model = names["model"].double().eval().requires_grad_(False)
    assert jacobian_norm(model[0:2], (1, 8, 8)) <= 1.5 * (1 + 1e-6)
    assert float(np.linalg.norm(model[4].weight.numpy(), 2)) <= 1.0 + 1e-6
