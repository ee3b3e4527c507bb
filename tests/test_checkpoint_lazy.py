"""Opening reads headers only, reading reads one tensor only, listing imports no torch; hashes; changed files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoint_files import run_python, same, values
from onnx import helper, numpy_helper
from safetensors.torch import save_file

from spectool.checkpoint import open_checkpoint, sha256_of
from spectool.errors import CheckpointError, CorruptFile

LARGE = 200 * 2**20


def large_safetensors(path: Path) -> Path:
    """A sparse file of 200 MB: one large tensor of zeros and a small one behind it."""
    header = {
        "large": {"dtype": "U8", "shape": [LARGE], "data_offsets": [0, LARGE]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [LARGE, LARGE + 8]},
    }
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.seek(LARGE, os.SEEK_CUR)
        stream.write(struct.pack("<2f", 3, 4))
    return path


class Counted(io.FileIO):
    """A file that counts what is read from it."""

    total = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        Counted.total += count
        return count


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    monkeypatch.setattr(Path, "open", lambda self, mode, buffering=-1: Counted(self, mode))
    Counted.total = 0
    return Counted


def test_opening_reads_the_header_and_reading_one_tensor(tmp_path: Path, counted: type[Counted]) -> None:
    path = large_safetensors(tmp_path / "x.safetensors")
    tracemalloc.start()
    checkpoint = open_checkpoint(path)
    assert 0 < counted.total < 10_000
    before = counted.total
    assert checkpoint.read("small").tolist() == [3, 4]
    assert counted.total - before == 8
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("form", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_torch_files_are_read_tensor_by_tensor(
    tmp_path: Path, form: dict[str, Any], counted: type[Counted]
) -> None:
    table = values((1000, 1000))
    with io.FileIO(tmp_path / "net.pt", "wb") as stream:
        torch.save({"table": table, "row": table[7], "small": values((3, 4))}, stream, **form)
    counted.total = 0
    checkpoint = open_checkpoint(tmp_path / "net.pt")
    assert 0 < counted.total < 150_000
    for name, bytes_of_it in (("small", 48), ("row", 4000), ("table", 4_000_000)):
        before = counted.total
        checkpoint.read(name)
        assert counted.total - before == bytes_of_it


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is reset through /proc")
def test_reading_holds_one_tensor(tmp_path: Path) -> None:
    """Peak memory of reading all tensors one after the other is that of the largest one."""
    path = tmp_path / "x.safetensors"
    save_file({f"t{i}": torch.zeros(64 * 2**18) for i in range(4)}, path)
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "from spectool.checkpoint import open_checkpoint\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
        f"checkpoint = open_checkpoint({str(path)!r})\n"
        "checkpoint.read('t0')[:10].sum()\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before = peak()\n"
        "for name in checkpoint.tensors: checkpoint.read(name)\n"
        "print(peak() - before)\n"
    )
    kilobytes = int(run_python(code))
    assert 50_000 < kilobytes < 110_000


def test_structure_without_torch(tmp_path: Path) -> None:
    save_file({"w": values((2, 2))}, tmp_path / "a.safetensors")
    torch.save({"w": values((2, 2))}, tmp_path / "b.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    index = {"weight_map": {"w": "a.safetensors"}}
    (tmp_path / "d.json").write_text(json.dumps(index))
    code = (
        "import sys\n"
        "from spectool.checkpoint import open_checkpoint, sha256_of\n"
        f"for path in {[str(tmp_path / name) for name in ('a.safetensors', 'b.pt', 'c.pt', 'd.json')]!r}:\n"
        "    checkpoint = open_checkpoint(path)\n"
        "    sha256_of(path)\n"
        "    print(checkpoint.format)\n"
        "print([name for name in ('torch', 'numpy', 'onnx', 'pandas', 'safetensors') if name in sys.modules])\n"
    )
    assert run_python(code).split("\n") == [
        "safetensors",
        "torch-zip",
        "torch-legacy",
        "safetensors-sharded",
        "[]",
    ]


def test_structure_of_a_large_state_dict_is_quick(tmp_path: Path) -> None:
    content = {f"layer{i}.weight": torch.zeros(2, 3) for i in range(1000)}
    torch.save(content, tmp_path / "net.pt")
    start = time.process_time()
    assert len(open_checkpoint(tmp_path / "net.pt").tensors) == 1000
    assert time.process_time() - start < 2


def test_many_shards_of_one_file_name_each_tensor_once(tmp_path: Path) -> None:
    """A tied pair spans 1 MiB once; its second name costs nothing but an alias."""
    shared = values((512, 512))
    torch.save({"a": shared, "b": shared.t(), "c": shared}, tmp_path / "net.pt")
    checkpoint = open_checkpoint(tmp_path / "net.pt")
    assert checkpoint.aliases == {"c": "a"}
    assert same(checkpoint.read("b"), shared.t())


# --- files that change ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_that_changed_is_noticed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net.{suffix}"
    content = {"w": values((4, 4))}

    def write() -> None:
        save_file(content, path) if suffix == "safetensors" else torch.save(content, path)

    write()
    checkpoint = open_checkpoint(path)
    checkpoint.read("w")
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(CorruptFile, match="changed after it was opened"):
        checkpoint.read("w")
    write()
    checkpoint = open_checkpoint(path)
    with path.open("ab") as stream:
        stream.truncate(path.stat().st_size - 1)
    with pytest.raises(CorruptFile, match="changed after it was opened"):
        checkpoint.read("w")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("w")


def test_unknown_name(tmp_path: Path) -> None:
    save_file({"w": values((4, 4))}, tmp_path / "net.safetensors")
    with pytest.raises(KeyError, match="nothing"):
        open_checkpoint(tmp_path / "net.safetensors").read("nothing")


# --- hashes -----------------------------------------------------------------------------------------------


def test_hash_of_one_file(tmp_path: Path) -> None:
    torch.save({"w": values((4, 4))}, tmp_path / "net.pt")
    assert sha256_of(tmp_path / "net.pt") == hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()


def listing(*files: Path) -> str:
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_hash_of_several_files(tmp_path: Path) -> None:
    save_file({"a": values((2, 2))}, tmp_path / "s1.safetensors")
    save_file({"b": values((2, 2))}, tmp_path / "s2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}))
    shards = (tmp_path / "s1.safetensors", tmp_path / "s2.safetensors")
    assert sha256_of(index) == listing(index, *shards)
    assert sha256_of(tmp_path) == listing(*shards)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", [], [], [numpy_helper.from_array(np.ones(9), "w")]
    )
    folder = tmp_path / "onnx"
    folder.mkdir()
    onnx.save(
        helper.make_model(graph),
        folder / "n.onnx",
        save_as_external_data=True,
        location="w",
        size_threshold=0,
    )
    assert sha256_of(folder / "n.onnx") == listing(folder / "n.onnx", folder / "w")


def test_spooled_gzip_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large gzip file is unpacked to a temporary file that goes with the checkpoint."""
    import gzip
    import tempfile

    from spectool.checkpoint import source

    monkeypatch.setattr(source, "IN_MEMORY", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    content = {"w": torch.rand(100, 100), "v": torch.rand(30)}
    save_file(content, tmp_path / "x")
    (tmp_path / "x.gz").write_bytes(gzip.compress((tmp_path / "x").read_bytes()))
    descriptors = len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0
    checkpoint = open_checkpoint(tmp_path / "x.gz")
    assert same(checkpoint.read("v"), content["v"])
    assert same(checkpoint.read("w"), content["w"])
    del checkpoint
    if sys.platform == "linux":
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.gz"]
