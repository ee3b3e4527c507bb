"""Temporary files of other runs, files of other people, folders that are closed, the mask of permissions."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from boundaries import child, ended
from scenarios import EVERY, SAMPLES, leftovers

from spectool.checkpoint import open_checkpoint, write_checkpoint
from spectool.checkpoint.patch.temporary import temporary_file, temporary_folder
from spectool.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(SAMPLES / "digits_mlp_state.pt", tmp_path / "net.pt")
    (tmp_path / ".git").mkdir()  # the search for a configuration ends here
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_live_writer_keeps_its_temporary_file(folder: Path) -> None:
    """Only what nobody writes any more is removed, and only if it has exactly such a name."""
    target = folder / "out.pt"
    others = [
        ".out.pt.spectool-0123456.tmp",
        ".out.pt2.spectool-01234567.tmp",
        ".out.pt.spectool-01234567.old",
    ]
    for name in (".out.pt.spectool-01234567.tmp", *others):
        (folder / name).write_bytes(b"left")
    os.mkfifo(folder / ".out.pt.spectool-89abcdef.tmp")
    (folder / ".out.pt.spectool-11111111.tmp").symlink_to("net.pt")
    with temporary_file(target) as file, temporary_folder(target) as inner:
        action = lambda: write_checkpoint(open_checkpoint("net.pt"), target, {})  # noqa: E731
        assert ended(child(action)) == 0
        assert file.exists()
        assert inner.exists()
    left = {".out.pt.spectool-89abcdef.tmp", ".out.pt.spectool-11111111.tmp", *others}
    assert set(leftovers(folder)) | {others[0]} == left
    assert {path.name for path in folder.iterdir()} == {"net.pt", ".git", "out.pt", *left}


root = pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only root can be somebody else"
)


@root
@pytest.mark.parametrize(
    ("closed", "arguments", "message"),
    [
        ("net.pt", ["ls", "net.pt"], "net.pt: cannot be read (Permission denied)"),
        ("net.pt", ["inspect", "net.pt"], "net.pt: cannot be read (Permission denied)"),
        ("in", ["ls", "in/net.pt"], "in/net.pt cannot be read (Permission denied)"),
        ("in", ["clip", "in/net.pt", "--max", "1", "-o", "out.pt"], "in/net.pt cannot be read (Permission"),
        ("in", ["ls", "net.pt", "-o", "in/x.csv"], "cannot write in/x.csv: Permission denied"),
        (".", ["ls", "net.pt", "-o", "x.csv"], "cannot write x.csv: no permission to write"),
        ("r.csv", ["ls", "net.pt", "-o", "r.csv"], "cannot write r.csv: no permission to write"),
        (
            ".",
            ["clip", "net.pt", "--max", "1", "-o", "out.pt"],
            "cannot write out.pt: no permission to write",
        ),
        (".", ["clip", "net.pt", "--max", "1", "--in-place", "--force"], "no permission to write"),
        (
            "in",
            ["clip", "net.pt", "--max", "1", "-o", "in/out.pt"],
            "in/out.pt cannot be written (Permission denied)",
        ),
    ],
)
def test_what_is_closed(
    closed: str, arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:  # where others may go, unlike in folders of pytest
        folder = Path(name)
        (folder / "in").mkdir()
        (folder / "r.csv").write_text("precious")
        for place in (folder / "net.pt", folder / "in" / "net.pt"):
            shutil.copy(SAMPLES / "digits_mlp_state.pt", place)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
        (folder / closed).chmod(0o500 if closed == "." else 0)
        for word in ("--help", "nonsense"):  # as root, who may import everything
            main([*arguments[:1], word])
        main(["clip", str(folder / "net.pt"), "--max", "99", "-n", "-q"])
        capfd.readouterr()
        said = os.open(tmp_path / "said", os.O_RDWR | os.O_CREAT)

        def action() -> None:
            os.chdir(folder)
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            sys.stdout = sys.stderr = os.fdopen(said, "w", closefd=False)
            os._exit(main(arguments))

        assert ended(child(action)) == 2
        lines = (tmp_path / "said").read_text().splitlines()
        assert lines[0].startswith("error: ")
        assert message in lines[0]
        assert len(lines) == 2
        assert (folder / "r.csv").read_text() == "precious"


@root
def test_a_file_that_is_replaced_keeps_its_owner(folder: Path) -> None:
    checkpoint = open_checkpoint("net.pt")
    for path, run in (
        (folder / "out.pt", lambda: write_checkpoint(checkpoint, folder / "out.pt", {}, force=True)),
        (folder / "r.csv", lambda: main(["ls", "net.pt", "-o", "r.csv", "-q"])),
    ):
        path.write_text("old")
        path.chmod(0o640)
        os.chown(path, 65534, 65533)
        run()
        status = path.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (65534, 65533, 0o640)
        assert path.read_bytes() != b"old"


@root
def test_rights_of_a_group_go_to_no_other_group(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out.pt"
        shutil.copy("net.pt", Path(name) / "net.pt")
        out.write_text("old")
        out.chmod(0o664)
        os.chown(out, 0, 65533)
        os.chown(name, 65534, 65534)
        checkpoint = open_checkpoint(Path(name) / "net.pt")

        def action() -> None:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            write_checkpoint(checkpoint, out, {}, force=True)

        assert ended(child(action)) == 0
        assert (out.stat().st_gid, stat.S_IMODE(out.stat().st_mode)) == (65534, 0o644)


@pytest.mark.skipif(sys.platform == "win32", reason="a mask as POSIX has it")
def test_the_mask_is_for_results(folder: Path) -> None:
    """A result is a new file like any other; a checkpoint has the permissions of what it is a copy of."""
    Path("net.pt").chmod(0o644)
    before = os.umask(0o027)
    try:
        assert main(["ls", "net.pt", "-o", "r.csv"]) == 0
        write_checkpoint(open_checkpoint("net.pt"), folder / "out.pt", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path("r.csv").stat().st_mode) == 0o640
    assert stat.S_IMODE(Path("out.pt").stat().st_mode) == 0o644


def test_what_somebody_puts_into_a_folder_that_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the old folder and the exchange."""
    from spectool.checkpoint.patch import folder as module

    shutil.copytree(SAMPLES / "digits_mlp_sharded", "in")
    shutil.copytree(SAMPLES / "digits_mlp_sharded", "out")
    for exchange in (True, False):
        real = module.place_folder

        def late(*arguments: object, real: object = real) -> object:
            (folder / "out" / "logs").mkdir(exist_ok=True)
            (folder / "out" / "logs" / "events").write_text("precious")
            return real(*arguments)  # type: ignore[operator]

        with monkeypatch.context() as patch:
            patch.setattr(module, "place_folder", late)
            if not exchange:
                patch.setattr("spectool.checkpoint.patch.place._exchanged", lambda *_: False)
            write_checkpoint(open_checkpoint("in"), folder / "out", {}, force=True)
        assert (folder / "out" / "logs" / "events").read_text() == "precious"
        assert not leftovers(folder)
        shutil.rmtree("out/logs")


@pytest.mark.parametrize("temporary", [temporary_file, temporary_folder])
def test_a_run_that_cleans_up_at_the_wrong_moment(
    temporary: Callable[[Path], AbstractContextManager[Path]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the creation of a temporary file and its lock, it looks like one that a killed run left."""
    real, removed = (os.open, Path.mkdir), []

    def opened(path: Path, *rest: int, **options: int) -> int:
        number = real[0](path, *rest, **options)
        if not removed and rest[0] & os.O_CREAT:
            removed.append(path)
            path.unlink()
        return number

    def made(path: Path, *rest: int) -> None:
        real[1](path, *rest)
        if not removed:
            removed.append(path)
            path.rmdir()

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(Path, "mkdir", made)
    with temporary(folder / "out.pt") as path:
        assert removed
        assert path not in removed
        assert path.exists()
    assert not leftovers(folder)


def test_data_that_belongs_to_another_writer_by_now(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old model's data file is removed with it, but not what has its name when it comes to that."""
    from spectool.checkpoint.patch import external as module

    scenario = next(scenario for scenario in EVERY if scenario.name == "replaced external data")
    scenario.build(folder)
    stale, real = folder / "out" / "out.onnx.data", module.place_each

    def late(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        (folder / "new").write_text("precious")
        (folder / "new").replace(stale)

    assert stale.exists()
    monkeypatch.setattr(module, "place_each", late)
    scenario.run(folder)
    assert stale.read_text() == "precious"
