"""A write is whole or it is not there: names, links, permissions, faults, other writers, sudden death."""

from __future__ import annotations

import errno
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import values
from patch_tools import assert_clean, forked, killed_after, octets, written

from spectool.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from spectool.errors import CheckpointError, OutputError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stands in for calls that only Linux has")
NEW = {"w": values((300, 200), seed=7)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "in.pt"
    torch.save({"w": values((300, 200)), "rest": values((300, 400), seed=1)}, file)
    return file


def loaded(file: Path) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(file)["w"]
    return tensor


def test_an_existing_file_is_kept_without_force(path: Path) -> None:
    out = path.with_name("out.pt")
    out.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"out.pt exists already") as error:
        written(path, out, NEW)
    assert error.value.exit_code == 2
    assert "--force" in error.value.hint
    assert out.read_bytes() == b"precious"
    written(path, out, NEW, force=True)
    assert torch.equal(loaded(out), NEW["w"])
    assert_clean(path.parent, "in.pt", "out.pt")


@pytest.mark.parametrize("alias", ["same", "dots", "symlink", "hardlink"])
def test_the_input_is_not_the_output(path: Path, alias: str) -> None:
    out = path.with_name("alias.pt")
    if alias == "same":
        out = path
    elif alias == "dots":
        out = path.parent / ".." / "folder" / "in.pt"
    elif alias == "symlink":
        out.symlink_to("in.pt")
    else:
        out.hardlink_to(path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="is the input itself") as error:
        written(path, out, NEW)
    assert "--in-place" in error.value.hint
    assert path.read_bytes() == before
    written(path, out, NEW, force=True)
    assert torch.equal(loaded(out), NEW["w"])
    # A second name of the same bytes keeps them; a symbolic link goes on leading to the file.
    assert torch.equal(loaded(path), values((300, 200)) if alias == "hardlink" else NEW["w"])
    assert out.is_symlink() == (alias == "symlink")


def test_a_link_as_output(path: Path) -> None:
    other = path.parent / "other"
    other.mkdir()
    link = path.with_name("link.pt")
    link.symlink_to(other / "real.pt")
    with pytest.raises(OutputError, match=r"link.pt exists already"):
        written(path, link, NEW)
    result = written(path, link, NEW, force=True)
    assert link.is_symlink()
    assert result.files == (other / "real.pt",)
    assert torch.equal(loaded(other / "real.pt"), NEW["w"])
    assert_clean(other, "real.pt")


def test_outputs_that_cannot_be(path: Path) -> None:
    folder = path.parent
    with pytest.raises(OutputError, match=r"there is no folder .*missing") as error:
        written(path, folder / "missing" / "out.pt", NEW)
    assert error.value.hint == "create the folder first"
    with pytest.raises(OutputError, match=r"in.pt is no folder"):
        written(path, path / "out.pt", NEW)
    with pytest.raises(OutputError, match="exists already"):
        written(path, folder, NEW)
    with pytest.raises(OutputError, match=r"folder is a folder"):
        written(path, folder, NEW, force=True)
    for force, message in ((False, "exists already"), (True, "neither a file nor a folder")):
        with pytest.raises(OutputError, match=message):
            written(path, Path("/dev/full"), NEW, force=force)
    (folder / "full").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="neither a file nor a folder"):
        written(path, folder / "full", NEW, force=True)
    with pytest.raises(OutputError, match=r"cannot be written \(File name too long\)"):
        written(path, folder / ("x" * 300), NEW)
    assert_clean(folder, "in.pt", "full")
    written(path, folder / ("x" * 255), NEW)


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o444, 0o664])
def test_permissions_are_those_of_the_input(path: Path, mode: int) -> None:
    path.chmod(mode)
    out = path.with_name("out.pt")
    old = os.umask(0o077)
    try:
        written(path, out, NEW)
    finally:
        os.umask(old)
    assert out.stat().st_mode & 0o7777 == mode


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_read_only_folder(path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        with pytest.raises(OutputError, match=r"cannot be written \(Permission denied\)"):
            written(path, path.with_name("out.pt"), NEW)
    finally:
        path.parent.chmod(0o700)


@pytest.mark.parametrize(
    "number, message, hint",
    [
        (errno.EACCES, "Permission denied", "write to a folder you may write in"),
        (errno.EROFS, "Read-only file system", "write to another folder"),
    ],
)
def test_a_folder_that_may_not_be_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str, hint: str
) -> None:
    real = os.open

    def refuse(file: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return real(file, flags, *rest, **options)

    checkpoint = open_checkpoint(path)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match=rf"out.pt cannot be written \({message}\)") as error:
        checkpoint.write(path.with_name("out.pt"), NEW)
    assert error.value.hint == hint
    monkeypatch.undo()
    assert_clean(path.parent, "in.pt")


def failing(name: str, at: int, fault: BaseException) -> Callable[..., Any]:
    """A function of ``os`` that fails when it is called for the ``at``-th time."""
    real, calls = getattr(os, name), iter(range(10**9))

    def call(*args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise fault
        return real(*args, **options)

    return call


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
PLACES = [
    ("write", 0),
    ("copy_file_range", 0),
    ("fsync", 0),
    ("fsync", 1),
    ("chmod", 0),
    ("link", 0),
    ("close", 2),
]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name, at", PLACES, ids=str)
def test_interrupted_anywhere(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int, force: bool
) -> None:
    """Whatever call is interrupted, the old output stays and nothing else is left."""
    out = path.with_name("out.pt")
    if force:
        out.write_bytes(b"precious")
    checkpoint = open_checkpoint(path)
    monkeypatch.setattr(os, name, failing(name, at, KeyboardInterrupt()))
    try:
        write_checkpoint(checkpoint, out, NEW, force=force)
        finished = True
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    if finished or (out.exists() and out.read_bytes() != b"precious"):
        # Behind the last step, or at a call that this way of writing does not make.
        assert torch.equal(loaded(out), NEW["w"])
        assert (name, at) in (("fsync", 1), ("close", 2), ("link", 0))
    assert_clean(path.parent, *(("in.pt", "out.pt") if out.exists() else ("in.pt",)))


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_disk_full(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    out = path.with_name("out.pt")
    checkpoint = open_checkpoint(path)
    monkeypatch.setattr(os, name, failing(name, 0, FULL))
    with pytest.raises(OutputError, match=r"out.pt cannot be written \(No space left on device\)") as error:
        checkpoint.write(out, NEW)
    assert error.value.hint == "make room, or write to another disk"
    monkeypatch.undo()
    assert_clean(path.parent, "in.pt")


def test_the_system_refuses_in_the_middle(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, old[1]))
    try:
        with pytest.raises(OutputError, match=r"out.pt cannot be written \(File too large\)"):
            checkpoint.write(path.with_name("out.pt"), NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert_clean(path.parent, "in.pt")


@pytest.mark.parametrize("copies", ["never", "nothing"])
def test_systems_without_fast_copy_or_links(path: Path, monkeypatch: pytest.MonkeyPatch, copies: str) -> None:
    out, other = path.with_name("out.pt"), path.with_name("other.pt")
    written(path, out, NEW)
    refuse = failing("copy_file_range", 0, OSError(errno.EXDEV, ""))
    monkeypatch.setattr(os, "copy_file_range", refuse if copies == "never" else lambda *_: 0)
    monkeypatch.setattr(os, "link", failing("link", 0, OSError(errno.EPERM, "")))
    written(path, other, NEW)
    assert other.read_bytes() == out.read_bytes()
    assert_clean(path.parent, "in.pt", "out.pt", "other.pt")


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    out = path.with_name("out.pt")
    checkpoint = open_checkpoint(path)
    real = os.link

    def late(*args: Any, **options: Any) -> None:
        out.write_bytes(b"precious")
        if not links:
            raise OSError(errno.EPERM, "")
        real(*args, **options)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(OutputError, match=r"out.pt was created by somebody else meanwhile"):
        checkpoint.write(out, NEW)
    assert out.read_bytes() == b"precious"
    assert_clean(path.parent, "in.pt", "out.pt")


@pytest.mark.parametrize("change", ["append", "replace", "touch", "remove"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_input_that_changes(path: Path, monkeypatch: pytest.MonkeyPatch, change: str, when: str) -> None:
    def happen() -> None:
        if change == "append":
            with path.open("ab") as file:
                file.write(b"more")
        elif change == "replace":
            path.with_name("new").write_bytes(path.read_bytes())
            path.with_name("new").replace(path)
        elif change == "touch":
            os.utime(path, ns=(1, 1))
        else:
            path.unlink()

    checkpoint = open_checkpoint(path)
    out = path.with_name("out.pt")
    if when == "before":
        happen()
    else:
        real = os.copy_file_range

        def copy(*args: Any) -> int:
            count = real(*args)
            happen()
            return count

        monkeypatch.setattr(os, "copy_file_range", copy)
    match = (
        "No such file"
        if (change, when) == ("remove", "before")
        else "changed after it was opened|vanished while"
    )
    with pytest.raises(CheckpointError, match=match):
        checkpoint.write(out, NEW)
    assert_clean(path.parent, *(() if change == "remove" else ("in.pt",)))


def test_a_copy_that_does_not_read_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that stores other bytes than it was given."""
    out = path.with_name("out.pt")
    out.write_bytes(b"precious")
    real = os.write

    def corrupt(descriptor: int, data: Any) -> int:
        return real(descriptor, bytes(data[:-1]) + bytes([data[-1] ^ 1]))

    checkpoint = open_checkpoint(path)
    monkeypatch.setattr(os, "write", corrupt)
    with pytest.raises(OutputError, match=r"out.pt was not written: the finished copy does not read back"):
        checkpoint.write(out, NEW, force=True)
    monkeypatch.undo()
    assert out.read_bytes() == b"precious"
    assert_clean(path.parent, "in.pt", "out.pt")


def test_two_writers_at_once(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    edits = [{"w": values((300, 200), seed=seed)} for seed in (11, 12)]
    for attempt in range(8):
        out = path.with_name(f"out{attempt}.pt")
        start = time.time() + 0.02

        def write(edit: dict[str, torch.Tensor], out: Path = out, start: float = start) -> None:
            time.sleep(max(start - time.time(), 0))
            write_checkpoint(checkpoint, out, edit)

        children = [forked(lambda edit=edit: write(edit)) for edit in edits]  # type: ignore[misc]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == [0, 2]
        assert torch.equal(loaded(out), edits[codes.index(0)]["w"])
    assert_clean(path.parent, "in.pt", *(f"out{attempt}.pt" for attempt in range(8)))


def write_forever(
    checkpoint: Checkpoint, out: Path, edits: list[dict[str, torch.Tensor]], force: bool
) -> None:
    for number in range(10**6):
        file = out if force else out.with_name(f"{number}.pt")
        write_checkpoint(checkpoint, file, edits[number % 2], force=force)


@pytest.mark.parametrize("force", [False, True])
def test_sudden_death(path: Path, force: bool) -> None:
    """Killed at any moment: every file that has a name is whole."""
    checkpoint = open_checkpoint(path)
    edits = [{"w": values((300, 200), seed=seed)} for seed in (11, 12)]
    folder = path.parent / "out"
    folder.mkdir()
    whole = {octets(edit["w"]) for edit in edits}
    generator = random.Random(5)
    left, found = 0, 0
    for attempt in range(60):
        if attempt >= 10 and found and left:
            break
        killed_after(
            generator.uniform(0.03, 0.12), lambda: write_forever(checkpoint, folder / "out.pt", edits, force)
        )
        for file in folder.iterdir():
            if file.name.startswith("."):
                assert ".pt.spectool-" in file.name
                assert file.suffix == ".tmp"
                left += 1
            else:
                assert octets(loaded(file)) in whole
                found += 1
            file.unlink()
    assert found
    assert left
