"""Inputs that cannot be read to their end, that change meanwhile, or that may not be read; outputs of other people."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from boundaries import child, ended, tree
from checkpoint_files import values
from scenarios import SAMPLES, leftovers

import spectool
from spectool.checkpoint import open_checkpoint, sha256_of, write_checkpoint
from spectool.checkpoint import source as source_module
from spectool.checkpoint.patch import write as write_module
from spectool.checkpoint.source import Source
from spectool.cli import main
from spectool.errors import CheckpointError, CorruptFile

FILES = {
    "net.pt": "digits_mlp_state.pt",
    "legacy.pt": "digits_cnn_legacy.pt",
    "net.safetensors": "digits_mlp_bf16.safetensors",
    "net.onnx": "digits_mlp.onnx",
    "folder": "digits_mlp_sharded",
}
COMMANDS = {"ls": [], "inspect": ["-k", "1"], "check": ["--max", "9"], "clip": ["--max", "2", "-o", "out"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, sample in FILES.items():
        copy = shutil.copytree if (SAMPLES / sample).is_dir() else shutil.copy
        copy(SAMPLES / sample, tmp_path / name)
    (tmp_path / ".git").mkdir()  # the search for a configuration ends here
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def reading(happen: Callable[[Path], object], at: int = -1) -> Iterator[list[str]]:
    """Let something happen when checkpoints are read for the ``at``-th time; yield what was read."""
    made: list[str] = []
    real = Source.read_into

    def read_into(self: Source, start: int, buffer: memoryview, what: str = "data") -> None:
        made.append(what)
        if len(made) - 1 == at:
            happen(self.path)
        real(self, start, buffer, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "read_into", read_into)
        yield made


def last_error(capfd: pytest.CaptureFixture[str]) -> str:
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert "Traceback" not in err
    assert lines[-2].startswith("error: ")
    assert lines[-1].startswith("hint: ")
    return lines[-2]


class Broken:
    """A file whose first block is all that can be read."""

    def __init__(self, stream: Any, meanwhile: Callable[[], object] | None = None) -> None:
        self._stream, self._meanwhile = stream, meanwhile

    def __enter__(self) -> Broken:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def readinto(self, buffer: memoryview) -> int:
        if self._meanwhile is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        count: int = self._stream.readinto(buffer)
        self._meanwhile()
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@pytest.mark.parametrize(
    "command, name",
    [
        *(("ls", name) for name in FILES),
        *(("inspect", name) for name in ("net.pt", "net.onnx", "folder")),
        ("check", "net.safetensors"),
        ("clip", "net.pt"),
        ("clip", "folder"),
    ],
)
def test_a_disk_that_fails_in_the_middle(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    before = tree(folder)
    with reading(lambda path: None) as made:
        main([command, name, *COMMANDS[command]])
    done = tree(folder)
    capfd.readouterr()
    real = Path.open

    def broken(path: Path) -> None:
        monkeypatch.setattr(Path, "open", lambda *a, **o: Broken(real(*a, **o)))

    for at in (0, len(made) // 2, len(made) - 1):
        shutil.rmtree("out", ignore_errors=True)
        Path("out").unlink(missing_ok=True)
        with reading(broken, at):
            assert main([command, name, *COMMANDS[command]]) == 2
        monkeypatch.setattr(Path, "open", real)
        error = last_error(capfd)
        assert "cannot be read at " in error or "does not read back" in error
        assert "Input/output error" in error
        # At the end it is the copy that is read; that it is there is said.
        assert tree(folder) == (done if "out was written, but could not be measured" in error else before)
    assert ("was written" in error) == (command == "clip")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    path.with_name("other").write_bytes(path.read_bytes())
    path.with_name("other").replace(path)


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))  # clocks of file systems may be coarse


CHANGES = [append, truncate, replace, rewrite, Path.unlink]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "folder"])
def test_a_file_that_changes_between_two_reads(
    folder: Path, capfd: pytest.CaptureFixture[str], name: str, change: Callable[[Path], object]
) -> None:
    for command in ("inspect", "clip"):
        target = Path(f"{command}.{name}")
        copy = shutil.copytree if Path(name).is_dir() else shutil.copy
        copy(name, target)
        with reading(lambda path: None) as made:
            assert main(["inspect", str(target), *COMMANDS["inspect"]]) == 0
        capfd.readouterr()
        with reading(change, len(made) - 1):
            assert main([command, str(target), *COMMANDS[command]]) == 2
        error = last_error(capfd)
        assert any(
            text in error for text in ("changed after it was opened", "vanished while", "No such file")
        )
        assert not Path("out").exists()
    assert not leftovers(folder)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changes_during_a_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    """What was read may be a mixture then; of a file that was replaced or removed it is the old one, whole."""
    path = folder / "net.safetensors"
    checkpoint, real, open_file = open_checkpoint(path), path.read_bytes(), Path.open
    ref = checkpoint.tensors["fc1.weight"]

    def changing(self: Path, *rest: Any, **options: Any) -> Any:
        monkeypatch.setattr(Path, "open", open_file)
        return Broken(open_file(self, *rest, **options), lambda: change(path))

    monkeypatch.setattr(Path, "open", changing)
    if change in (replace, Path.unlink):
        tensor = checkpoint.read(ref.name)
        assert tensor.view(torch.uint8).numpy().tobytes() == real[ref.offset : ref.offset + ref.nbytes]
    else:
        with pytest.raises(CorruptFile, match="changed after it was opened"):
            checkpoint.read(ref.name)
    with pytest.raises(CheckpointError, match=r"changed after it was opened|No such file"):
        checkpoint.read(ref.name)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["net.pt", "folder"])
def test_a_file_that_changes_just_before_the_copy_gets_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Path], object]
) -> None:
    """In place this would undo what somebody else wrote meanwhile: a training run, another clip."""
    path = folder / name
    checkpoint = open_checkpoint(path)
    edits = {"fc1.weight": values((48, 64))}
    file = checkpoint.tensors["fc1.weight"].file

    def late(self: object) -> None:
        monkeypatch.undo()
        change(file)
        changed.append(tree(folder))
        self.check_sources()  # type: ignore[attr-defined]

    changed: list[dict[str, bytes]] = []
    for out in (path, folder / "out"):
        monkeypatch.setattr(write_module.Plan, "check_sources", late)
        with pytest.raises(CorruptFile, match=r"changed after it was opened|vanished while"):
            write_checkpoint(checkpoint, out, edits, force=True)
        assert visible_only(tree(folder)) == visible_only(changed.pop())
        assert not leftovers(folder)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (shutil.copytree if (SAMPLES / FILES[name]).is_dir() else shutil.copy)(SAMPLES / FILES[name], path)
        checkpoint = open_checkpoint(path)


def visible_only(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if ".spectool-" not in name}


def test_two_clips_in_place(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second began before the first wrote: it says so, and leaves what the first wrote."""
    first: list[bytes] = []

    def other(path: Path) -> None:
        assert ended(child(lambda: spectool.clip(path, max=1.5, out=path, force=True))) == 0
        first.append(path.read_bytes())

    with reading(other, 14):
        assert main(["clip", "net.pt", "--max", "2", "--in-place", "--force"]) == 2
    assert "net.pt changed after it was opened" in last_error(capfd)
    assert Path("net.pt").read_bytes() == first[0]


def test_the_hash_is_of_what_was_analysed(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "net.pt")
    before = hashlib.sha256((folder / "net.pt").read_bytes()).hexdigest()
    assert sha256_of(checkpoint) == before == spectool.inspect("net.pt", k=1, hash=True).sha256
    replace(folder / "net.pt")
    with pytest.raises(CorruptFile, match="changed after it was opened"):
        sha256_of(checkpoint)


def test_no_room_to_unpack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "net.pt.gz").write_bytes(gzip.compress((folder / "net.pt").read_bytes()))
    monkeypatch.setattr(source_module, "IN_MEMORY", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
    with pytest.raises(
        CheckpointError, match=r"net.pt.gz: cannot be unpacked to a temporary file \(No such"
    ) as e:
        open_checkpoint(folder / "net.pt.gz")
    assert "TMPDIR" in e.value.hint


def test_a_disk_that_is_nearly_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    room = SimpleNamespace(total=10**9, used=10**9, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    assert main(["clip", "net.pt", "--max", "2", "-o", "out.pt"]) == 0
    text = "warning: out.pt may not fit on its disk: 1 kB are free there, net.pt has"
    assert capfd.readouterr().err.startswith(text)


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "net.pt", "-o", "sub/x.csv"], ["clip", "net.pt", "--max", "2", "-o", "sub/out.pt"]],
)
def test_a_folder_that_vanishes(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    Path("sub").mkdir()
    with reading(lambda path: Path("sub").rmdir(), 14):
        assert main(arguments) == 2
    error = last_error(capfd)
    assert "sub" in error
    assert "No such file or directory" in error or "there is no folder" in error
    assert not Path("sub").exists()
