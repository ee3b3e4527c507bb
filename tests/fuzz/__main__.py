"""`python -m tests.fuzz`: mutate the samples, or repeat one mutant."""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import sys
import time
from pathlib import Path

from .corpus import corpus
from .mutate import mutant
from .run import Worker, fuzz, plan


def main() -> int:
    """Return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument(
        "--stride", type=int, default=1, help="from one seed to the next, for runs side by side"
    )
    parser.add_argument("--files", default="*", help="glob of corpus names")
    parser.add_argument("--keep-crashers", type=Path, metavar="DIR", help="keep inputs that broke a promise")
    parser.add_argument("--one", metavar="NAME:SEED", help="repeat one mutant")
    parser.add_argument("--steps", help="which of its steps, e.g. 0,2")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="with --one: write the mutant there, run nothing"
    )
    options = parser.parse_args()
    if options.one:
        return _one(options.one, options.steps, options.write)
    names = [name for name in corpus() if fnmatch.fnmatch(name, options.files)]
    if not names:
        parser.error(f"no file of the corpus is called {options.files}: {', '.join(corpus())}")
    began = time.monotonic()
    seeds = itertools.count(options.seed, options.stride)
    tally = fuzz(names, seeds, _tell, began + options.seconds, options.keep_crashers)
    print("\n".join(tally.lines(time.monotonic() - began)))
    return 1 if tally.signatures else 0


def _one(which: str, steps: str | None, write: Path | None) -> int:
    name, _, seed = which.rpartition(":")
    only = [int(step) for step in steps.split(",")] if steps else None
    made = mutant(name, int(seed), only)
    print("\n".join(made.steps))
    if write is not None:
        write.mkdir(parents=True, exist_ok=True)
        for file, data in made.case.files.items():
            (write / file).write_bytes(data)
        return 0
    worker = Worker()
    answer = worker.ask({**plan(name, int(seed)), "only": only})
    worker.close()
    print(f"codes: {answer['codes']}, {answer['seconds']:.2f} s of CPU")
    for found in answer["findings"]:
        print(f"{found['signature']}\n{found['command']}: {found['text']}\n{found['trace']}")
    return 1 if answer["findings"] else 0


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
