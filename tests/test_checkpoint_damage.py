"""Hostile and damaged containers: every one is refused in one clear line, quickly."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import assert_equals, values, zipped
from safetensors.torch import save_file
from torch import nn

from spectool.checkpoint import Limits, open_checkpoint
from spectool.errors import (
    CheckpointError,
    CorruptFile,
    LimitExceeded,
    SpectoolError,
    UnrecognisedFormat,
)

FORMS = [
    pytest.param({}, id="zip"),
    pytest.param({"_use_new_zipfile_serialization": False}, id="legacy"),
]


# --- zip archives -----------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    torch.save({"w": values((4, 4)), "v": values((3,), seed=1)}, tmp_path / "net.pt")
    return tmp_path / "net.pt"


def rezip(path: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> Path:
    new = path.with_name("new.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w") as archive:
        for name in old.namelist():
            change(archive, name, old.read(name))
    return new


def test_compressed_pickle_is_unpacked_within_its_size(plain: Path) -> None:
    def change(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        archive.writestr(name, data, zipfile.ZIP_DEFLATED if name.endswith(".pkl") else zipfile.ZIP_STORED)

    new = rezip(plain, change)
    assert_equals(new, torch.load(plain))
    # Claim that the pickle is ten bytes shorter than what it unpacks to, in both headers.
    with zipfile.ZipFile(new) as archive:
        size = archive.getinfo("net/data.pkl").file_size
    new.write_bytes(new.read_bytes().replace(struct.pack("<I", size), struct.pack("<I", size - 10)))
    with pytest.raises(CorruptFile, match="does not unpack to the"):
        open_checkpoint(new)


def test_large_pickle_record(plain: Path) -> None:
    with pytest.raises(LimitExceeded, match=r"'net/data.pkl' asks for .* limit pickle_bytes = 50"):
        open_checkpoint(plain, limits=Limits(pickle_bytes=50))
    with pytest.raises(LimitExceeded, match="limit directory_bytes = 300"):
        open_checkpoint(plain, limits=Limits(directory_bytes=300))
    with pytest.raises(LimitExceeded, match="limit records = 3"):
        open_checkpoint(plain, limits=Limits(records=3))


# --- legacy files -----------------------------------------------------------------------------------------


def test_legacy_storages_that_contradict_the_pickle(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"w": values((5, 5)), "v": values((3,))}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptFile, match=r"old\.pt ends after \d+ bytes; its storages need"):
        open_checkpoint(path)
    count = struct.pack("<q", 25)
    assert data.count(count) == 1
    for other in (26, 24, -1, 2**62):
        path.write_bytes(data.replace(count, struct.pack("<q", other)))
        with pytest.raises(CorruptFile, match=f"has {other} elements, its tensors expect 25"):
            open_checkpoint(path)


# --- gzip -------------------------------------------------------------------------------------------------


def test_gzip_bomb(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(100 * 2**20))
    (tmp_path / "x.gz").write_bytes(bomb)
    with pytest.raises(LimitExceeded, match="limit unpack_ratio = 200"):
        open_checkpoint(tmp_path / "x.gz")
    with pytest.raises(LimitExceeded, match="limit unpacked_bytes = 1,000"):
        open_checkpoint(tmp_path / "x.gz", limits=Limits(unpacked_bytes=1000))


def test_damaged_gzip(tmp_path: Path) -> None:
    save_file({"w": values((50, 50))}, tmp_path / "x")
    packed = bytearray(gzip.compress((tmp_path / "x").read_bytes()))
    for damaged in (packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:], packed[:-20], packed[:12]):
        (tmp_path / "x.gz").write_bytes(damaged)
        with pytest.raises(CorruptFile, match="damaged gzip stream"):
            open_checkpoint(tmp_path / "x.gz")


# --- other files ------------------------------------------------------------------------------------------


def others(tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("net.pt"))
    npy, npz, office, plain = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(npy, np.ones(3))
    np.savez(npz, a=np.ones(3))
    with zipfile.ZipFile(office, "w") as archive:
        archive.writestr("[Content_Types].xml", "")
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("net.safetensors", "")
    return {
        "tar": (tar.getvalue(), "a tar archive"),
        "npy": (npy.getvalue(), "a numpy array"),
        "npz": (npz.getvalue(), r"a numpy \.npz archive"),
        "office": (office.getvalue(), "an Office document"),
        "zip": (plain.getvalue(), "a zip archive around a checkpoint"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "a Git LFS pointer"),
        "html": (b"\n<!DOCTYPE html><html>", "a web page"),
        "xml": (b"<?xml version='1.0'?>", "an XML or HTML text"),
        "json": (b'{"a": 1}', "a JSON text, but no shard index"),
        "text": (b"hello world, no checkpoint", "a text of 26 bytes and no checkpoint"),
        "gguf": (b"GGUF" + bytes(100), "a GGUF file"),
        "tflite": (b"\x1c\0\0\0TFL3" + bytes(100), "a TensorFlow Lite model"),
        "numpy pickle": (pickle.dumps({"w": np.ones(3)}), "a plain pickle of numpy arrays"),
        "torch pickle": (pickle.dumps({"w": torch.ones(3)}), "a plain pickle of torch objects"),
        "pickle": (pickle.dumps([1, 2, 3]), "a plain pickle, not a checkpoint"),
        "joblib": (b"\x80\x04\x8c\x06joblib\x8c\x05Thing\x93.", "a joblib pickle"),
        "zeros": (bytes(5000), "none of the formats"),
        "random": (random.Random(0).randbytes(5000), "none of the formats"),
    }


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    for name, (data, message) in others(tmp_path).items():
        path.write_bytes(data)
        with pytest.raises(UnrecognisedFormat, match=f"net.pt is {message}") as error:
            open_checkpoint(path)
        assert error.value.hint, name
        assert "\n" not in str(error.value)


def test_no_file_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    with pytest.raises(CorruptFile, match=r"empty\.pt is empty"):
        open_checkpoint(tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path / "empty.pt" / "below")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path / "pipe")


# --- damage -----------------------------------------------------------------------------------------------


def small_files(tmp_path: Path) -> dict[str, bytes]:
    import onnx
    from onnx import helper, numpy_helper

    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(3, 3))
    paths = {
        name: tmp_path / name for name in ("zip", "legacy", "module", "old_module", "safetensors", "onnx")
    }
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, paths["zip"])
    torch.save(net.state_dict(), paths["legacy"], _use_new_zipfile_serialization=False)
    torch.save(net, paths["module"])
    torch.save({"model": net}, paths["old_module"], _use_new_zipfile_serialization=False)
    save_file(net.state_dict(), paths["safetensors"])
    weight = numpy_helper.from_array(np.ones((3, 3), np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [weight])
    onnx.save(helper.make_model(graph), paths["onnx"])
    files = {name: path.read_bytes() for name, path in paths.items()}
    files["gzip"] = gzip.compress(files["safetensors"])
    return files


def survives(path: Path, data: bytes) -> str:
    """Open and read everything; anything but success or a SpectoolError fails the test."""
    path.write_bytes(data)
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except SpectoolError as error:
        caught = error
    else:
        return "read"
    assert type(caught) is not SpectoolError
    assert "\n" not in str(caught)
    return type(caught).__name__


def test_truncated_files_are_always_noticed(tmp_path: Path) -> None:
    for name, data in small_files(tmp_path).items():
        for part in range(50):
            # A gzip stream can lose its checksum, a zip file its comment; nothing else may go unnoticed.
            outcome = survives(tmp_path / "cut", data[: len(data) * part // 50])
            assert outcome in ("CorruptFile", "UnrecognisedFormat"), (name, part)


def test_flipped_bytes_give_a_clear_error_or_a_checkpoint(tmp_path: Path) -> None:
    seeded = random.Random(1)
    start = time.process_time()
    outcomes = set()
    for data in small_files(tmp_path).values():
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(seeded.choice([1, 1, 2, 8])):
                # Structure stands at both ends of these files more often than in the middle.
                place = seeded.choice([seeded.randrange(len(data)), seeded.randrange(min(600, len(data)))])
                damaged[place] = seeded.randrange(256)
            outcomes.add(survives(tmp_path / "flipped", bytes(damaged)))
    assert {"read", "CorruptFile", "UnrecognisedFormat"} <= outcomes
    assert time.process_time() - start < 60


def test_flipped_pickles(tmp_path: Path) -> None:
    """The same on pickles alone, so that every flip hits an opcode or an argument."""
    seeded = random.Random(2)
    buffer = io.BytesIO()
    torch.save({"model": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "n": np.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        data = archive.read("archive/data.pkl")
        storages = {
            name.rsplit("/", 1)[1]: archive.read(name) for name in archive.namelist() if "/data/" in name
        }
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(seeded.choice([1, 1, 2, 4])):
            damaged[seeded.randrange(len(data))] = seeded.randrange(256)
        zipped(tmp_path / "x.pt", bytes(damaged), storages)
        outcomes.add(survives(tmp_path / "x.pt", (tmp_path / "x.pt").read_bytes()))
    assert {"read", "CorruptFile"} <= outcomes
