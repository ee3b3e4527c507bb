"""``python tests/adversaries --seconds 600 --seed 1 [--family NAME]``: search, and say what failed.

Ctrl-C ends it early, with the counts so far.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from adversaries.search import FAMILIES, Found, Search


def show(found: Found) -> None:
    print(f"{found.family}: {found.text}\n  {found.run}\n  {found.verdict.failures[:3]}")
    spectrum = found.verdict.spectrum
    if spectrum is not None:
        print(f"  {spectrum.method}, {spectrum.upper_kind}, {spectrum.note!r}")
    print(f"  numbers = {found.numbers}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU time to spend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--family", action="append", choices=sorted(FAMILIES), help="repeatable; all by default"
    )
    parser.add_argument("--show", type=int, default=20, help="failures to print in full")
    options = parser.parse_args()
    torch.set_num_threads(1)
    search = Search(options.seed, tuple(options.family or FAMILIES))
    try:
        for count, found in enumerate(search.run(options.seconds)):
            if count < options.show:
                show(found)
    except KeyboardInterrupt:
        print("interrupted; so far:")
    for name in search.names:
        closest = max((one.verdict.pressure for one in search.best.get(name, [])), default=0.0)
        wrong = sum(one.family == name for one in search.wrong)
        counts = f"{search.tried[name]:7} tried {wrong:5} wrong"
        print(f"{name:14} {counts}  closest {closest:6.3f}  {search.seconds[name]:6.0f} s")
    print(f"{sum(search.tried.values())} operators, {len(search.wrong)} violations, seed {options.seed}")
    return 1 if search.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
