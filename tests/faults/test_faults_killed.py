"""Killed at any system call: what has a name is whole, the input is untouched, and the next run finds its way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from boundaries import boundaries, traceable, tree
from scenarios import EVERY, Files, Scenario, after, assert_sound, leftovers, visible

from spectool.errors import OutputError

#: Kill the writer at every change of the folder, not only look at it there: minutes.
THOROUGH = os.environ.get("SPECTOOL_FAULTS") == "all"
pytestmark = pytest.mark.skipif(bool(traceable()), reason=traceable())


def watched(scenario: Scenario, folder: Path, stop: int = -1) -> list[tuple[Files, list[Path]]]:
    """Every state of a folder (files and folders) that a kill could leave; killed in state number ``stop``."""
    folder.mkdir(parents=True)
    scenario.build(folder)
    states: list[tuple[Files, list[Path]]] = []
    for _ in boundaries(lambda: scenario.run(folder)):
        files = tree(folder)
        if not states or files != states[-1][0]:
            folders = [path.relative_to(folder) for path in folder.rglob("*") if path.is_dir()]
            states.append((files, folders))
            if len(states) - 1 == stop:
                break
    return states


def restored(folder: Path, files: Files, folders: list[Path]) -> None:
    """Make a folder what another was; nobody holds a lock in it, as after a kill."""
    for path in (Path(), *folders):
        (folder / path).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def assert_run_again(scenario: Scenario, folder: Path, done: Files) -> None:
    """The same command once more ends as it should, and what the killed one left is cleaned up."""
    there = visible(tree(folder))
    refused = ""
    try:
        scenario.run(folder)
    except OutputError as error:
        refused = str(error)
    if refused:
        # Only what is finished, or one of several files under its own name, is in the way.
        assert "exists already" in refused or "holds files already" in refused
        assert any(there.get(name) == data for name, data in done.items())
        return
    found = visible(tree(folder))
    assert not leftovers(folder, "tmp")
    # Data files that a killed run left under their names make the next one choose others, and name those.
    assert "external" in scenario.name or found == done
    if scenario.out:
        assert_sound(folder / scenario.out)


@pytest.mark.parametrize("scenario", EVERY, ids=lambda scenario: scenario.name)
def test_every_system_call_is_a_good_moment_to_die(scenario: Scenario, tmp_path: Path) -> None:
    before, done = after(scenario, tmp_path / "undisturbed")
    permitted = scenario.states(before, done)
    states = watched(scenario, tmp_path / "watched")
    assert states[0][0] == before
    assert states[-1][0] == done
    place = 0
    for number, (files, folders) in enumerate(states):
        seen = visible(files)
        assert seen in permitted, f"state {number}: {sorted(files)}"
        assert permitted.index(seen) >= place, "a step backwards"
        place = permitted.index(seen)
        if scenario.gone and seen == permitted[1]:
            # Away, but not lost: not even to the next run, which may fail itself.
            olds = {name.partition(".old/")[2]: data for name, data in files.items() if ".old/" in name}
            assert olds == {
                name[len("out/") :]: data for name, data in before.items() if name.startswith("out/")
            }
        folder = tmp_path / "state"
        restored(folder, files, folders)
        if scenario.out and (folder / scenario.out).exists():
            assert_sound(folder / scenario.out)
        assert_run_again(scenario, folder, done)
        shutil.rmtree(folder)
    # Temporary names were there to be seen, or nothing was tested.
    assert any(len(visible(files)) < len(files) for files, _ in states)


@pytest.mark.parametrize("scenario", EVERY if THOROUGH else EVERY[::4], ids=lambda scenario: scenario.name)
def test_killed(scenario: Scenario, tmp_path: Path) -> None:
    """A real SIGKILL, and a run after it."""
    before, done = after(scenario, tmp_path / "undisturbed")
    permitted = scenario.states(before, done)
    count = len(watched(scenario, tmp_path / "watched"))
    for stop in range(count) if THOROUGH else (count // 3, count - 2):
        folder = tmp_path / f"killed{stop}"
        watched(scenario, folder, stop)
        assert visible(tree(folder)) in permitted
        assert_run_again(scenario, folder, done)
        shutil.rmtree(folder)
