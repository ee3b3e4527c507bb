"""Lossless writing of checkpoints in several files: shards, Hugging Face folders and their cache."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import same, values
from patch_tools import assert_clean, assert_inside, killed_after, replaced, written
from safetensors.torch import load_file, save_file

from spectool.checkpoint import open_checkpoint, write_checkpoint
from spectool.checkpoint.patch import place
from spectool.errors import CorruptFile, OutputError

INDEX = "model.safetensors.index.json"
NEW = {"b": values((20, 30), seed=7), "d": values((10,), seed=8)}
OLD = {
    "a": values((20, 30)),
    "b": values((20, 30), seed=1),
    "c": values((5, 6), seed=2),
    "d": values((10,), seed=3),
}
SHARDS = {"a": "s-1", "b": "s-1", "c": "s-2", "d": "s-3"}


def make(folder: Path, kind: str = "safetensors") -> Path:
    """Three shards, an index, a configuration, a tokenizer and something else."""
    folder.mkdir(parents=True)
    for shard in set(SHARDS.values()):
        content = {name: OLD[name] for name, where in SHARDS.items() if where == shard}
        if kind == "safetensors":
            save_file(content, folder / f"{shard}.safetensors", metadata={"format": "pt"})
        else:
            torch.save(content, folder / f"{shard}.bin")
    places = {name: f"{shard}.{kind}" for name, shard in SHARDS.items()}
    index = INDEX if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}, indent=1))
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("read me")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def expected(folder: Path) -> dict[str, bytes]:
    """The files of a copy with the two edits."""
    files = contents(folder)
    suffix = ".safetensors" if "s-1.safetensors" in files else ".bin"
    for name, tensor in NEW.items():
        shard = SHARDS[name] + suffix
        files[shard] = replaced(files[shard], OLD, {name: tensor})
    return files


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_is_copied_whole(tmp_path: Path, kind: str) -> None:
    folder, out = make(tmp_path / "in", kind), tmp_path / "out"
    folder.chmod(0o755)
    (folder / "README.md").chmod(0o600)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    wanted = expected(folder)
    del wanted[".git/config"]
    result = written(folder, out, NEW)
    assert contents(out) == wanted
    assert set(result.files) == {out / name for name in wanted}
    for name in ("s-1", "s-3"):
        file = f"{name}.{kind}"
        assert_inside((folder / file).read_bytes(), (out / file).read_bytes(), result, out / file)
    assert (out / "README.md").stat().st_mode & 0o777 == 0o600
    assert out.stat().st_mode & 0o777 == 0o755
    assert_clean(tmp_path, "in", "out")
    if kind == "safetensors":
        assert same(load_file(out / "s-1.safetensors")["b"], NEW["b"])
    else:
        assert same(torch.load(out / "s-1.bin")["b"], NEW["b"])


def test_an_index_into_a_folder(tmp_path: Path) -> None:
    folder, out = make(tmp_path / "in"), tmp_path / "out"
    written(folder / INDEX, out, NEW)
    wanted = expected(folder)
    # What is not needed to load it stays behind.
    del wanted["README.md"], wanted["1_Pooling/config.json"]
    assert contents(out) == wanted
    assert_clean(tmp_path, "in", "out")


def test_an_index_under_a_name(tmp_path: Path) -> None:
    folder, out = make(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    written(folder / INDEX, out / "new.index.json", NEW)
    wanted = expected(folder) | {"notes.txt": b"mine"}
    wanted["new.index.json"] = wanted.pop(INDEX)
    del wanted["README.md"], wanted["1_Pooling/config.json"]
    assert contents(out) == wanted
    with pytest.raises(OutputError, match=r"(s-\d.safetensors|config.json|tokenizer.json) exists already"):
        written(folder / INDEX, out / "other.index.json", {})
    with pytest.raises(OutputError, match="is a part of the input"):
        written(folder / INDEX, folder / "other.index.json", NEW, force=True)
    assert contents(out) == wanted
    written(folder / INDEX, out / "new.index.json", {}, force=True)
    assert same(open_checkpoint(out / "new.index.json").read("b"), OLD["b"])


def test_index_and_folder_in_place(tmp_path: Path) -> None:
    for number, source in enumerate(("", INDEX)):
        folder = make(tmp_path / str(number))
        path = folder / source
        wanted = expected(folder)
        untouched = (folder / "s-2.safetensors").stat().st_ino
        for out in (path, folder):
            with pytest.raises(OutputError, match="is the input itself"):
                written(path, out, NEW)
        result = written(path, folder, NEW, force=True)
        assert contents(folder) == wanted
        assert {file.name for file in result.files} == {"s-1.safetensors", "s-3.safetensors"}
        assert (folder / "s-2.safetensors").stat().st_ino == untouched
        with pytest.raises(OutputError, match="is a part of the input"):
            written(path, folder / "s-2.safetensors", NEW, force=True)


def test_existing_folders(tmp_path: Path) -> None:
    folder, out = make(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="out exists already"):
        written(folder, out, NEW)
    written(folder, out, {}, force=True)
    assert contents(out) == contents(folder)
    written(folder, out, NEW, force=True)
    assert contents(out) == expected(folder)
    (out / "1_Pooling" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"files that the new folder would not have \(.*thesis.tex\)"):
        written(folder, out, {}, force=True)
    assert contents(out) == expected(folder) | {"1_Pooling/thesis.tex": b"precious"}
    with pytest.raises(OutputError, match="files that the new folder would not have"):
        written(folder, tmp_path, {}, force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file is a file; this checkpoint is written as a folder"):
        written(folder, tmp_path / "file", NEW, force=True)
    assert_clean(tmp_path, "in", "out", "file")


def test_exchange_where_the_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = make(tmp_path / "in"), tmp_path / "out"
    written(folder, out, {})
    monkeypatch.setattr(place, "_exchanged", lambda *_: False)
    written(folder, out, NEW, force=True)
    assert contents(out) == expected(folder)
    assert_clean(tmp_path, "in", "out")


def test_the_cache_of_hugging_face(tmp_path: Path) -> None:
    """Snapshots are links into a folder of blobs; the copy holds files and the blobs stay."""
    make(tmp_path / "plain")
    wanted = expected(tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    shutil.copytree(tmp_path / "plain", snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(file for file in snapshot.iterdir() if file.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..", "..", "blobs", str(number)))
    before = contents(blobs)
    out = tmp_path / "out"
    written(snapshot, out, NEW)
    assert contents(out) == wanted
    assert not any(file.is_symlink() for file in out.rglob("*"))
    assert contents(blobs) == before
    written(snapshot, snapshot, NEW, force=True)
    assert contents(snapshot) == wanted
    assert contents(blobs) == before


@pytest.mark.parametrize("target", ["secret", "nothing", "folder"])
def test_links_that_leave_the_folder(tmp_path: Path, target: str) -> None:
    folder = make(tmp_path / "in")
    (tmp_path / "secret").write_text("password")
    (tmp_path / "folder").mkdir()
    (folder / "tokenizer_config.json").symlink_to(Path("..", target))
    match = r"tokenizer_config.json is a link that leaves its folder or leads to no file"
    with pytest.raises(OutputError, match=match):
        written(folder, tmp_path / "out", NEW)
    if target == "secret":
        with pytest.raises(OutputError, match=match):
            written(folder / INDEX, tmp_path / "out", NEW)
    assert_clean(tmp_path, "in", "secret", "folder")


def test_links_and_pipes_inside_the_folder(tmp_path: Path) -> None:
    folder, out = make(tmp_path / "in"), tmp_path / "out"
    (folder / "copy.json").symlink_to("config.json")
    os.mkfifo(folder / "pipe")
    written(folder, out, {})
    assert (out / "copy.json").read_bytes() == (folder / "config.json").read_bytes()
    assert not (out / "copy.json").is_symlink()
    assert not (out / "pipe").exists()


@pytest.mark.parametrize("at", range(6))
def test_disk_full_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    folder, out = make(tmp_path / "in"), tmp_path / "out"
    checkpoint = open_checkpoint(folder)
    real, calls = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"out cannot be written \(No space left on device\)"):
        write_checkpoint(checkpoint, out, NEW)
    assert_clean(tmp_path, "in")


def test_a_shard_that_changes(tmp_path: Path) -> None:
    folder = make(tmp_path / "in")
    checkpoint = open_checkpoint(folder)
    os.utime(folder / "s-2.safetensors", ns=(1, 1))
    with pytest.raises(CorruptFile, match=r"s-2.safetensors changed after it was opened"):
        write_checkpoint(checkpoint, tmp_path / "out", NEW)
    assert_clean(tmp_path, "in")


def test_sudden_death_while_folders_are_exchanged(tmp_path: Path) -> None:
    """The folder is the old or the new one at every moment."""
    folder, out = make(tmp_path / "in"), tmp_path / "out"
    checkpoint = open_checkpoint(folder)
    write_checkpoint(checkpoint, out, {})
    versions = [contents(folder), expected(folder)]

    def forever() -> None:
        for turn in range(10**6):
            write_checkpoint(checkpoint, out, NEW if turn % 2 == 0 else {}, force=True)

    for number in range(8):
        killed_after(0.02 + 0.013 * number, forever)
        assert contents(out) in versions
        for rest in tmp_path.glob(".out.spectool-*.tmp"):
            shutil.rmtree(rest)
        assert_clean(tmp_path, "in", "out")
