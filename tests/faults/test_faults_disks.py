"""Disks that lack what others have: permissions, locks, links, a flush; files of several parts that are replaced."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path
from unittest import mock

import pytest
from boundaries import tree
from scenarios import EVERY, INDEX, SHARDS, Scenario, assert_sound, edit, leftovers

from spectool.checkpoint.patch import temporary
from spectool.cli import main
from spectool.errors import OutputError
from spectool.report.files import replace_file

BY_NAME = {scenario.name: scenario for scenario in EVERY}
NEW = BY_NAME["new digits_mlp_state.pt"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions as POSIX has them")


def refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@posix
@pytest.mark.parametrize(
    "call, number",
    [
        *(("chmod", number) for number in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)),
        *(("fsync", number) for number in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)),
    ],
)
@pytest.mark.parametrize("name", ["new digits_mlp_state.pt", "replaced folder", "new report"])
def test_what_the_disk_does_not_know_is_no_reason_to_write_nothing(
    call: str, number: int, name: str, tmp_path: Path
) -> None:
    """FAT, network shares and user-space file systems: no permissions to set, nothing to flush."""
    scenario = BY_NAME[name]
    scenario.build(tmp_path)
    with mock.patch.object(os, call, side_effect=refusal(number)) as refused:
        scenario.run(tmp_path)
    assert refused.called
    assert not leftovers(tmp_path)
    if scenario.out:
        assert_sound(tmp_path / scenario.out)


def test_a_disk_that_fails_to_flush_is_one(tmp_path: Path) -> None:
    NEW.build(tmp_path)
    with mock.patch.object(os, "fsync", side_effect=refusal(errno.EIO)), pytest.raises(OutputError):
        NEW.run(tmp_path)
    assert os.listdir(tmp_path) == ["in.pt"]  # noqa: PTH208


def test_a_file_server_whose_answer_was_lost(tmp_path: Path) -> None:
    """NFS makes the link, loses the answer, is asked again, and says that the name is taken."""
    real = os.link

    def link(*arguments: object, **options: object) -> None:
        real(*arguments, **options)  # type: ignore[arg-type]
        raise FileExistsError(errno.EEXIST, "File exists")

    NEW.build(tmp_path)
    with mock.patch.object(os, "link", link):
        NEW.run(tmp_path)
    assert_sound(tmp_path / "out.pt")
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
@pytest.mark.parametrize("name", ["new digits_mlp_state.pt", "new folder"])
def test_a_disk_that_locks_nothing_and_says_so_wrongly(name: str, number: int, tmp_path: Path) -> None:
    scenario = BY_NAME[name]
    scenario.build(tmp_path)
    before = tree(tmp_path)
    with (
        mock.patch.object(temporary, "_lock", return_value=number),
        pytest.raises(OutputError, match="locks nothing"),
    ):
        scenario.run(tmp_path)
    assert not leftovers(tmp_path)
    assert tree(tmp_path) == before


def test_a_folder_for_which_no_file_handle_is_left(tmp_path: Path) -> None:
    scenario, real = BY_NAME["new folder"], os.open
    scenario.build(tmp_path)

    def opened(path: str | Path, *rest: int, **options: int) -> int:
        if "spectool-" in str(path):
            raise refusal(errno.EMFILE)
        return real(path, *rest, **options)

    with mock.patch.object(os, "open", opened), pytest.raises(OutputError):
        scenario.run(tmp_path)
    assert not leftovers(tmp_path)


@posix
@pytest.mark.parametrize(
    "name, kept",
    [
        ("replaced external data", ["out/out.onnx"]),
        ("replaced index", [f"out/{SHARDS[0]}", f"out/{INDEX}"]),
        ("replaced folder", ["out", f"out/{SHARDS[1]}", f"out/{INDEX}"]),
        ("folder in place", [f"in/{SHARDS[0]}"]),
        ("external data in place", ["in/in.onnx", "in/w.bin"]),
    ],
)
def test_what_is_replaced_stays_as_private_as_it_was(name: str, kept: list[str], tmp_path: Path) -> None:
    scenario = BY_NAME[name]
    scenario.build(tmp_path)
    paths = [tmp_path / path for path in kept]
    owner = (65534, 65533) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for path in paths:
        path.chmod(0o750 if path.is_dir() else 0o640)
        os.chown(path, *owner)
    scenario.run(tmp_path)
    for path in paths:
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == (0o750 if path.is_dir() else 0o640), path
        assert (status.st_uid, status.st_gid) == owner, path


def test_a_link_to_a_folder_is_something_to_lose(tmp_path: Path) -> None:
    scenario: Scenario = BY_NAME["replaced folder"]
    scenario.build(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "out" / "runs").symlink_to(tmp_path / "logs")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="out/runs"):
        scenario.run(tmp_path)
    assert (tmp_path / "out" / "runs").is_symlink()
    assert tree(tmp_path) == before


def test_folders_made_on_the_way_go_with_what_they_were_for(tmp_path: Path) -> None:
    from spectool.checkpoint.patch.place import place_each

    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    (tmp_path / "taken").write_text("precious")
    files = [
        (tmp_path / "one", tmp_path / "a" / "b" / "one", False),
        (tmp_path / "two", tmp_path / "taken", False),
    ]
    with pytest.raises(OutputError):
        place_each(files)
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "taken").read_text() == "precious"


@posix
def test_the_mask_of_the_process_is_not_touched(tmp_path: Path) -> None:
    """It belongs to every thread: one that writes at that moment would make its file anybody's."""
    before = os.umask(0o027)
    try:
        with mock.patch.object(os, "umask", side_effect=AssertionError):
            replace_file(tmp_path / "r.csv", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "r.csv").stat().st_mode) == 0o640


def test_a_folder_where_a_disk_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A volume of a container, empty as it may be, is no folder that another could take the name of."""
    scenario = BY_NAME["new folder"]
    scenario.build(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    with pytest.raises(OutputError, match="a disk is mounted there") as error:
        edit(tmp_path / "in", out, force=True)
    assert str(out / "out") in error.value.hint
    assert main(["clip", str(tmp_path / "in"), "--max", "1", "-o", str(out), "--force"]) == 2
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in said] == [
        "error",
        "hint",
    ]  # at once, before anything is computed
    edit(tmp_path / "in", out / "out")
    assert_sound(out / "out")
