"""The files that mutants are made of."""

from __future__ import annotations

import functools
import json
import math
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "sample_models"
REAL = ROOT.parent / "shared" / "real_models"
#: Shapes for programs that do not say their input's.
INPUTS = {
    "digits_cnn_torchscript.pt": (1, 1, 16, 16),
    "digits_sequential_module.pt": (1, 1, 16, 16),
    "silero_vad.jit": (1, 512),
}
_SUFFIXES = (".pt", ".pt2", ".onnx", ".safetensors")


@dataclass(frozen=True)
class Case:
    """One input: a file, a file with others beside it, or a folder.

    Attributes:
        name: What the corpus calls it.
        files: Relative path → contents.
        target: Which of them is named on the command line; empty for the folder that holds them.
        real: Whether it is one of the real models, which need not be there.
    """

    name: str
    files: dict[str, bytes]
    target: str
    real: bool = False

    @property
    def size(self) -> int:
        return sum(map(len, self.files.values()))


@functools.cache
def corpus(real: bool = True) -> dict[str, Case]:
    """Return name → case: every sample, then every real model if they are here."""
    cases = [*_samples(), *(_real() if real else ())]
    return {case.name: case for case in cases}


def _samples() -> Iterator[Case]:
    for path in sorted(SAMPLES.iterdir()):
        if path.suffix in _SUFFIXES:
            files = {path.name: path.read_bytes()}
            beside = path.with_name(path.name + ".data")
            if beside.exists():
                files[beside.name] = beside.read_bytes()
            yield Case(path.name, files, path.name)
        elif path.is_dir() and any(path.glob("*.safetensors")):
            files = {entry.name: entry.read_bytes() for entry in sorted(path.iterdir())}
            yield Case(path.name, files, "")
            # As a Hugging Face folder: with a configuration that nothing here knows, so that it is not used.
            yield Case(path.name + "_hf", {**files, "config.json": _CONFIG}, "")
    yield _llama()


def _real() -> Iterator[Case]:
    for path in sorted(REAL.iterdir()) if REAL.is_dir() else ():
        if path.suffix != ".md":
            yield Case(path.name, {path.name: path.read_bytes()}, path.name, real=True)


_CONFIG = (
    b'{"model_type": "digits_mlp", "architectures": ["DigitsMLP"], "hidden_size": 48, "dtype": "float32"}'
)
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 16,
    "max_position_embeddings": 32, "tie_word_embeddings": False, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "attention_bias": False, "auto_map": {"AutoModel": "modeling.Model"}, "use_cache": True,
}  # fmt: skip


def _llama() -> Case:
    """A folder whose configuration describes its tensors, so that an architecture is built from it."""
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (16, 8),
        f"{layer}self_attn.q_proj.weight": (8, 8), f"{layer}self_attn.k_proj.weight": (4, 8),
        f"{layer}self_attn.v_proj.weight": (4, 8), f"{layer}self_attn.o_proj.weight": (8, 8),
        f"{layer}mlp.gate_proj.weight": (12, 8), f"{layer}mlp.up_proj.weight": (12, 8),
        f"{layer}mlp.down_proj.weight": (8, 12), f"{layer}input_layernorm.weight": (8,),
        f"{layer}post_attention_layernorm.weight": (8,),
    }  # fmt: skip
    header, body, rng = {}, b"", random.Random(0)
    for name, shape in shapes.items():
        data = struct.pack(f"<{math.prod(shape)}f", *(rng.gauss(0, 0.3) for _ in range(math.prod(shape))))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    weights = len(text).to_bytes(8, "little") + text + body
    return Case(
        "tiny_llama_hf", {"config.json": json.dumps(_LLAMA).encode(), "model.safetensors": weights}, ""
    )
