"""Pickled modules: their tensors as state_dict() names them, their geometry without their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import assert_equals, run_python, values
from torch import nn

from spectool.checkpoint import InertModule, InertObject, open_checkpoint

FORMS = [
    pytest.param({}, id="zip"),
    pytest.param({"_use_new_zipfile_serialization": False}, id="legacy"),
]


class Block(nn.Module):
    """A module with every kind of member."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 1), groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1, bias=False)
        self.circular = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(8, eps=1e-3, affine=False)
        self.tied = nn.Linear(3, 3)
        self.again = self.tied
        self.items = nn.ModuleDict({"a.b"[:1]: nn.Sequential(nn.Linear(3, 2), nn.ReLU())})
        self.extra = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))])
        self.nothing = None
        self.register_buffer("table", values((2, 3)))
        self.register_buffer("hidden", values((2,)), persistent=False)
        self.register_parameter("absent", None)
        self.activation = torch.nn.functional.relu
        self.sizes = [1, 2, (3, 4)]
        self.constant = values((4, 4))
        self.kinds = {"x", "y"}


@pytest.mark.parametrize("form", FORMS)
def test_whole_module_by_its_state_dict(tmp_path: Path, form: dict[str, Any]) -> None:
    net = Block()
    torch.save(net, tmp_path / "net.pt", **form)
    truth = dict(torch.load(tmp_path / "net.pt", weights_only=False).state_dict())
    checkpoint = open_checkpoint(tmp_path / "net.pt")
    assert [name for name in checkpoint.tensors if name != "hidden"] == list(truth)
    for name, tensor in truth.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert torch.equal(checkpoint.read("hidden"), net.hidden)
    assert checkpoint.aliases == {"again.weight": "tied.weight", "again.bias": "tied.bias"}


@pytest.mark.parametrize("form", FORMS)
def test_geometry_is_read_without_the_class(tmp_path: Path, form: dict[str, Any]) -> None:
    net = Block()
    torch.save(
        {"epoch": 3, "model": nn.DataParallel(net), "optimizer": {"state": {}, "param_groups": []}},
        tmp_path / "c.pt",
        **form,
    )
    checkpoint = open_checkpoint(tmp_path / "c.pt")
    program = checkpoint.program
    assert isinstance(program, InertModule)
    assert program.cls == "torch.nn.parallel.data_parallel.DataParallel"
    assert "took 'model'" in checkpoint.notes
    inner = program.children["module"]
    assert inner.cls.endswith(".Block")
    assert list(inner.children) == list(net._modules)
    for name in ("first", "up", "circular"):
        module, record = getattr(net, name), inner.children[name]
        assert record.cls == f"{type(module).__module__}.{type(module).__qualname__}"
        for attribute in (
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
            "output_padding",
            "transposed",
        ):
            assert record.attributes[attribute] == getattr(module, attribute)
    assert inner.children["norm"].attributes["eps"] == 1e-3
    assert inner.children["norm"].attributes["affine"] is False
    assert inner.children["first"].parameters == {
        "weight": "module.first.weight",
        "bias": "module.first.bias",
    }
    assert inner.children["up"].parameters == {"weight": "module.up.weight"}
    assert inner.parameters == {"table": "module.table", "hidden": "module.hidden"}
    assert inner.attributes["activation"] == InertObject("torch.nn.functional.relu")
    assert inner.attributes["constant"] == InertObject("torch.Tensor", {"dtype": "float32", "shape": (4, 4)})
    assert inner.attributes["sizes"] == [1, 2, (3, 4)]
    assert set(inner.attributes["kinds"]) == {"x", "y"}
    assert inner.attributes["nothing"] is None
    assert {name for child in [program, inner] for name in child.attributes} >= {"training", "device_ids"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*", "ignore:.*spectral_norm.*")
def test_hooks_and_parametrizations_are_there_as_data(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.utils.weight_norm(nn.Linear(3, 4), dim=1),
        nn.utils.spectral_norm(nn.Conv2d(2, 3, 3), n_power_iterations=2),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5), dim=0),
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6)),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
    )
    # Parametrised modules cannot be pickled (their class is made on the fly), their records as a module tree can.
    torch.save(net[:2], tmp_path / "hooks.pt")
    checkpoint = open_checkpoint(tmp_path / "hooks.pt")
    assert list(checkpoint.tensors) == list(net[:2].state_dict())
    hooks = [
        list(checkpoint.program.children[str(i)].attributes["_forward_pre_hooks"].values()) for i in (0, 1)
    ]
    assert hooks[0] == [InertObject("torch.nn.utils.weight_norm.WeightNorm", {"name": "weight", "dim": 1})]
    assert hooks[1][0].cls == "torch.nn.utils.spectral_norm.SpectralNorm"
    assert hooks[1][0].attributes["n_power_iterations"] == 2
    torch.save(net.state_dict(), tmp_path / "state.pt")
    assert_equals(tmp_path / "state.pt", torch.load(tmp_path / "state.pt"))


def test_traced_graph_module(tmp_path: Path) -> None:
    net = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    torch.save(net, tmp_path / "fx.pt")
    checkpoint = assert_equals(tmp_path / "fx.pt", dict(net.state_dict()))
    assert checkpoint.program.cls == "torch.fx.graph_module.reduce_graph_module"
    assert checkpoint.notes == ()
    assert checkpoint.program.children["0"].cls == "torch.nn.modules.linear.Linear"


def test_two_modules_side_by_side(tmp_path: Path) -> None:
    nets = {"netG": nn.Linear(2, 3), "netD": nn.Sequential(nn.Linear(3, 1))}
    torch.save(nets, tmp_path / "gan.pt")
    truth = {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
    checkpoint = assert_equals(tmp_path / "gan.pt", truth)
    assert list(checkpoint.program.children) == ["netG", "netD"]
    assert checkpoint.program.children["netD"].children["0"].parameters["weight"] == "netD.0.weight"


def test_a_module_whose_class_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "gone.pt"
    run_python(
        "import sys, types, torch\n"
        "home = types.ModuleType('vanished'); sys.modules['vanished'] = home\n"
        "exec('''\n"
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(1, 2, 3, stride=2)\n"
        "    def __setstate__(self, state):\n"
        "        raise RuntimeError('never called')\n"
        "''', home.__dict__)\n"
        "home.Net.__module__ = 'vanished'\n"
        "torch.manual_seed(0)\n"
        f"torch.save(home.Net(), {str(path)!r})\n"
    )
    with pytest.raises(ModuleNotFoundError, match="vanished"):
        torch.load(path, weights_only=False)
    torch.manual_seed(0)
    truth = nn.Conv2d(1, 2, 3, stride=2)
    checkpoint = assert_equals(path, {"conv.weight": truth.weight, "conv.bias": truth.bias})
    assert checkpoint.program.cls == "vanished.Net"
    assert checkpoint.program.children["conv"].attributes["stride"] == (2, 2)


class Trainer:
    """What a framework hangs on a module: it refers back to it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.history = [0.5] * 10000


def test_cycles_and_large_attributes_are_cut(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    net.trainer = Trainer(net)
    net.loop = [1]
    net.loop.append(net.loop)
    torch.save(net, tmp_path / "cyclic.pt")
    checkpoint = assert_equals(tmp_path / "cyclic.pt", dict(net.state_dict()))
    trainer = checkpoint.program.attributes["trainer"]
    assert trainer.cls.endswith(".Trainer")
    assert trainer.attributes["history"] == InertObject("builtins.list", {"length": 10000})
    assert trainer.attributes["module"] == InertObject("torch.nn.modules.linear.Linear")
