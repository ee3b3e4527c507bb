"""Send mutants to a worker, survive its death, and keep what broke a promise."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .corpus import ROOT, corpus
from .mutate import mutant, steps_of

#: CPU seconds after which a mutant counts as hung, and those that every MB of it adds.
HANG_SECONDS = 60.0
_PER_MEGABYTE = 30.0
#: Wall seconds: for one that waits and computes nothing. The machine may be busy.
_WALL_SECONDS = 900.0
#: Inputs after which a worker is replaced, so that what one leaves behind does not add up.
_LIFE = 3000


class Worker:
    """A process that is started again when it dies or hangs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._done = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request; a death or a hang is one, too."""
        if self._process is None or self._done >= _LIFE:
            self.close()
            self._start()
        self._done += 1
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        limit = HANG_SECONDS
        answer = self._line(limit)
        if answer is None and process.poll() is None:
            # Most mutants are as large as their file; only for one that takes long it matters how large it is.
            more = (
                _PER_MEGABYTE * mutant(request["name"], request["seed"], request.get("only")).case.size / 1e6
            )
            limit, answer = limit + more, self._line(more)
        if answer is not None:
            return answer
        code = process.poll()
        kind = "hang" if code is None else "died"
        if kind == "hang":
            process.send_signal(signal.SIGUSR1)
            time.sleep(2)
        process.kill()
        process.wait()
        trace = (self._folder / "trace").read_text(errors="replace")[-6000:] if self._folder else ""
        self.close()
        frames = [line for line in trace.splitlines() if "/spectool/" in line]
        where = (
            frames[0].partition("/spectool/")[2].replace('", line ', ":").partition(" ")[0] if frames else ""
        )
        text = f"no answer after {limit:.0f} s of CPU" if kind == "hang" else f"exit status {code}"
        found = {"kind": kind, "command": "", "text": text, "place": where, "trace": trace}
        found["signature"] = f"{kind}: {where}"
        return {"codes": {}, "findings": [found], "seconds": limit, "steps": [], "size": 0}

    def close(self) -> None:
        """End the process and remove its folder."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        keep = {name: value for name, value in os.environ.items() if not name.startswith("SPECTOOL_")}
        environment = {
            **keep,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.fuzz.worker", str(self._folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            cwd=ROOT,
        )  # fmt: skip
        self._done = 0
        if self._line(300) is None:
            raise RuntimeError(f"the worker does not start: {' '.join(command)}")

    def _line(self, seconds: float) -> dict[str, Any] | None:
        """Return the next answer; None if the process ends or does not answer within some seconds of its CPU."""
        assert self._process is not None
        assert self._process.stdout is not None
        spent, until = _cpu_seconds(self._process.pid), time.monotonic() + _WALL_SECONDS
        while not select.select([self._process.stdout], [], [], 2)[0]:
            if _cpu_seconds(self._process.pid) - spent > seconds or time.monotonic() > until:
                return None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Tally:
    """What a run saw."""

    inputs: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    signatures: dict[str, dict[str, Any]] = field(default_factory=dict)
    slowest: list[tuple[float, str]] = field(default_factory=list)

    def lines(self, seconds: float) -> Iterator[str]:
        """Yield the summary."""
        yield f"{self.inputs} mutants of {len(self.files)} files in {seconds:.0f} s ({self.inputs / seconds:.1f}/s)"
        yield "codes: " + ", ".join(f"{name} {count}" for name, count in sorted(self.codes.items()))
        for seconds_taken, line in self.slowest[:3]:
            yield f"slow: {seconds_taken:.1f} s of CPU: {line}"
        yield f"{len(self.signatures)} kinds of violations"
        for signature, found in sorted(self.signatures.items()):
            yield f"  {signature} ({found['count']} times): {found['text'][:160]}\n    {found['command_line']}"


def plan(name: str, seed: int) -> dict[str, Any]:
    """Return what is done with a mutant; a function of the seed alone, so that one line repeats it."""
    rng = random.Random(f"plan:{name}:{seed}")
    size = corpus()[name].size
    # What an input costs decides how often it is computed with; all are listed.
    compute = 0.04 if size > 10**6 else 0.12 if size > 50_000 else 0.5
    return {
        "name": name,
        "seed": seed,
        "compute": rng.random() < compute,
        "more": rng.choice(("clip -n", "clip -o", "clip -o", "check")) if rng.random() < compute / 4 else "",
        "shell": rng.random() < 0.06,
        "format": rng.choice(("json",) * 8 + ("jsonl", "csv", "tsv", "md", "table", "xlsx")),
    }


def command_line(name: str, seed: int, only: Sequence[int] | None = None) -> str:
    """Return the line that repeats one mutant."""
    steps = f" --steps {','.join(map(str, only))}" if only is not None else ""
    return f"python -m tests.fuzz --one {name}:{seed}{steps}"


def fuzz(
    names: Sequence[str],
    seeds: Iterator[int],
    tell: Callable[[str], None],
    until: float,
    keep: Path | None = None,
) -> Tally:
    """Run the mutants of each seed for every file until the time is over or the seeds are.

    Args:
        names: Files of the corpus.
        seeds: Seeds; each is used for every file.
        tell: Gets every new kind of violation.
        until: ``time.monotonic()`` at which to stop.
        keep: Folder for the inputs that broke a promise.
    """
    worker, tally, rng = Worker(), Tally(), random.Random(0)
    try:
        for seed in seeds:
            for name in names:
                if time.monotonic() > until:
                    return tally
                if corpus()[name].size > 10**6 and rng.random() < 0.9:
                    continue  # mostly weights: ten small files cost less and show more
                if tally.inputs % 2000 == 1999:
                    tell(f"{tally.inputs + 1} mutants, seed {seed}")
                request = plan(name, seed)
                answer = worker.ask(request)
                _count(tally, name, seed, answer)
                for found in answer["findings"]:
                    _found(worker, tally, request, found, tell, keep)
    finally:
        worker.close()
    return tally


def _count(tally: Tally, name: str, seed: int, answer: dict[str, Any]) -> None:
    tally.inputs += 1
    tally.files[name] += 1
    for command, code in answer["codes"].items():
        tally.codes[f"{command}={code}"] += 1
    tally.slowest = sorted([*tally.slowest, (answer["seconds"], command_line(name, seed))], reverse=True)[:3]


def _found(
    worker: Worker, tally: Tally, request: dict[str, Any], found: dict[str, Any], tell: Callable[[str], None],
    keep: Path | None,
) -> None:  # fmt: skip
    known = tally.signatures.get(found["signature"])
    if known is not None:
        known["count"] += 1
        return
    only = minimise(worker, request, found["signature"])
    made = mutant(request["name"], request["seed"], only)
    line = command_line(request["name"], request["seed"], only)
    tally.signatures[found["signature"]] = {**found, "count": 1, "command_line": line, "steps": made.steps}
    tell(
        f"{found['signature']}\n  {found['command']}: {found['text'][:200]}\n  {' | '.join(made.steps)}\n  {line}"
    )
    if keep is not None:
        folder = keep / f"{len(tally.signatures):03d}-{request['name']}-{request['seed']}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in made.case.files.items():
            (folder / name).write_bytes(data)
        report = {**found, "steps": made.steps, "command_line": line, "plan": request}
        (folder / "finding.json").write_text(json.dumps(report, indent=1))
        (folder / "trace.txt").write_text(found["trace"])


def minimise(worker: Worker, request: dict[str, Any], signature: str) -> list[int] | None:
    """Return the fewest steps of a seed that still show a violation; None if all are needed."""
    count = steps_of(request["name"], request["seed"])
    if count == 1 or signature.startswith("hang"):
        return None
    left = list(range(count))
    for step in range(count):
        fewer = [other for other in left if other != step]
        answer = worker.ask({**request, "only": fewer})
        if fewer and any(found["signature"] == signature for found in answer["findings"]):
            left = fewer
    return left if len(left) < count else None
