"""Kill writers at random moments: ``PYTHONPATH=.:tests python tests/faults/kill_many.py [RUNS] [SEED]``.

Every kind of write, SIGKILL after a random time, then: the input is as it was, what has a name is whole and old or new,
nothing else is there but temporary names; and the same write once more ends as if nothing had happened.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from boundaries import child, ended, tree
from scenarios import EVERY, Files, Scenario, after, assert_sound, visible
from test_faults_killed import assert_run_again


def once(scenario: Scenario, folder: Path, wait: float, permitted: list[Files]) -> str:
    """Kill one write and look; return what was found."""
    folder.mkdir()
    scenario.build(folder)
    process = child(lambda: scenario.run(folder))
    time.sleep(wait)
    os.kill(process, signal.SIGKILL)
    code = ended(process)
    files = tree(folder)
    seen = visible(files)
    assert seen in permitted, f"{scenario.name} after {wait * 1000:.1f} ms: {sorted(files)}"
    if scenario.out and (folder / scenario.out).exists():
        assert_sound(folder / scenario.out)
    assert_run_again(scenario, folder, permitted[-1])
    shutil.rmtree(folder)
    stage = "old" if seen == permitted[0] else "new" if seen == permitted[-1] else "between"
    return f"{'killed' if code else 'finished'}, {stage}, {'with' if seen != files else 'without'} leftovers"


def main(runs: int, seed: int) -> None:
    """Kill, and print what was found how often."""
    generator = random.Random(seed)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        known: dict[str, tuple[list[Files], float]] = {}
        for number in range(runs):
            scenario = EVERY[number % len(EVERY)]
            if scenario.name not in known:
                states = scenario.states(*after(scenario, Path(name) / f"undisturbed{number}"))
                folder = Path(name) / f"timed{number}"
                folder.mkdir()
                scenario.build(folder)
                start = time.monotonic()
                assert ended(child(lambda scenario=scenario, folder=folder: scenario.run(folder))) == 0
                known[scenario.name] = states, time.monotonic() - start
            permitted, whole = known[scenario.name]
            found[once(scenario, Path(name) / f"{number}", generator.uniform(0, 0.6 * whole), permitted)] += 1
    for what, count in sorted(found.items()):
        print(f"{count:5d} {what}")


if __name__ == "__main__":
    main(*(int(word) for word in (*sys.argv[1:], *("500", "1")[len(sys.argv) - 1 :])))
