"""Which of the tensors in a training checkpoint are the network."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import assert_equals, values
from torch import nn

from spectool.checkpoint import open_checkpoint
from spectool.errors import NothingToAnalyse, UsageError

RAW = OrderedDict([("conv.weight", values((2, 3, 3, 3))), ("conv.bias", values((2,), seed=1))])
EMA = OrderedDict((name, value + 1) for name, value in RAW.items())


def adam() -> dict[str, Any]:
    net = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def write(path: Path, content: Any) -> Path:
    torch.save(content, path / "net.ckpt")
    return path / "net.ckpt"


@pytest.mark.parametrize(
    "name", ["state_dict", "model", "model_state_dict", "net", "network", "module", "params", "anything"]
)
def test_state_dict_beside_training_state(tmp_path: Path, name: str) -> None:
    content = {
        "epoch": 3,
        "rng_state": torch.get_rng_state(),
        "optimizer": adam(),
        "lr_schedulers": [{"last": torch.ones(1)}],
        "amp_scaler": {"scale": torch.ones(1)},
        name: RAW,
        "args": argparse.Namespace(arch="resnet"),
    }
    checkpoint = assert_equals(write(tmp_path, content), RAW)
    assert f"took {name!r}" in checkpoint.notes
    assert any("'optimizer' (training state)" in note for note in checkpoint.notes)
    assert checkpoint.metadata["branch"] == name
    assert checkpoint.metadata["scalars"] == {"epoch": 3}


def test_networks_with_names_like_training_state(tmp_path: Path) -> None:
    names = ["random_features", "optical_flow", "optic", "amplifier", "adamantium", "scheduled"]
    content = {name: {"w": values((2, 2), seed=seed)} for seed, name in enumerate(names)}
    assert_equals(write(tmp_path, content), {f"{name}.w": part["w"] for name, part in content.items()})
    training = [
        "opt",
        "opt_D",
        "optG",
        "D_opt",
        "adam",
        "sgd",
        "scheduler",
        "lr_sched",
        "rng",
        "loss_scaler",
        "optim_1",
    ]
    content = {"G": {"w": values((2, 2))}, **{name: {"x": values((2, 2))} for name in training}}
    assert_equals(write(tmp_path, content), {"w": values((2, 2))})


def test_optimizer_is_known_by_its_shape_too(tmp_path: Path) -> None:
    assert_equals(write(tmp_path, (RAW, adam())), RAW)


def test_bare_state_dict_keeps_every_name(tmp_path: Path) -> None:
    content = OrderedDict(
        (name, values((2,), seed=seed))
        for seed, name in enumerate(
            ["optimizer.bias", "scheduler.weight", "amp", "module.a", "_orig_mod.b", "ema", "rng.weight"]
        )
    )
    assert_equals(write(tmp_path, content), content)


def test_prefixes_are_kept(tmp_path: Path) -> None:
    content = {"state_dict": {f"module._orig_mod.{name}": value for name, value in RAW.items()}}
    assert_equals(write(tmp_path, content), content["state_dict"])


def test_raw_weights_are_the_default_and_averaged_ones_a_choice(tmp_path: Path) -> None:
    path = write(tmp_path, {"state_dict": RAW, "state_dict_ema": EMA, "optimizer": adam()})
    checkpoint = assert_equals(path, RAW)
    assert any("state_dict_ema" in note and "--key" in note for note in checkpoint.notes)
    assert {"state_dict", "state_dict_ema"} <= set(checkpoint.metadata["candidates"])
    assert_equals(path, EMA, key="state_dict_ema")
    path = write(tmp_path, {"ema": {"shadow": EMA}, "generator": RAW})
    assert_equals(path, RAW)
    assert_equals(path, EMA, key="ema")
    assert_equals(path, EMA, key="ema.shadow")
    assert_equals(path, EMA, key="shadow")


def test_only_averaged_weights(tmp_path: Path) -> None:
    checkpoint = assert_equals(write(tmp_path, {"model": None, "ema": EMA}), EMA)
    assert "took 'ema'" in checkpoint.notes


def test_unknown_and_ambiguous_keys_list_the_choices(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": {"net": RAW}, "b": {"net": EMA}})
    with pytest.raises(UsageError, match="key 'c' names no part") as unknown:
        open_checkpoint(path, key="c")
    assert unknown.value.hint == "keys: a, b, a.net, b.net"
    with pytest.raises(UsageError, match="key 'net' names several parts") as ambiguous:
        open_checkpoint(path, key="net")
    assert ambiguous.value.hint == "keys: a.net, b.net"
    assert_equals(path, EMA, key="b.net")


def test_an_optimizer_can_be_asked_for(tmp_path: Path) -> None:
    state = adam()
    path = write(tmp_path, {"state_dict": RAW, "optimizer": state})
    checkpoint = open_checkpoint(path, key="optimizer.state")
    assert "0.exp_avg" in checkpoint.tensors
    assert torch.equal(checkpoint.read("0.exp_avg"), state["state"][0]["exp_avg"])


def test_several_networks_are_all_taken(tmp_path: Path) -> None:
    path = write(tmp_path, {"G": RAW, "D": EMA, "optG": adam(), "step": torch.tensor(3)})
    truth = {
        f"{net}.{name}": value for net, state in (("G", RAW), ("D", EMA)) for name, value in state.items()
    }
    assert_equals(path, truth)
    assert_equals(path, EMA, key="D")


def test_list_of_state_dicts(tmp_path: Path) -> None:
    path = write(tmp_path, {"state_dict": [RAW, EMA]})
    truth = {f"{i}.{name}": value for i, state in enumerate((RAW, EMA)) for name, value in state.items()}
    assert_equals(path, truth)
    assert_equals(write(tmp_path, {"state_dict": [RAW]}), RAW)


def test_nested_dicts_become_dotted_names(tmp_path: Path) -> None:
    content = {
        "enc": {"w": values((2, 2)), "deep": {"b": values((3,))}},
        "scale": values((4,)),
        7: values((1, 5)),
    }
    truth = {"enc.w": content["enc"]["w"], "enc.deep.b": content["enc"]["deep"]["b"]}
    truth |= {"scale": content["scale"], "7": content[7]}
    assert_equals(write(tmp_path, content), truth)


def test_names_that_meet_are_told_apart(tmp_path: Path) -> None:
    content = {"a.b": values((2, 2)), "a": {"b": values((2, 2), seed=5)}}
    checkpoint = assert_equals(write(tmp_path, content), {"a.b": content["a.b"], "a.b#2": content["a"]["b"]})
    assert any("a.b#2" in note for note in checkpoint.notes)


def test_lone_tensor(tmp_path: Path) -> None:
    assert_equals(write(tmp_path, values((3, 4))), {"tensor": values((3, 4))})


def test_shared_dict_is_named_twice_and_tied(tmp_path: Path) -> None:
    part = {"w": values((2, 2))}
    checkpoint = open_checkpoint(write(tmp_path, {"x": part, "y": part}))
    assert checkpoint.aliases == {"y.w": "x.w"}


def test_nothing_but_an_optimizer_or_numbers(tmp_path: Path) -> None:
    with pytest.raises(NothingToAnalyse, match=r"net\.ckpt: it holds only optimizer"):
        open_checkpoint(write(tmp_path, {"optimizer": adam(), "epoch": 2}))
    with pytest.raises(NothingToAnalyse, match="it holds no tensors"):
        open_checkpoint(write(tmp_path, {"epoch": 2}))


def test_key_where_there_is_nothing_to_choose(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(RAW), tmp_path / "net.safetensors")
    with pytest.raises(UsageError, match="holds one set of tensors: key 'ema' cannot choose"):
        open_checkpoint(tmp_path / "net.safetensors", key="ema")
    with pytest.raises(UsageError, match="names no part") as error:
        open_checkpoint(write(tmp_path, RAW), key="ema")
    assert "all tensors are in one dict" in error.value.hint
