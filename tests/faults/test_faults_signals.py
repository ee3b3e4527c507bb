"""SIGINT, SIGTERM and SIGHUP at any moment of a whole run: old or new, nothing half, nothing left, one line."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from boundaries import child, ended, tree
from checkpoint_files import ROOT
from safetensors.torch import save_file
from scenarios import Files, leftovers, visible
from shim import fault_at

from spectool.cli import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
CLIP = ["clip", "net.safetensors", "--max", "1.5", "-o", "out.safetensors", "--force", "--report", "out.csv"]
#: How many runs are interrupted at a random moment.
MANY = int(os.environ.get("SPECTOOL_FAULTS_RUNS", "6"))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Files]:
    """A folder to copy, and what a whole run makes of it."""
    folder = tmp_path_factory.mktemp("template")
    tensors = {f"fc{size}.weight": torch.diag(torch.tensor([float(size), 0.5])) for size in (1, 2, 3)}
    save_file(tensors, folder / "net.safetensors")
    (folder / "out.safetensors").write_bytes(b"precious")
    (folder / ".git").mkdir()
    undisturbed = folder.with_name("undisturbed")
    shutil.copytree(folder, undisturbed)
    with contextlib.chdir(undisturbed):  # and not in a child, so that children have everything imported
        assert main(CLIP) == 0
    return folder, tree(undisturbed)


def run(folder: Path, arguments: list[str], before: Callable[[], object] = lambda: None) -> int:
    """Start the program in a child that has everything imported; return its number once it has begun."""
    here, there = os.pipe()

    def action() -> None:
        os.chdir(folder)
        for number in (1, 2):
            file = os.open(folder.parent / f"{folder.name}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)
        sys.argv = ["spectool", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        before()
        os.close(there)
        os._exit(main())

    process = child(action)
    os.close(there)
    os.read(here, 1)
    os.close(here)
    return process


def said(folder: Path) -> list[str]:
    return folder.with_name(f"{folder.name}.2").read_text().splitlines()


def without_seconds(files: Files) -> Files:
    """A report says how long each row took."""
    return {name: b"" if name.endswith(".csv") else data for name, data in files.items()}


def assert_old_or_new(folder: Path, template: Path, done: Files) -> bool:
    """The folder is what it was, or has the checkpoint, or that and its report; return whether it is finished."""
    assert not leftovers(folder)
    found, before = without_seconds(visible(tree(folder))), tree(template)
    written = {**before, "out.safetensors": done["out.safetensors"]}
    assert found in (before, written, without_seconds(done))
    report = folder / "out.csv"
    assert not report.exists() or report.read_bytes().count(b"\r\n") == done["out.csv"].count(b"\r\n")
    return report.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_any_moment(number: signal.Signals, template: tuple[Path, Files], tmp_path: Path) -> None:
    folder, done = template
    start = time.monotonic()
    shutil.copytree(folder, tmp_path / "timed")
    assert ended(run(tmp_path / "timed", CLIP)) == 0
    whole = time.monotonic() - start
    generator = random.Random(number)
    for attempt in range(MANY):
        place = tmp_path / f"{attempt}"
        shutil.copytree(folder, place)
        process = run(place, CLIP)
        time.sleep(generator.uniform(0, whole))
        os.kill(process, number)
        code = ended(process)
        finished = assert_old_or_new(place, folder, done)
        # By the signal itself: before the program could take it, or when all was done.
        assert code in (128 + number, -number, 0) or (number == signal.SIGINT and code == 1)
        assert finished or code != 0
        assert not any("Traceback" in line or "error" in line for line in said(place))


@pytest.mark.parametrize(
    "number, moments",
    [(signal.SIGINT, (5, 40, 55, 65)), (signal.SIGTERM, (20, 60, 90)), (signal.SIGHUP, (50,))],
)
def test_before_a_call(
    number: signal.Signals, moments: tuple[int, ...], template: tuple[Path, Files], tmp_path: Path
) -> None:
    """At moments that are known: calls of the writers and of what they read back."""
    folder, done = template
    words = {signal.SIGTERM: "terminated"}
    for at in moments:
        place = tmp_path / f"{at}"
        shutil.copytree(folder, place)

        def stop(name: str) -> None:
            os.kill(os.getpid(), number)

        # More than once, as `timeout` does; here without mercy, at every call of the cleaning up.
        code = ended(run(place, CLIP, fault_at(at, stop, again=True).__enter__))
        assert code == 128 + number, at
        assert said(place)[-1] == words.get(number, "interrupted")
        assert not any("Traceback" in line for line in said(place))
        assert_old_or_new(place, folder, done)


def test_nohup_stays(template: tuple[Path, Files], tmp_path: Path) -> None:
    folder, done = template
    place = tmp_path / "place"
    shutil.copytree(folder, place)

    def before() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        fault_at(20, lambda name: os.kill(os.getpid(), signal.SIGHUP)).__enter__()

    assert ended(run(place, CLIP, before)) == 0
    assert assert_old_or_new(place, folder, done)


def test_the_exit_code_is_ours_wherever_the_signal_came(tmp_path: Path) -> None:
    """Python itself ends by SIGINT if a plain KeyboardInterrupt has left code run by exec, although it was caught."""
    code = (
        "import os, signal, sys\n"
        "from spectool.cli.signals import stoppable\n"
        "with stoppable(True) as stop:\n"
        "    try:\n"
        "        exec('os.kill(os.getpid(), signal.SIGTERM)\\nfor _ in range(99): pass')\n"
        "    except KeyboardInterrupt:\n"
        "        sys.exit(stop.exit_code)\n"
    )
    (tmp_path / "stopped.py").write_text(code)
    command = [sys.executable, "-m", "stopped"]
    found = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=tmp_path, env=found, timeout=60, check=False).returncode == 143


def test_a_caller_keeps_its_own_handlers(
    template: tuple[Path, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(template[0])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["ls", "net.safetensors", "-o", os.devnull, "--format", "csv"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_checkpoint_is_named_when_its_report_fails(
    template: tuple[Path, Files],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "place"
    shutil.copytree(template[0], place)
    monkeypatch.chdir(place)
    assert main([*CLIP[:-1], "/dev/full", "--format", "csv"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-3].startswith("wrote out.safetensors: 2 of 3 tensors changed")
    assert lines[-2] == "error: cannot write /dev/full: No space left on device"
    assert (place / "out.safetensors").read_bytes() == template[1]["out.safetensors"]
