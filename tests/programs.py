"""Live programs for the tests: torchvision networks and small transformers, on the meta device."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

from spectool.architectures.resolve import build
from spectool.graph.program import survey_live
from spectool.graph.types import Region, Survey

MATRIX_MODULES = (
    torch.nn.Linear,
    torch.nn.modules.conv._ConvNd,
    torch.nn.Embedding,
)


@cache
def torchvision_survey(name: str, shape: tuple[int, ...] = (1, 3, 224, 224)) -> tuple[Any, Survey]:
    module = build(f"torchvision:{name}")
    return module, survey_live(module, {"": shape})


def layer_operators(found: Survey) -> int:
    return sum(item.operators for item in found.items if isinstance(item, Region) and item.level == "layer")


def pairs(found: Survey) -> set[tuple[str, ...]]:
    """Keys of the rows that are one convolution and one batch norm."""
    chosen = set()
    for item in found.items:
        if isinstance(item, Region) and item.level == "composed":
            kinds = Counter(item.kind.split("+"))
            if len(item.nodes) == 2 and kinds["batchnorm"] == 1 and item.operators == 1:
                chosen.add(tuple(item.key.split(" + ")))
    return chosen


def transformers_models() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name → (class, configuration) of networks of two small layers."""
    text = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    grouped = {**text, "num_key_value_heads": 2}
    image = {"image_size": 32, "patch_size": 8}
    return {
        "bert": ("BertModel", text),
        "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100,
                                     "bos_token_id": 1, "eos_token_id": 2}),
        "llama": ("LlamaForCausalLM", text),
        "mistral": ("MistralForCausalLM", grouped),
        "mixtral": ("MixtralForCausalLM", {**grouped, "num_local_experts": 4}),
        "t5": ("T5Model", {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128,
                           "vocab_size": 100}),
        "mamba": ("MambaForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
                                       "state_size": 8, "bos_token_id": 1, "eos_token_id": 2}),
        "vit": ("ViTModel", {**{k: v for k, v in text.items() if "token" not in k and k != "vocab_size"}, **image}),
        "whisper": ("WhisperModel", {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
                                     "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                                     "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 100,
                                     "max_source_positions": 50, "pad_token_id": 0, "bos_token_id": 1,
                                     "eos_token_id": 2, "decoder_start_token_id": 1}),
        "clip": ("CLIPModel", {"text_config": {**text}, "projection_dim": 32,
                               "vision_config": {**{k: v for k, v in text.items() if "token" not in k
                                                    and k != "vocab_size"}, **image}}),
    }  # fmt: skip


@cache
def transformers_survey(name: str) -> tuple[Any, Survey]:
    pytest.importorskip("transformers")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from spectool.architectures.huggingface import build_from_config, input_shapes

    cls, settings = transformers_models()[name]
    module = build_from_config({"model_type": name, "architectures": [cls], **settings})
    return module, survey_live(module, input_shapes(module))
