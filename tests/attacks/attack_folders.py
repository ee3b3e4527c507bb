"""Hugging Face folders: configurations that name code, indices and links that lead elsewhere."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attack import FOREIGN, TOKEN, WEIGHT, Attack, Build, checkpoint, text
from attack_calls import RUNS

ENTRY = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}


def safetensors(path: Path, name: str = "w") -> None:
    header = json.dumps({name: ENTRY}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + WEIGHT.tobytes())


def folder_of(config: Mapping[str, Any] | bytes, more: Callable[[Path], None] | None = None) -> Build:
    """A folder with the weight and a ``config.json``."""

    def build(home: Path) -> Path:
        folder = home / "net"
        folder.mkdir()
        safetensors(folder / "model.safetensors")
        (folder / "config.json").write_bytes(
            config if isinstance(config, bytes) else json.dumps(config).encode()
        )
        if more:
            more(folder)
        return folder

    return build


def with_code(folder: Path) -> None:
    """Code of the repository's own, as ``trust_remote_code`` would run."""
    (folder / "modeling_net.py").write_text(f"open({str(folder.parent / TOKEN)!r}, 'w')\nclass Net: pass\n")
    (folder / "__init__.py").write_text(f"open({str(folder.parent / TOKEN)!r}, 'w')\n")


def index(shards: Mapping[str, Any] | bytes, more: Callable[[Path], None] | None = None) -> Build:
    """A folder with a shard index: tensor → file."""

    def build(home: Path) -> Path:
        folder = home / "net"
        folder.mkdir()
        safetensors(folder / "a.safetensors")
        data = shards if isinstance(shards, bytes) else json.dumps({"weight_map": shards}).encode()
        (folder / "model.safetensors.index.json").write_bytes(data)
        if more:
            more(folder)
        return folder

    return build


def trapped_shard(folder: Path) -> None:
    checkpoint(folder / "b.bin", text("trap"), RUNS["os.system"](folder.parent))


def link(name: str, target: str) -> Callable[[Path], None]:
    def more(folder: Path) -> None:
        safetensors(folder.parent / "secret.safetensors")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return more


def pipe(folder: Path) -> None:
    (folder / "a.safetensors").unlink()
    os.mkfifo(folder / "a.safetensors")


def other(file: str) -> Callable[[Path], None]:
    """Another file with a tensor ``w``, which is zero."""

    def more(folder: Path) -> None:
        safetensors(folder / file)
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data.replace(WEIGHT.tobytes(), bytes(64)))

    return more


def two_tensors(folder: Path) -> None:
    """A shard with a tensor of its own and one that the index has in another."""
    entries = {"w": ENTRY, "v": {**ENTRY, "data_offsets": [64, 128]}}
    header = json.dumps(entries).encode()
    data = bytes(64) + WEIGHT.tobytes()
    (folder / "c.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)


def other_index(folder: Path) -> None:
    """Beside the weight an index of another one, which transformers does not read."""
    other("b.safetensors")(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "b.safetensors"}}')


BERT = {
    "model_type": "bert",
    "hidden_size": 4,
    "num_attention_heads": 1,
    "intermediate_size": 4,
    "vocab_size": 4,
}
NAMED = {
    "auto_map": {"AutoModel": "modeling_net.Net", "AutoConfig": f"{FOREIGN}.Net"},
    "trust_remote_code": True,
}

ATTACKS = [
    Attack("config that maps to its own code", folder_of({"model_type": "net", **NAMED}, with_code)),
    Attack(
        "config of a known model that maps to its own code",
        folder_of({**BERT, "num_hidden_layers": 1, **NAMED}, with_code),
        seconds=40,
    ),
    Attack(
        "config that names other weights",
        folder_of({"transformers_weights": "b.safetensors"}, other("b.safetensors")),
        refused="its config.json says that the weights are not model.safetensors",
    ),
    Attack(
        "config that names no file for the weights",
        folder_of({"transformers_weights": [1]}),
        refused="its config.json says that the weights are not model.safetensors",
    ),
    Attack("index beside the whole weights", folder_of({}, other_index)),
    Attack(
        "index of a tensor that stands in two shards",
        index({"w": "a.safetensors", "v": "c.safetensors"}, two_tensors),
        refused="tensor 'w' stands in shard 'c.safetensors', too",
    ),
    Attack(
        "config that names a function",
        folder_of({**BERT, "num_hidden_layers": 1, "architectures": ["pipeline"]}),
        seconds=40,
    ),
    Attack(
        "config that names a module",
        folder_of({**BERT, "num_hidden_layers": 1, "architectures": ["utils"]}),
        seconds=40,
    ),
    Attack(
        "config with architectures of numbers",
        folder_of({**BERT, "num_hidden_layers": 1, "architectures": [[3], None]}),
        seconds=40,
    ),
    Attack(
        "config that asks for a kernel from the hub",
        folder_of(
            {
                **BERT,
                "num_hidden_layers": 1,
                "_attn_implementation": f"evil/{TOKEN}",
                "attn_implementation": f"evil/{TOKEN}",
            }
        ),
        seconds=40,
    ),
    Attack("config of 10^9 layers", folder_of({**BERT, "num_hidden_layers": 10**9}), seconds=40),
    Attack(
        "config of 10^12 wide layers",
        folder_of({**BERT, "num_hidden_layers": 1, "hidden_size": 10**12}),
        seconds=40,
    ),
    Attack(
        "config of 10^12 positions",
        folder_of({**BERT, "num_hidden_layers": 1, "max_position_embeddings": 10**12}),
        seconds=40,
    ),
    Attack(
        "config with a backbone from the hub",
        folder_of({"model_type": "detr", "use_pretrained_backbone": True}),
        seconds=40,
    ),
    Attack("config nested a million deep", folder_of(b'{"a":' + b"[" * 10**6), refused="nested too deeply"),
    Attack("config that is no object", folder_of(b"[]"), refused="is a JSON list"),
    Attack("config that is a link to a device", folder_of(BERT, link("config.json", "/dev/zero")), clip=2),
    Attack("index that leaves the folder", index({"w": "../a.safetensors"}), refused="leaves the folder"),
    Attack("index with an absolute path", index({"w": "/a.safetensors"}), refused="leaves the folder"),
    Attack(
        "index that is its own shard", index({"w": "model.safetensors.index.json"}), refused="JSON text|shard"
    ),
    Attack("index with a shard that runs", index({"w": "b.bin"}, trapped_shard)),
    Attack("index of a tensor that is not there", index({"v": "a.safetensors"}), refused="has no tensor 'v'"),
    Attack("index of numbers", index({"w": 3}), refused="does not map every name"),
    Attack(
        "index with a shard twice",
        index(b'{"weight_map":{"w":"a.safetensors","w":"a.safetensors"}}'),
        refused="twice",
    ),
    Attack("index of a pipe", index({"w": "a.safetensors"}, pipe), refused="is not a regular file"),
    Attack(
        "shard that is a link in a circle",
        index({"w": "a.safetensors"}, link("a.safetensors", "a.safetensors")),
        refused="is missing|cannot be read",
    ),
    Attack(
        "shard that is a link to a device",
        index({"w": "a.safetensors"}, link("a.safetensors", "/dev/zero")),
        refused="is not a regular file",
    ),
    # The hub's own cache keeps weights behind links: following them is what users expect. Only what they hold is read.
    Attack(
        "shard that is a link to another folder",
        index({"w": "a.safetensors"}, link("a.safetensors", "../secret.safetensors")),
    ),
]
