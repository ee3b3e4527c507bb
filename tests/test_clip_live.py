"""``clip_``: truth is numpy's SVD of torch's own Jacobian of the module in evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import spectool
from spectool.errors import NothingToAnalyse, UsageError

SHAPE = (1, 2, 6, 6)


def jacobian_norm(run: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    """Return σ₁ of the Jacobian of a function on one input."""
    jacobian = torch.autograd.functional.jacobian(run, torch.zeros(1, *shape, dtype=torch.float64))
    return float(np.linalg.norm(jacobian.reshape(-1, int(np.prod(shape))).numpy(), 2))


def norms(net: nn.Module) -> list[float]:
    """Return σ₁ of conv∘BN, conv∘BN and the linear layer of ``small``."""
    net = copy.deepcopy(net).double().eval().requires_grad_(False)
    return [
        jacobian_norm(net[0:2], (2, 6, 6)),
        jacobian_norm(net[3:5], (4, 6, 6)),
        float(np.linalg.norm(net[7].weight.numpy(), 2)),
    ]


def small(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4, **options),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    for _ in range(3):
        net(torch.randn(16, *SHAPE[1:]) * 2 + 1)
    return net


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_conv_bn_is_clipped_in_place_and_nothing_else_moves() -> None:
    net = small().to(memory_format=torch.channels_last)
    net.train()
    net[1].eval()
    net[3].weight.requires_grad_(False)
    net[7].weight.grad = torch.ones_like(net[7].weight)
    seen: list[object] = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    objects = {name: (id(p), p.data_ptr(), p.stride(), p.requires_grad) for name, p in net.named_parameters()}
    hooks = [list(child._forward_hooks) for child in net.modules()]
    flags = [child.training for child in net.modules()]
    before, top, random = state(net), norms(net), torch.get_rng_state()
    limit = 0.8 * min(top)
    report = spectool.clip_(net, limit, SHAPE)
    assert report.counts["clipped"] == 3
    for value in norms(net):
        assert limit * (1 - 3e-4) <= value <= limit * (1 + 1e-7)
    assert [child.training for child in net.modules()] == flags
    assert [list(child._forward_hooks) for child in net.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert objects == {
        name: (id(p), p.data_ptr(), p.stride(), p.requires_grad) for name, p in net.named_parameters()
    }
    assert torch.equal(net[7].weight.grad, torch.ones_like(net[7].weight))
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "3.weight", "7.weight"} == set(report.changed)
    assert list(net.state_dict()) == list(before)
    for row in report.rows:
        assert row.change is not None
        assert row.change_lower_bound is not None
        assert row.change_lower_bound <= row.change <= 1.10 * row.change_lower_bound


def test_what_obeys_its_limit_stays_bit_for_bit() -> None:
    net = small()
    before, tops = state(net), norms(net)
    report = spectool.clip_(net, {"*": 2 * max(tops), "7.weight": 0.5 * tops[2]}, SHAPE)
    assert report.changed == ("7.weight",)
    assert [row.action for row in report.rows] == ["kept", "kept", "clipped"]
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "7.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_obey_as_stored(dtype: torch.dtype) -> None:
    net = small().to(dtype)
    limit = 0.7 * min(norms(net))
    spectool.clip_(net, limit, SHAPE)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert max(norms(net)) <= limit * (1 + 1e-9)


def test_batch_norm_without_weights_of_its_own() -> None:
    net = small(affine=False)
    limit = 0.5 * min(norms(net))
    spectool.clip_(net, limit, SHAPE)
    assert max(norms(net)) <= limit * (1 + 1e-7)


def test_layer_level_asks_for_the_convolutions_alone() -> None:
    net = small()
    report = spectool.clip_(net, 0.5, SHAPE, level="layer", kinds=["conv2d"])
    convolutions = [row.row.layer for row in report.rows]
    assert convolutions == ["0.weight", "3.weight"]
    alone = copy.deepcopy(net).double().requires_grad_(False)
    bare = [nn.Sequential(alone[0]), nn.Sequential(alone[3])]
    for run, shape in zip(bare, [(2, 6, 6), (4, 6, 6)], strict=True):
        assert jacobian_norm(run, shape) <= 0.5 * (1 + 1e-7)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


def test_tied_weights_change_once_and_stay_tied() -> None:
    net = Tied()
    report = spectool.clip_(net, 0.5, (1, 6))
    assert net.first.weight is net.second.weight
    assert abs(float(np.linalg.norm(net.first.weight.detach().double().numpy(), 2)) - 0.5) < 2e-4
    assert all(row.within for row in report.rows)


def test_a_weight_computed_in_an_unknown_way_is_refused_with_a_reason() -> None:
    torch.manual_seed(0)
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(5, 6))
    net = nn.Sequential(orthogonal, nn.ReLU(), nn.Linear(6, 3))
    before = state(net)
    report = spectool.clip_(net, 0.3, (1, 5))
    rows = {row.row.layer: row for row in report.rows}
    assert rows["0.weight"].action == "refused"
    assert rows["0.weight"].reason
    assert report.exit_code() == 4
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items() if not n.startswith("2.weight"))
    assert float(np.linalg.norm(net[2].weight.detach().double().numpy(), 2)) <= 0.3 * (1 + 1e-7)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrapper", ["dp", "compile in place", "ddp of compile"])
def test_wrappers_are_looked_through(wrapper: str) -> None:
    net = small()
    limit = 0.8 * min(norms(net))
    wrapped: nn.Module = net
    if wrapper == "compile in place":
        net.compile(backend="eager")
    elif "compile" in wrapper:
        wrapped = torch.compile(net, backend="eager")
    if "ddp" in wrapper:
        wrapped = DistributedDataParallel(wrapped)
    if wrapper == "dp":
        wrapped = DataParallel(net)
    report = spectool.clip_(wrapped, limit, SHAPE)
    assert report.counts["clipped"] == 3
    assert {row.row.layer for row in report.rows} == {
        "0.weight + 1.weight",
        "3.weight + 4.weight",
        "7.weight",
    }
    net._compiled_call_impl = None
    assert max(norms(net)) <= limit * (1 + 1e-7)


@pytest.mark.parametrize(
    "surroundings",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference", "autocast"],
)
def test_surroundings_do_not_bend_it(surroundings: Callable[[], object]) -> None:
    plain, other = small(), small()
    spectool.clip_(plain, 0.4, SHAPE, layers=["0.*", "7.*"])
    with surroundings():  # type: ignore[attr-defined]
        spectool.clip_(other, 0.4, SHAPE, layers=["0.*", "7.*"])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_running_means_move_only_when_asked() -> None:
    net = small()
    before = state(net)
    report = spectool.clip_(net, 0.4, SHAPE, recenter="auto")
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    means = moved - {"0.weight", "3.weight", "7.weight"}
    assert "4.running_mean" in means
    assert means <= {"1.running_mean", "4.running_mean"}
    assert max(norms(net)) <= 0.4 * (1 + 1e-7)
    assert "4.running_mean" in report.changed


def test_what_cannot_be_used_is_said() -> None:
    net = small()
    with pytest.raises(UsageError, match="matches no row"):
        spectool.clip_(net, {"layer9.*": 1.0}, SHAPE)
    with pytest.raises(UsageError, match="no positive finite number"):
        spectool.clip_(net, -1.0, SHAPE)
    with pytest.raises(UsageError, match="no limit to clip to"):
        spectool.clip_(net, {}, SHAPE)
    with pytest.raises(UsageError, match="a live module is needed"):
        spectool.clip_("net.pt", 1.0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no method is called"):
        spectool.clip_(net, 1.0, SHAPE, method="magic")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="recenter='yes' makes no sense"):
        spectool.clip_(net, 1.0, SHAPE, recenter="yes")
    with pytest.raises(NothingToAnalyse, match="holds no linear operator"):
        spectool.clip_(nn.Sequential(nn.ReLU()), 1.0, (1, 3))
