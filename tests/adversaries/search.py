"""The search: adversaries at random, and uphill from those that came closest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from adversaries import compositions, convolutions, infinite, large, matrices
from adversaries.base import Adversary, Draw
from adversaries.judge import Run, Verdict, judged

Family = Callable[[Draw], Adversary | None]

FAMILIES: dict[str, Family] = {
    family.__name__: family
    for module in (matrices, compositions, convolutions, infinite, large)
    for family in module.FAMILIES
}
CLIMBS = 12  # tries from one start
KEPT = 8  # starts per family


@dataclass
class Found:
    """One adversary, how it was solved, and what came of it."""

    family: str
    numbers: tuple[float, ...]
    text: str
    run: Run
    verdict: Verdict


@dataclass
class Search:
    """State of a search over some families."""

    seed: int
    names: tuple[str, ...]
    tried: Counter[str] = field(default_factory=Counter)
    wrong: list[Found] = field(default_factory=list)
    best: dict[str, list[Found]] = field(default_factory=dict)
    seconds: Counter[str] = field(default_factory=Counter)

    def steps(self) -> Iterator[Found]:
        """Yield one judged adversary after another, for ever: half of them drawn, half from a close one."""
        source = Draw(seed=self.seed)
        while True:
            for name in self.names:
                number = source.integer(0, (1 << 52) - 1)
                close = self.best.get(name, [])
                if not close or source.chance(0.5):
                    found = play(name, (), number)
                else:
                    start = source.choice(close)
                    numbers = [
                        source.unit() if source.chance(2.5 / len(start.numbers)) else x for x in start.numbers
                    ]
                    found = play(name, tuple(numbers), number)
                if found is not None:
                    self._keep(found)
                    yield found

    def run(self, seconds: float) -> Iterator[Found]:
        """Yield failures until the time is over."""
        end = time.process_time() + seconds
        before = time.process_time()
        for found in self.steps():
            now = time.process_time()
            self.seconds[found.family] += now - before
            before = now
            if found.verdict.failures:
                yield found
            if now > end:
                return

    def _keep(self, found: Found) -> None:
        self.tried[found.family] += 1
        if found.verdict.failures:
            self.wrong.append(found)
            return
        close = self.best.setdefault(found.family, [])
        close.append(found)
        close.sort(key=lambda one: -one.verdict.pressure)
        del close[KEPT:]


def play(name: str, numbers: tuple[float, ...], seed: int) -> Found | None:
    """Build and judge the adversary that these decisions make; those that are missing come from ``seed``."""
    draw = Draw(numbers, seed)
    adversary = FAMILIES[name](draw)
    if adversary is None:
        return None
    run = Run.drawn(draw, adversary)
    verdict = judged(adversary, run)
    return Found(name, tuple(draw.taken), adversary.text, run, verdict)
