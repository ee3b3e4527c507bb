"""Checkpoints that others trained: every key and value as the format's ordinary loader gives them."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoint_files import REAL, assert_equals, same
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

from spectool.checkpoint import InertModule, open_checkpoint
from spectool.errors import NothingToAnalyse, SpectoolError, UnrecognisedFormat

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL.is_dir(), reason="the real checkpoints are not beside the project"),
]

PICKLED = ["aesthetic_linear.pth", "burn_legacy_shared_storage.pt", "burn_mnist.pt", "candle_fortran_3d.pth"]
PICKLED += ["mtcnn_pnet.pt", "resnet20_cifar10.th", "ultraface_rfb320.pth"]


@pytest.mark.parametrize("name", PICKLED)
def test_state_dicts(name: str) -> None:
    truth: Any = torch.load(REAL / name, map_location="cpu", weights_only=True)
    checkpoint = assert_equals(REAL / name, truth.get("state_dict", truth))
    if name == "resnet20_cifar10.th":
        assert checkpoint.metadata["scalars"]["best_prec1"] == pytest.approx(truth["best_prec1"])
        assert next(iter(checkpoint.tensors)) == "module.conv1.weight"
    if name == "candle_fortran_3d.pth":
        ((ref, tensor),) = zip(checkpoint.tensors.values(), truth.values(), strict=True)
        assert ref.stride == tensor.stride()


@pytest.mark.parametrize("name", ["burn_mnist.safetensors", "lora_disney.safetensors"])
def test_safetensors(name: str) -> None:
    truth = load_file(REAL / name)
    checkpoint = open_checkpoint(REAL / name)
    assert set(checkpoint.tensors) == set(truth)
    assert all(same(checkpoint.read(key), value) for key, value in truth.items())
    if name == "lora_disney.safetensors":
        assert checkpoint.metadata["text_encoder:0:rank"] == "1"


def test_whole_module_whose_class_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    path = REAL / "vdsr_epoch50.pth"
    home = types.ModuleType("vdsr")
    for cls in ("Net", "Conv_ReLU_Block"):
        setattr(home, cls, type(cls, (nn.Module,), {"__module__": "vdsr"}))
    checkpoint = open_checkpoint(path)
    assert "vdsr" not in sys.modules
    monkeypatch.setitem(sys.modules, "vdsr", home)
    backends = types.ModuleType("torch.nn.backends.thnn")
    backends._get_thnn_function_backend = lambda: None
    monkeypatch.setitem(sys.modules, "torch.nn.backends.thnn", backends)
    with warnings.catch_warnings():
        # The classes' sources differ from those in the file, of course.
        warnings.simplefilter("ignore")
        truth = torch.load(path, map_location="cpu", weights_only=False, encoding="latin1")["model"]
    assert_equals(path, dict(truth.state_dict()))
    program = checkpoint.program
    assert isinstance(program, InertModule)
    assert program.cls == "vdsr.Net"
    modules = dict(truth.named_modules())

    def compare(record: InertModule, prefix: str) -> int:
        module = modules[prefix]
        assert list(record.children) == list(module._modules)
        checked = 0
        if isinstance(module, nn.Conv2d):
            for name in ("stride", "padding", "dilation", "groups", "kernel_size", "transposed"):
                assert record.attributes[name] == getattr(module, name)
            checked = 1
        return checked + sum(
            compare(child, f"{prefix}.{name}" if prefix else name) for name, child in record.children.items()
        )

    assert compare(program, "") == 20


@pytest.mark.filterwarnings("ignore")
def test_torchscript() -> None:
    truth = torch.jit.load(REAL / "silero_vad.jit", map_location="cpu").state_dict()
    checkpoint = open_checkpoint(REAL / "silero_vad.jit")
    assert set(truth) <= set(checkpoint.tensors)
    assert all(same(checkpoint.read(key), value) for key, value in truth.items())


def stored(graph: onnx.GraphProto) -> list[tuple[str, np.ndarray]]:
    found = [(tensor.name, numpy_helper.to_array(tensor)) for tensor in graph.initializer]
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                found.append((node.output[0], numpy_helper.to_array(attribute.t)))
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += stored(attribute.g)
    return found


@pytest.mark.parametrize("name", ["silero_vad.onnx", "ultraface_rfb320.onnx", "wonnx_opt_mnist.onnx"])
def test_onnx(name: str) -> None:
    truth = stored(onnx.load(REAL / name).graph)
    checkpoint = open_checkpoint(REAL / name)
    assert len(checkpoint.tensors) == len(truth)
    assert set(checkpoint.tensors) == {key for key, _ in truth}
    for key, array in truth:
        assert same(checkpoint.read(key), torch.from_numpy(np.array(array)))


def test_pairs_hold_the_same_weights() -> None:
    one, other = (
        open_checkpoint(REAL / "ultraface_rfb320.onnx"),
        open_checkpoint(REAL / "ultraface_rfb320.pth"),
    )
    common = [key for key in one.tensors if key in other.tensors and key.endswith("weight")]
    assert len(common) > 30
    assert all(torch.equal(one.read(key), other.read(key)) for key in common)


REFUSED = {
    "abcrown_base_100.pkl": (UnrecognisedFormat, "is a pandas pickle, not a checkpoint"),
    "burn_broken.pt": (UnrecognisedFormat, "is a text of 3 bytes and no checkpoint"),
    "burn_tar_weight_bias.tar": (UnrecognisedFormat, "is a torch file of 2016"),
    "tchrs_foo1.pt": (NothingToAnalyse, "a TorchScript archive without a single tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(REAL / name)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_every_real_file_opens_or_is_refused_clearly() -> None:
    refused = set()
    for path in sorted(Path(REAL).iterdir()):
        try:
            open_checkpoint(path)
        except SpectoolError:
            refused.add(path.name)
    assert refused == {*REFUSED, "INDEX.md"}
