"""TorchScript and exported programs: their tensors as torch.jit.load and torch.export.load give them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_equals, same, values
from torch import nn

from spectool.checkpoint import open_checkpoint
from spectool.errors import CorruptFile, NothingToAnalyse

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Parameters, buffers, a tied weight, a strided buffer and a plain constant."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("table", values((3, 4)).t())
        self.register_buffer("hidden", values((4,), seed=2), persistent=False)
        self.constant = values((4,), seed=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.body(x).mean((2, 3))
        return self.b(self.a(pooled)) + self.table.sum() + self.hidden + self.constant


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_equals_its_state_dict(tmp_path: Path, net: Net, how: str) -> None:
    made = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.ones(1, 3, 8, 8))
    made.save(tmp_path / "net.any")
    truth = torch.jit.load(tmp_path / "net.any").state_dict()
    checkpoint = open_checkpoint(tmp_path / "net.any")
    assert checkpoint.format == "torchscript"
    for name, tensor in truth.items():
        assert same(checkpoint.read(name), tensor), name
    assert checkpoint.aliases["b.weight"] == "a.weight"
    # A plain tensor attribute is no entry of the state dict, but it is in the file.
    extra = [checkpoint.read(name) for name in checkpoint.tensors if name not in truth]
    assert any(same(tensor, net.constant) for tensor in extra)


def test_inlined_constants_are_read_from_their_own_folder(tmp_path: Path, net: Net) -> None:
    frozen = torch.jit.freeze(torch.jit.script(net))
    frozen.save(tmp_path / "net.jit")
    checkpoint = open_checkpoint(tmp_path / "net.jit")
    assert "CONSTANTS.c0" in checkpoint.tensors
    found = [checkpoint.read(name) for name in checkpoint.tensors]
    assert any(same(tensor, net.a.weight) for tensor in found)


def test_torchscript_without_tensors(tmp_path: Path) -> None:
    torch.jit.script(nn.ReLU()).save(tmp_path / "relu.pt")
    with pytest.raises(NothingToAnalyse, match=r"relu\.pt: a TorchScript archive without a single tensor"):
        open_checkpoint(tmp_path / "relu.pt")


def test_exported_program(tmp_path: Path, net: Net) -> None:
    program = torch.export.export(net, (torch.ones(1, 3, 8, 8),))
    torch.export.save(program, tmp_path / "net.bin")
    loaded = torch.export.load(tmp_path / "net.bin")
    checkpoint = open_checkpoint(tmp_path / "net.bin")
    assert checkpoint.format == "pt2"
    assert list(checkpoint.tensors)[: len(loaded.state_dict)] == list(
        _weights_in_file_order(tmp_path / "net.bin")
    )
    truth = {**loaded.state_dict, **loaded.constants}
    assert set(checkpoint.tensors) == set(truth)
    for name, tensor in truth.items():
        assert same(checkpoint.read(name), tensor), name
    assert checkpoint.tensors["table"].stride == (1, 4)
    assert set(checkpoint.aliases) | set(checkpoint.aliases.values()) == {"a.weight", "b.weight"}


def _weights_in_file_order(path: Path) -> list[str]:
    import json

    with zipfile.ZipFile(path) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith("model_weights_config.json"))
        return list(json.loads(archive.read(record))["config"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_exported_element_types(tmp_path: Path, dtype: torch.dtype) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", values((3, 2), dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.w.to(torch.float32).sum()

    torch.export.save(torch.export.export(Holder(), (torch.ones(2),)), tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2")
    assert_equals(tmp_path / "net.pt2", dict(loaded.state_dict))


def test_early_exported_program(tmp_path: Path) -> None:
    """Until torch 2.6 the state dict was a torch file inside the zip file."""
    state = {"w": values((3, 4)), "v": values((3, 4)).t()}
    constants = {"c": values((2,), torch.int64)}
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        for name, content in (("state_dict", state), ("constants", constants), ("example_inputs", {})):
            buffer = io.BytesIO()
            torch.save(content, buffer)
            archive.writestr(f"serialized_{name}.pt", buffer.getvalue())
        archive.writestr("version", "5.3")
    checkpoint = assert_equals(path, {**state, **constants})
    ref = checkpoint.tensors["w"]
    assert path.read_bytes()[ref.position :][: ref.nbytes] == state["w"].numpy().tobytes()


def test_exported_program_with_a_lost_record(tmp_path: Path, net: Net) -> None:
    torch.export.save(torch.export.export(net, (torch.ones(1, 3, 8, 8),)), tmp_path / "net.pt2")
    with zipfile.ZipFile(tmp_path / "net.pt2") as old, zipfile.ZipFile(tmp_path / "cut.pt2", "w") as new:
        for name in old.namelist():
            if not name.endswith("weights/weight_0"):
                new.writestr(name, old.read(name))
    with pytest.raises(CorruptFile, match="no record 'data/weights/weight_0'"):
        open_checkpoint(tmp_path / "cut.pt2")
