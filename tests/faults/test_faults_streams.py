"""stdout, stderr and names in every state that a shell can give them: one clear line, exit code 2, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOT
from cli_runs import run_shell
from scenarios import SAMPLES

from spectool.cli import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full, /dev/fd and bash")
TABLE = "tensor,kind,dtype,shape,bytes,tied,note"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(SAMPLES / "digits_mlp_state.pt", tmp_path / "net.pt")
    (tmp_path / ".git").mkdir()  # the search for a configuration ends here
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ls net.pt > /dev/full", "cannot write to stdout: No space left on device"),
        ("inspect net.pt --format table > /dev/full", "cannot write to stdout: No space left on device"),
        ("--help > /dev/full", "cannot write to stdout: No space left on device"),
        ("ls net.pt >&-", "cannot write to stdout: it is closed"),
        ("inspect net.pt --format csv -o /dev/full", "cannot write /dev/full: No space left on device"),
    ],
)
def test_what_cannot_be_said(folder: Path, line: str, message: str) -> None:
    before = sorted(folder.iterdir())
    done = run_shell(f"spectool {line}", folder)
    assert done.returncode == 2, done.stderr.decode()
    lines = done.stderr.decode().splitlines()
    assert lines[0] == f"error: {message}"
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert sorted(folder.iterdir()) == before


def test_without_any_stream(folder: Path) -> None:
    """Nothing that a library says to a closed stderr may end up in the file that got its number."""
    done = run_shell("spectool ls net.pt -o net.csv <&- >&- 2>&-", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    rows = (folder / "net.csv").read_text().splitlines()
    assert rows[0] == TABLE
    assert len(rows) == 9


def test_a_reader_that_has_gone_away(folder: Path) -> None:
    done = run_shell("set -o pipefail; spectool ls net.pt | head -0", folder)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"rror" not in done.stderr
    done = run_shell("set -o pipefail; spectool ls net.pt --format csv -o >(exec head -0); sleep 0.1", folder)
    assert done.returncode == 0, done.stderr
    assert b"rror" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("output", ["", "-o /dev/stdout"])
def test_a_disk_that_takes_a_part(folder: Path, unbuffered: str, output: str) -> None:
    """Python's streams without a buffer say how much they wrote, and nothing if that is not all."""
    line = (
        f"export PYTHONUNBUFFERED={unbuffered}; ulimit -f 1; spectool ls net.pt --format json {output} > got"
    )
    done = run_shell(line, folder)
    assert done.returncode == 2, done.stderr
    assert b"File too large" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("output", [[], ["-o", "/dev/stdout"]])
def test_a_pipe_that_does_not_wait(folder: Path, unbuffered: str, output: list[str]) -> None:
    """A program that started us may have set its end so; the other end is ours, and the same."""
    names = [f"{number}.{'x' * 200}" for number in range(900)]
    torch.save({name: torch.zeros(1) for name in names}, folder / "many.pt")
    read, write = os.pipe()
    os.set_blocking(write, False)
    command = [sys.executable, "-m", "spectool", "ls", "many.pt", "--format", "json", *output]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, cwd=folder, env=environment) as run:
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            head = stream.read(1)
            time.sleep(0.3)  # the pipe fills meanwhile
            data = head + stream.read()
        said = run.stderr.read() if run.stderr else b""
    assert run.returncode == 0, said
    assert [row["tensor"] for row in json.loads(data)["tensors"]] == names


def test_open_files_by_their_names(folder: Path) -> None:
    """A file behind a redirection is written where it stands, not replaced."""
    (folder / "log.csv").write_text("precious\n")
    line = "spectool ls net.pt --format csv -o /dev/stdout >> log.csv 2> /dev/null"
    assert run_shell(line, folder).returncode == 0
    line = "exec 7>> log.csv; spectool ls net.pt --format csv -o /dev/fd/7; echo end >&7"
    assert run_shell(line, folder).returncode == 0
    rows = (folder / "log.csv").read_text().splitlines()
    assert [rows[0], rows[1], rows[10], rows[19]] == ["precious", TABLE, TABLE, "end"]
    assert len(rows) == 20
    assert run_shell("spectool ls net.pt -o /dev/stdout", folder).stdout.startswith(b"tensor\tkind")
    done = run_shell("spectool ls net.pt --format csv -o >(cat > got.csv); wait $!", folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "got.csv").read_text().startswith(TABLE)
    assert run_shell("spectool ls net.pt --format csv -o /dev/null", folder).returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == [".git", "got.csv", "log.csv", "net.pt"]


def test_a_working_directory_that_vanished(folder: Path) -> None:
    done = run_shell('d=$PWD; mkdir gone; cd gone; rmdir "$d/gone"; spectool ls "$d/net.pt"', folder)
    assert done.returncode == 0, done.stderr
    done = run_shell('d=$PWD; mkdir gone; cd gone; rmdir "$d/gone"; spectool ls "$d/net.pt" -o x.csv', folder)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: cannot write x.csv: No such file or directory\nhint: ")


def test_limits_of_the_process(folder: Path) -> None:
    done = run_shell("(ulimit -f 0; spectool ls net.pt -o net.csv)", folder)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: cannot write net.csv: File too large\nhint: ")
    assert sorted(path.name for path in folder.iterdir()) == [".git", "net.pt"]
    # Files are opened for one read at a time.
    assert run_shell("(ulimit -n 6; spectool ls net.pt -o net.csv)", folder).returncode == 0


LONG = "x" * 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", LONG], "cannot be read (File name too long)"),
        (["inspect", LONG], "cannot be read (File name too long)"),
        (["clip", LONG, "--max", "1", "-n"], "cannot be read (File name too long)"),
        (["ls", "loop"], "loop is a link to nothing"),
        (["ls", "net.pt/x"], "there is no file net.pt/x"),
        (["ls", "net.pt", "-o", f"{LONG}.csv"], "File name too long"),
        (["ls", "net.pt", "-o", "loop", "--format", "csv"], "cannot write to loop: it is a link to itself"),
        (["ls", "net.pt", "-o", "net.pt/x.csv"], "there is no folder"),
        (["ls", "net.pt", "-o", "link.csv", "--format", "csv"], "link.csv is the file to read"),
        (["ls", "folder", "-o", "folder/config.json"], "config.json belongs to what is read"),
        (
            ["ls", "folder", "-o", "folder/model-00002-of-00002.safetensors", "--format", "csv"],
            "model-00002-of-00002.safetensors belongs to what is read",
        ),
        (["clip", "net.pt", "--max", "1", "-o", LONG], "File name too long"),
        (["clip", "net.pt", "--max", "1", "-o", "loop"], "loop exists already"),
        (["clip", "net.pt", "--max", "1", "-o", "dangling"], "dangling exists already"),
        (["clip", "net.pt", "--max", "1", "-o", "/dev/null", "--force"], "neither a file nor a folder"),
        (["clip", "net.pt", "--max", "1", "-o", "/dev/full"], "neither a file nor a folder"),
        (["clip", "net.pt", "--max", "1", "-o", "/dev/stdout"], "a checkpoint is not written to stdout"),
        (
            ["clip", "net.pt", "--max", "1", "-o", "net.pt/x"],
            "net.pt/x cannot be written: net.pt is no folder",
        ),
        *(
            (["clip", "net.pt", "--max", "1", "-o", alias], f"{alias} is the file to read")
            for alias in ("net.pt", "link.csv", "hard.pt", "folder/../net.pt")
        ),
    ],
)
def test_names_that_cannot_be(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    Path("link.csv").symlink_to("net.pt")
    Path("hard.pt").hardlink_to("net.pt")
    shutil.copytree(SAMPLES / "digits_mlp_sharded", "folder")
    Path("folder/config.json").write_text("{}")
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", ["x" * 251 + ".csv", "é" * 125 + ".csv", "bad\udcff.csv", ".csv.csv"])
def test_names_at_the_edge(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(folder)
    shutil.move("net.pt", "na\udce9ve.pt")
    for _ in range(2):
        assert main(["ls", "na\udce9ve.pt", "-o", name]) == 0
    assert Path(name).read_text().startswith(TABLE)
    assert {path.name for path in folder.iterdir()} == {".git", name, "na\udce9ve.pt"}
    for format in ("json", "jsonl", "md", "tsv", "xlsx", "table"):
        assert main(["ls", "na\udce9ve.pt", "-o", f"out.{format}", "--format", format]) == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            ImportError("libtorch_cpu.so: failed to map segment"),
            2,
            "a library cannot be loaded (libtorch_cpu.so: ",
        ),
        (ImportError("cannot import name 'x'", name="spectool.api"), 3, "internal: ImportError: "),
        (MemoryError(), 2, "there is not enough memory"),
        (OSError(24, "Too many open files", "/lib/x"), 2, "the system refused (Too many open files): /lib/x"),
        (ZeroDivisionError("x"), 3, "internal: ZeroDivisionError: x"),
    ],
)
def test_whose_fault_it_is(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    message: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.chdir(folder)
    monkeypatch.setattr("spectool.api.inspect", fail)
    assert main(["inspect", "net.pt"]) == code
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: {message}")
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
