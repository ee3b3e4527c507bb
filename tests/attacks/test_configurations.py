"""A ``config.json`` may choose among the library's models and their sizes, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from attack_folders import BERT

from spectool.architectures.bounded import harmless
from spectool.architectures.huggingface import build_from_config
from spectool.errors import UsageError

transformers = pytest.importorskip("transformers")
SMALL = {**BERT, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    "name", ["pipeline", "AutoModel", "utils", "PreTrainedModel", "BertConfig", "set_seed", "__doc__"]
)
def test_only_model_classes_are_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} was called")

    for function in ("pipeline", "set_seed"):
        monkeypatch.setitem(vars(transformers), function, called)
    module = build_from_config({**SMALL, "architectures": [name]})
    assert type(module).__name__ == "BertModel"  # what the library itself takes for this kind
    assert (
        type(build_from_config({**SMALL, "architectures": [name, "BertForMaskedLM"]})).__name__
        == "BertForMaskedLM"
    )


def test_what_could_fetch_or_run_is_left_out_at_every_level() -> None:
    plain = {"hidden_size": 4, "layers": [{"width": 3}], "text_config": {"vocab_size": 5}}
    hostile: dict[str, Any] = {
        "auto_map": {"AutoModel": "evil.Net"},
        "trust_remote_code": True,
        "_name_or_path": "evil/net",
        "_attn_implementation": "evil/kernel",
        "attn_implementation": {"": "evil/kernel"},
        "use_kernels": True,
        "backbone_repo_id": "evil/net",
        "quantization_config": {},
    }
    both = {
        **plain,
        **hostile,
        "layers": [{"width": 3, **hostile}],
        "text_config": {"vocab_size": 5, **hostile},
    }
    assert harmless(both) == plain
    assert harmless({"use_pretrained_backbone": True}) == {"use_pretrained_backbone": False}
    assert "evil" not in json.dumps(build_from_config({**SMALL, **hostile}).config.to_dict(), default=str)


def test_a_model_of_endless_modules_is_not_built() -> None:
    with pytest.raises(UsageError, match="more than 2020 submodules, and the file has 1 tensors"):
        build_from_config({**BERT, "num_hidden_layers": 10**9}, tensors=1)
    assert build_from_config({**BERT, "num_hidden_layers": 2}, tensors=39).config.num_hidden_layers == 2
