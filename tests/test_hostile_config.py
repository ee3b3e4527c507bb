"""A stranger's ``config.json``: nothing is fetched, nothing but models is called, nothing is built without end."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectool import inspect
from spectool.architectures.bounded import bounded, harmless, offline
from spectool.architectures.huggingface import _model_class, build_from_config, input_shapes
from spectool.architectures.resolve import import_torchvision
from spectool.errors import UsageError

import_torchvision()  # or transformers stumbles over its compiled part
transformers = pytest.importorskip("transformers")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The names that something tried to reach."""
    names: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> Any:
        names.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return names


@pytest.mark.parametrize("kind", ["detr", "maskformer"])
def test_a_backbone_on_a_server_is_not_fetched(tmp_path: Path, kind: str, asked: list[Any]) -> None:
    save_file({"fc.weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    config = {"model_type": kind, "backbone": "some/where", "use_pretrained_backbone": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = inspect(tmp_path, k=1)
    assert asked == []
    assert [row.layer for row in report.rows] == ["fc.weight"]
    assert any("backbone 'some/where' is not described in the file" in note for note in report.notes)


def test_a_library_that_wants_to_download_may_not(asked: list[Any], tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    before = hub.constants.HF_HUB_OFFLINE
    with offline(), pytest.raises(Exception, match=r"offline|cannot find|Cannot|local"):
        hub.hf_hub_download("some/where", "config.json", cache_dir=tmp_path)
    assert asked == []
    assert before == hub.constants.HF_HUB_OFFLINE


def test_choices_of_code_and_downloads_are_left_out() -> None:
    config = {
        "hidden_size": 8, "auto_map": {"AutoModel": "x.Y"}, "_attn_implementation": "kernels-community/flash-attn",
        "vision_config": {"attn_implementation": "a/b", "depth": 2, "use_pretrained_backbone": True},
        "parts": [{"use_kernels": True, "n": 1}], "_name_or_path": "/somewhere", "quantization_config": {"bits": 4},
    }  # fmt: skip
    wanted = {
        "hidden_size": 8,
        "vision_config": {"depth": 2, "use_pretrained_backbone": False},
        "parts": [{"n": 1}],
    }
    assert harmless(config) == wanted


def test_only_models_are_called() -> None:
    for name in (
        "Trainer",
        "TrainingArguments",
        "pipeline",
        "AutoModel",
        "PreTrainedModel",
        "os",
        "nothing",
        5,
        None,
    ):
        assert _model_class(transformers, name) is None
    assert _model_class(transformers, "BertModel") is transformers.BertModel


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "bert", "num_hidden_layers": 10**9, "hidden_size": 12}, "more than 2020 submodules"),
        (
            {"model_type": "vit", "image_size": 30000, "patch_size": 1, "num_hidden_layers": 1},
            "tables of more than",
        ),
        ({"model_type": "vit", "image_size": [1, 2, 3], "num_hidden_layers": 1}, "vit|input size"),
    ],
    ids=["layers", "positions", "sizes"],
)
def test_a_model_without_end_is_not_built(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        input_shapes(build_from_config(config, tensors=1))


def test_a_model_as_large_as_its_file_is_built() -> None:
    settings = {"hidden_size": 12, "intermediate_size": 16, "vocab_size": 20, "num_hidden_layers": 4}
    found = build_from_config({"model_type": "bert", **settings}, tensors=60)
    assert sum(1 for _ in found.parameters()) > 60


def test_what_fills_memory_is_counted_before_it_does() -> None:
    calls = [
        lambda: torch.ones(1 << 20, 1 << 10),
        lambda: torch.arange(0, 10**12, 2),
        lambda: torch.eye(1 << 20),
        lambda: torch.full((1 << 20, 1 << 20), 1.0),
        lambda: torch.randn((1 << 15, 1 << 15), generator=torch.Generator()),
    ]
    for call in calls:
        with bounded(1), pytest.raises(UsageError, match="tables"):
            call()
    with bounded(1):
        assert torch.arange(5).tolist() == [0, 1, 2, 3, 4]
        assert torch.ones(2, 3).sum() == 6
