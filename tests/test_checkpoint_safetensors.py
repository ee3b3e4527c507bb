"""safetensors, shard indices and Hugging Face folders, compared with the safetensors package."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import DTYPES, assert_equals, values
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectool.checkpoint import Limits, open_checkpoint
from spectool.errors import CheckpointError, CorruptFile, LimitExceeded, NothingToAnalyse, UnrecognisedFormat

SUPPORTED = [dtype for dtype in DTYPES if dtype not in (torch.complex128,)]


def in_file_order(path: Path) -> dict[str, torch.Tensor]:
    """What the package loads, in the order of the header."""
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    names = [name for name in json.loads(path.read_bytes()[8 : 8 + size]) if name != "__metadata__"]
    loaded = load_file(path)
    assert set(names) == set(loaded)
    return {name: loaded[name] for name in names}


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
def test_every_element_type(tmp_path: Path, dtype: torch.dtype) -> None:
    content = {"m": values((3, 4), dtype), "s": values((), dtype, 1), "e": torch.empty(0, 5, dtype=dtype)}
    save_file(content, tmp_path / "x.bin")
    checkpoint = assert_equals(tmp_path / "x.bin", in_file_order(tmp_path / "x.bin"))
    assert checkpoint.format == "safetensors"
    ref = checkpoint.tensors["m"]
    data = (tmp_path / "x.bin").read_bytes()[ref.position :][: ref.nbytes]
    assert data == bytes(content["m"].view(torch.uint8).flatten().tolist())


def test_metadata_is_kept_flat(tmp_path: Path) -> None:
    save_file(
        {"w": values((2, 2))},
        tmp_path / "l.safetensors",
        metadata={"ss_network_alpha": "4.0", "format": "pt"},
    )
    metadata = open_checkpoint(tmp_path / "l.safetensors").metadata
    assert metadata == {"ss_network_alpha": "4.0", "format": "pt"}


def test_gzipped_file(tmp_path: Path) -> None:
    save_file({"w": values((20, 20)), "b": values((3,), torch.int8)}, tmp_path / "x.safetensors")
    (tmp_path / "x.gz").write_bytes(gzip.compress((tmp_path / "x.safetensors").read_bytes()))
    checkpoint = assert_equals(tmp_path / "x.gz", in_file_order(tmp_path / "x.safetensors"))
    assert checkpoint.metadata["gzip"] is True
    (tmp_path / "twice.gz").write_bytes(gzip.compress((tmp_path / "x.gz").read_bytes()))
    with pytest.raises(UnrecognisedFormat, match="gzip file inside a gzip file"):
        open_checkpoint(tmp_path / "twice.gz")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, data, message",
    [
        ({"a": ENTRY}, b"1234", "ends after .* bytes; its header describes"),
        ({"a": ENTRY}, b"12345678x", "1 bytes that its header does not describe"),
        ({"a": ENTRY, "b": ENTRY}, b"12345678", "'b' overlaps the tensor before it"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, b"123456789012", "leaves a hole of 4 bytes"),
        ({"a": ENTRY | {"shape": [3]}}, b"12345678", "cannot have 8 bytes"),
        ({"a": ENTRY | {"shape": [-2]}}, b"12345678", "is not dtype, shape and data_offsets"),
        ({"a": ENTRY | {"shape": [True, 2]}}, b"12345678", "is not dtype, shape and data_offsets"),
        ({"a": ENTRY | {"shape": [2**62, 2**62, 0]}}, b"12345678", "cannot have 8 bytes"),
        ({"a": ENTRY | {"shape": [1] * 100}}, b"1234", "is not dtype, shape and data_offsets"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, b"12345678", "is not dtype, shape and data_offsets"),
        ({"a": ENTRY | {"data_offsets": [0, 8, 9]}}, b"12345678", "is not dtype, shape and data_offsets"),
        ({"a": ENTRY | {"dtype": "F33"}}, b"12345678", "unknown type 'F33'"),
        ({"a": [1]}, b"", "is not dtype, shape and data_offsets"),
        ({"a": ENTRY, "__metadata__": {"x": 1}}, b"12345678", "not a map of strings"),
        (b'{"a": 1, "a": 2}', b"", "has the key 'a' twice"),
        (b'{"a": ', b"", "is not valid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "is not valid JSON"),
        (b'{"\xff": 1}', b"", "is not valid JSON"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        open_checkpoint(raw(tmp_path / "bad.safetensors", header, data))


def test_header_longer_than_the_limit_or_the_file(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", {"a": ENTRY}, b"12345678")
    with pytest.raises(LimitExceeded, match="limit header_bytes = 10"):
        open_checkpoint(path, limits=Limits(header_bytes=10))
    path.write_bytes(struct.pack("<Q", 5000) + b"{}")
    with pytest.raises(CorruptFile, match="needs bytes 8 to 5008"):
        open_checkpoint(path)


def test_packed_types_are_listed_as_unread(tmp_path: Path) -> None:
    header = {
        "f4": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]},
        "w": ENTRY | {"data_offsets": [2, 10]},
    }
    checkpoint = open_checkpoint(raw(tmp_path / "x.safetensors", header, b"0123456789"))
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.unread == {"f4": "elements of 4 bits (F4)"}
    with pytest.raises(CheckpointError, match=r"'f4' cannot be read: elements of 4 bits \(F4\)"):
        checkpoint.read("f4")


def test_file_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(NothingToAnalyse, match="without a single tensor"):
        open_checkpoint(raw(tmp_path / "x.safetensors", {}))


# --- shards and folders -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder in two shards."""
    parts = {
        "model-00001-of-00002.safetensors": {"a": values((3, 4)), "b": values((2,), torch.bfloat16)},
        "model-00002-of-00002.safetensors": {"c": values((5, 2), seed=4)},
    }
    for name, content in parts.items():
        save_file(content, tmp_path / name)
    places = {name: file for file, content in parts.items() for name in content}
    index = {"metadata": {"total_size": 92}, "weight_map": dict(sorted(places.items(), reverse=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    return tmp_path


def sharded_truth(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    truth = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as shard:
            truth[name] = shard.get_tensor(name)
    return truth


def test_index_and_folder(folder: Path) -> None:
    by_index = assert_equals(folder / "model.safetensors.index.json", sharded_truth(folder))
    assert by_index.format == "safetensors-sharded"
    assert by_index.tensors["c"].file == folder / "model-00002-of-00002.safetensors"
    by_folder = assert_equals(folder, sharded_truth(folder))
    assert by_folder.format == "huggingface"
    assert by_folder.path == folder
    for checkpoint in (by_index, by_folder):
        assert checkpoint.metadata["config"]["model_type"] == "gpt2"
        assert checkpoint.metadata["index"] == {"total_size": 92}


def test_torch_shards(tmp_path: Path) -> None:
    torch.save({"a": values((2, 2))}, tmp_path / "pytorch_model-1.bin")
    tied = values((3,), seed=1)
    torch.save({"b": tied, "c": tied}, tmp_path / "pytorch_model-2.bin")
    places = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin", "c": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    checkpoint = assert_equals(tmp_path, {"a": values((2, 2)), "b": tied, "c": tied})
    assert checkpoint.aliases == {"c": "b"}
    assert (
        assert_equals(
            tmp_path / "pytorch_model.bin.index.json", {"a": values((2, 2)), "b": tied, "c": tied}
        ).format
        == "torch-sharded"
    )


def test_linked_shards_as_in_a_download_cache(folder: Path) -> None:
    (folder / "blobs").mkdir()
    name = "model-00002-of-00002.safetensors"
    (folder / name).rename(folder / "blobs" / "0123")
    (folder / name).symlink_to(folder / "blobs" / "0123")
    assert_equals(folder, sharded_truth(folder))


def test_adapter_folder(tmp_path: Path) -> None:
    save_file({"lora_A.weight": values((2, 3))}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16, "r": 2}')
    checkpoint = assert_equals(tmp_path, {"lora_A.weight": values((2, 3))})
    assert checkpoint.metadata["adapter_config"] == {"lora_alpha": 16, "r": 2}


def test_unrelated_config_is_not_taken(tmp_path: Path) -> None:
    save_file({"w": values((2, 3))}, tmp_path / "mine.safetensors")
    (tmp_path / "config.json").write_text("not even JSON")
    assert open_checkpoint(tmp_path / "mine.safetensors").metadata == {}


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b.safetensors", "."]
)
def test_shards_outside_the_folder(tmp_path: Path, file: str) -> None:
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CorruptFile, match="leaves the folder"):
        open_checkpoint(tmp_path / "i.json")


def test_index_that_contradicts_its_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["d"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptFile, match="has no tensor 'd'"):
        open_checkpoint(index)
    content["weight_map"]["d"] = "model-00003-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"shard 'model-00003-of-00002.safetensors' is missing"):
        open_checkpoint(index)
    content["weight_map"] = {"a": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps(content))
    assert any("1 tensors of the shards" in note for note in open_checkpoint(index).notes)
    content["weight_map"] = {"a": index.name}
    index.write_text(json.dumps(content))
    with pytest.raises(UnrecognisedFormat, match="a JSON text, but no shard index"):
        open_checkpoint(index)
    content["weight_map"] = {"a": 3}
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptFile, match="does not map every name to a file name"):
        open_checkpoint(index)


def test_folder_without_known_weights(tmp_path: Path) -> None:
    torch.save({"w": values((2, 2))}, tmp_path / "mine.pt")
    with pytest.raises(UnrecognisedFormat, match="a folder without weights") as error:
        open_checkpoint(tmp_path)
    assert error.value.hint == "name one of these inside it: mine.pt"
    (tmp_path / "unet").mkdir()
    save_file({"w": values((2, 2))}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UnrecognisedFormat, match="a folder without weights") as error:
        open_checkpoint(tmp_path)
    assert error.value.hint == "name one of these inside it: unet, mine.pt"
    assert_equals(tmp_path / "unet", {"w": values((2, 2))})
