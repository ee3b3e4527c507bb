"""A system that refuses, a disk that is full, an interrupt at any moment: old or new, a clear error, nothing left."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from boundaries import tree
from scenarios import EVERY, SEVERAL, SINGLE, Files, Scenario, after, leftovers, visible
from shim import fault_at, interrupt_at, raising

from spectool.errors import SpectoolError

#: Every call and line of every scenario: most of an hour.
THOROUGH = os.environ.get("SPECTOOL_FAULTS") == "all"
BY_NAME = {scenario.name: scenario for scenario in EVERY}
#: What is tried at how many of the moments there are: every one, every third…
SAMPLED = {
    "new digits_mlp_state.pt": 1,
    "new gzip": 2,
    "replaced report": 1,
    "folder in place": 2,
    "replaced folder": 5,
    "new index, poor file system 1": 5,
    "replaced external data": 5,
}
CHOSEN = dict.fromkeys(BY_NAME, 1) if THOROUGH else SAMPLED
FAULTS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EDQUOT)
#: Where a temporary file stays, because it is this that was refused, or what asks for it.
REMOVING = {"unlink", "rmdir", "scandir", "stat", "fstat", "open", "close"}
WRITING = tuple(f"/patch/{name}.py" for name in ("temporary", "place", "write", "folder", "external"))
Moment = Callable[[int], AbstractContextManager[list[str]]]


def tried(
    scenario: Scenario, folder: Path, moment: Moment, at: int
) -> tuple[BaseException | None, list[str]]:
    """Write in a new folder with something in the way; return what was raised and the moments passed."""
    folder.mkdir()
    scenario.build(folder)
    with moment(at) as made:
        try:
            scenario.run(folder)
        except (Exception, KeyboardInterrupt) as error:
            return error, made
    return None, made


def states_of(scenario: Scenario, tmp_path: Path) -> list[Files]:
    """What may be there afterwards: the old, or the new; what was replaced comes last."""
    states = scenario.states(*after(scenario, tmp_path / "undisturbed"))
    if "system 2" in scenario.name:
        return states  # without hard links what was replaced cannot be put back
    # Data files that a model no longer names are removed last, if they can be.
    return [states[0], *states[-2:]] if "replaced external" in scenario.name else [states[0], states[-1]]


@pytest.mark.parametrize("name", CHOSEN)
def test_whatever_call_is_refused(name: str, tmp_path: Path) -> None:
    scenario, folder = BY_NAME[name], tmp_path / "tried"
    permitted = states_of(scenario, tmp_path)
    _, calls = tried(scenario, folder, lambda at: fault_at(at, lambda _: None), -1)
    shutil.rmtree(folder)
    refused = 0
    for at in range(0, len(calls), CHOSEN[name]):
        number = FAULTS[at % len(FAULTS)]
        fault = raising(OSError(number, os.strerror(number)))
        error, _ = tried(scenario, folder, lambda at, fault=fault: fault_at(at, fault), at)  # type: ignore[misc]
        what = f"{calls[at]} ({at} of {len(calls)}), {errno.errorcode[number]}: {error!r}"
        found = visible(tree(folder))
        if error is None:
            assert found in permitted[1:], what
        else:
            refused += 1
            assert isinstance(error, SpectoolError), what
            assert error.exit_code == 2, what
            assert str(error), what
            assert "\n" not in str(error), what
            assert error.hint, what
            assert found in permitted, what
        assert calls[at] in REMOVING or not leftovers(folder), what
        shutil.rmtree(folder)
    assert refused > len(calls) / CHOSEN[name] / 3


@pytest.mark.parametrize("name", CHOSEN)
def test_an_interrupt_at_any_line(name: str, tmp_path: Path) -> None:
    scenario, folder = BY_NAME[name], tmp_path / "tried"
    permitted = states_of(scenario, tmp_path)
    where = ("/report/files.py", "/patch/temporary.py") if "report" in name else WRITING
    if THOROUGH:
        where = (*where, "/checkpoint/patch/", "contextlib.py", "pathlib", "shutil.py")
    _, lines = tried(scenario, folder, lambda at: interrupt_at(at, *where), -1)
    shutil.rmtree(folder)
    stopped = 0
    for at in range(0, len(lines), CHOSEN[name] * 2):
        error, _ = tried(scenario, folder, lambda at: interrupt_at(at, *where), at)
        # An interrupt that comes while something is tidied up may be lost in it, as Python has it.
        assert error is None or isinstance(error, KeyboardInterrupt), f"{lines[at]}: {error!r}"
        stopped += error is not None
        assert visible(tree(folder)) in permitted, lines[at]
        assert not leftovers(folder), lines[at]
        shutil.rmtree(folder)
    assert stopped > len(lines) / CHOSEN[name] / 3


@pytest.mark.parametrize("most", [1, 1000])
@pytest.mark.parametrize(
    "name", ["new gzip", "new digits_mlp_state.pt", "new digits_mlp.onnx", "replaced report"]
)
def test_short_writes_and_reads(
    name: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system that takes fewer bytes than it is given, and gives fewer than it is asked for."""
    scenario, folder = BY_NAME[name], tmp_path / "tried"
    _, done = after(scenario, tmp_path / "undisturbed")
    folder.mkdir()
    scenario.build(folder)
    write, read = os.write, os.read
    monkeypatch.setattr(os, "write", lambda file, data: write(file, memoryview(data)[:most]))
    monkeypatch.setattr(
        os, "read", lambda file, size: read(file, min(size, most)) if size > 128 else read(file, size)
    )
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    scenario.run(folder)
    monkeypatch.undo()
    assert tree(folder) == done


def test_a_write_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, folder = BY_NAME["new gzip"], tmp_path
    scenario.build(folder)
    monkeypatch.setattr(os, "write", lambda file, data: 0)
    with pytest.raises(SpectoolError, match=r"cannot be written \(nothing more is written\)"):
        scenario.run(folder)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers as POSIX has them")
def test_signals_in_the_middle_of_calls(tmp_path: Path) -> None:
    """EINTR, for real: a timer whose signal means nothing."""
    scenario, folder = BY_NAME["new digits_mlp_state.pt"], tmp_path / "tried"
    _, done = after(scenario, tmp_path / "undisturbed")
    folder.mkdir()
    scenario.build(folder)
    came: list[Any] = []
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        while len(came) < 20:
            (folder / "out.pt").unlink(missing_ok=True)
            scenario.run(folder)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert tree(folder) == done


@pytest.mark.parametrize("scenario", [*SINGLE, *SEVERAL], ids=lambda scenario: scenario.name)
def test_the_disk_has_it_before_it_has_its_name(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a power failure cannot leave a name without its bytes; and then the name is forced to the disk, too."""
    dirty: set[int] = set()
    named: list[bool] = []

    def watch(name: str, note: Callable[..., object]) -> None:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            note(*args)
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)

    def close(descriptor: int) -> None:
        assert descriptor not in dirty, "closed before it is forced to the disk"

    def name(*_: object) -> None:
        assert not dirty, "a name before the bytes"
        named.append(False)

    watch("write", lambda descriptor, _: dirty.add(descriptor))
    watch("copy_file_range", lambda _, descriptor, *rest: dirty.add(descriptor))
    watch("fsync", lambda descriptor: (dirty.discard(descriptor), named.append(True)))
    watch("close", close)
    for call in ("link", "replace", "rename"):
        watch(call, name)
    scenario.build(tmp_path)
    named.clear()
    scenario.run(tmp_path)
    assert False in named
    assert named[-1]
