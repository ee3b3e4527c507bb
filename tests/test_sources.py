"""One network, many sources: the same rows from every one, and no code of a file runs unless it is trusted."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import spectool
from spectool.api.sources import Ways, find
from spectool.architectures import build, match_keys
from spectool.architectures.fingerprints import fingerprint, recognise
from spectool.architectures.resolve import import_torchvision
from spectool.errors import CheckpointError, UsageError
from spectool.graph.types import Region
from spectool.report.row import Row

SAMPLES = Path(__file__).parent.parent / "sample_models"
INPUT = (1, 1, 16, 16)
SOURCES = {
    "digits_cnn.onnx": {},
    "digits_cnn.pt2": {},
    "digits_cnn_torchscript.pt": {"input_shape": INPUT},
    "digits_cnn_module.pt": {"trust": True, "input_shape": INPUT},
    "digits_cnn_state.pt": {"arch": "nets:DigitsCNN", "input_shape": INPUT},
    "digits_cnn.safetensors": {"arch": "nets:DigitsCNN", "input_shape": INPUT},
    "digits_cnn_training.pt": {"arch": "nets:DigitsCNN", "input_shape": INPUT},
}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SAMPLES))


def located(name: str) -> dict[tuple[object, ...], str]:
    options = dict(SOURCES[name])
    shape = options.pop("input_shape", None)
    found = find(SAMPLES / name, Ways(**options), shape)
    return {
        (item.level, item.key.replace("module.", ""), item.in_shape, item.out_shape, item.maximal): item.kind
        for item in found.survey.items
        if isinstance(item, Region)
    }


@pytest.mark.parametrize("name", list(SOURCES)[1:])
def test_every_source_finds_the_same_operators(name: str) -> None:
    reference = located("digits_cnn.onnx")
    assert len(reference) == 34
    assert set(located(name)) == set(reference)


def rows(name: str) -> dict[tuple[str, str], Row]:
    report = spectool.inspect(
        SAMPLES / name, k=2, layers=("*mix*", "*up.*", "*shortcut*", "*head*"), **SOURCES[name]
    )
    return {(row.level, row.layer.replace("module.", "")): row for row in report.rows}


@pytest.mark.parametrize("name", list(SOURCES)[1:])
def test_every_source_gives_the_same_numbers(name: str) -> None:
    reference, got = rows("digits_cnn.onnx"), rows(name)
    assert list(got) == list(reference)
    for key, row in reference.items():
        np.testing.assert_allclose(got[key].sigma, row.sigma, rtol=1e-6)


class Marker:
    """A pickle that would touch a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def test_a_trapped_pickle_runs_only_when_trusted(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    module = nn.Sequential(nn.Linear(4, 3))
    module.trap = Marker(mark)
    torch.save(module, tmp_path / "net.pt")
    report = spectool.inspect(tmp_path / "net.pt", k=1)
    assert report.rows[0].status == "ok"
    assert not mark.exists()
    spectool.inspect(tmp_path / "net.pt", k=1, trust=True, input_shape=(1, 4))
    assert mark.exists()


def test_code_of_a_hugging_face_repository_never_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "modeling_trap.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n")
    config = {
        "model_type": "trap",
        "auto_map": {"AutoConfig": "modeling_trap.Config", "AutoModel": "modeling_trap.Model"},
        "architectures": ["Model"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"layer.weight": torch.randn(4, 3)}, tmp_path / "model.safetensors")
    report = spectool.inspect(tmp_path, k=1)
    assert [row.layer for row in report.rows] == ["layer.weight"]
    assert any("config.json not used" in note for note in report.notes)
    assert not mark.exists()


def test_torchscript_code_is_interpreted_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Trap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.path = str(mark)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.save(x, self.path)
            return self.linear(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.jit.save(torch.jit.script(Trap()), tmp_path / "net.pt")
        torch.jit.load(tmp_path / "net.pt")(torch.zeros(1, 4))
    assert mark.exists()  # torch itself does run it
    mark.unlink()
    report = spectool.inspect(tmp_path / "net.pt", k=1, input_shape=(1, 4))
    assert [row.layer for row in report.rows] == ["linear.weight"]
    assert any("cannot be followed" in note for note in report.notes)
    assert not mark.exists()


def test_config_json_gives_a_transformer_its_program(tmp_path: Path) -> None:
    import_torchvision()  # or transformers stumbles over its compiled part
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    report = spectool.inspect(tmp_path, k=2)
    by_key = {row.layer: row for row in report.rows if row.level == "layer"}
    assert any("(config.json)" in note for note in report.notes)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            truth = np.linalg.svd(parameter.detach().double().numpy(), compute_uv=False)
            np.testing.assert_allclose(by_key[name].sigma, truth[:2], rtol=1e-6)
            assert by_key[name].assumed == ("architecture: transformers:LlamaForCausalLM (config.json)",)


def torchvision_state(tmp_path: Path, prefix: str = "", classes: int = 7) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module = import_torchvision().models.squeezenet1_1(weights=None, num_classes=classes)
    path = tmp_path / "net.pt"
    torch.save({prefix + key: value for key, value in module.state_dict().items()}, path)
    return module, path


def test_a_known_state_dict_is_recognised_by_its_keys_and_shapes(tmp_path: Path) -> None:
    _, path = torchvision_state(tmp_path, "module.")
    report = spectool.inspect(path, list_only=True, input_shape=(1, 3, 64, 64))
    assert report.rows[0].input_shape == (3, 64, 64)
    assert "architecture: torchvision:squeezenet1_1 (recognised)" in report.rows[0].assumed
    plain = spectool.inspect(path, list_only=True, input_shape=(1, 3, 64, 64), recognise=False)
    assert plain.rows[0].input_shape is None
    unsized = spectool.inspect(path, list_only=True)
    assert unsized.rows[0].input_shape is None
    assert any("looks like torchvision:squeezenet1_1" in note for note in unsized.notes)


def test_fingerprint_leaves_out_the_classifier_and_nothing_else() -> None:
    shapes = {
        "conv.weight": (4, 3, 3, 3),
        "fc.weight": (10, 4),
        "fc.bias": (10,),
        "bn.num_batches_tracked": (),
    }
    same = {**shapes, "fc.weight": (7, 4), "fc.bias": (7,)}
    other = {**shapes, "conv.weight": (4, 3, 5, 5)}
    assert fingerprint(shapes) == fingerprint(same) != fingerprint(other)
    assert recognise(shapes) is None


def test_an_architecture_that_does_not_fit_is_told_key_by_key(tmp_path: Path) -> None:
    _, path = torchvision_state(tmp_path)
    with pytest.raises(UsageError, match=r"classifier\.1\.weight is 7x512x1x1 in the file and 1000x512x1x1"):
        spectool.inspect(path, arch="torchvision:squeezenet1_1", input_shape=(1, 3, 64, 64))
    report = spectool.inspect(
        path,
        arch="torchvision:squeezenet1_1",
        arch_args={"num_classes": 7},
        input_shape=(1, 3, 64, 64),
        list_only=True,
    )
    assert report.coverage[1] == 26
    with pytest.raises(UsageError, match=r"is missing"):
        match_keys({"a.weight": (1, 1)}, {"b.weight": (1, 1)}, architecture="x")


def test_a_missing_input_shape_names_the_inputs_and_suggests_one(tmp_path: Path) -> None:
    _, path = torchvision_state(tmp_path)
    with pytest.raises(UsageError, match=r"SqueezeNet needs the shape of its input \(x\)") as caught:
        spectool.inspect(path, arch="torchvision:squeezenet1_1", arch_args={"num_classes": 7})
    assert "--input 1x3x224x224" in caught.value.hint


def test_a_network_without_sizes_needs_no_input() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    report = spectool.inspect(module, k=1)
    assert [row.layer for row in report.rows] == ["0.weight", "2.weight"]
    tokens = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 3))
    assert [row.kind for row in spectool.inspect(tokens, k=1).rows] == ["embedding", "linear"]


@pytest.mark.parametrize(
    "name,message",
    [
        ("resnet18", "names no architecture"),
        ("torchvision:resnet1", "did you mean"),
        ("nowhere_at_all:Net", "cannot import nowhere_at_all"),
        ("nets:Missing", "nets has no 'Missing'"),
        ("json:dumps", "cannot be built"),
        ("collections:OrderedDict", "not a torch module"),
    ],
)
def test_an_architecture_that_cannot_be_had_says_why(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(name)


def test_trust_without_the_class_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(SAMPLES)])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    with pytest.raises(CheckpointError, match="cannot be unpickled"):
        spectool.inspect(SAMPLES / "digits_cnn_module.pt", trust=True, input_shape=INPUT)
