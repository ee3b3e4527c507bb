"""Whether a file is read as promised: it is understood, or refused with one clear error, within bounds."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import re
import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .corpus import INPUTS, Case
from .differ import differences
from .guard import Guard

#: Memory that reading may take besides twice the file.
SPARE_BYTES = 10**9
#: Vectors of the largest operator that computing may hold.
_VECTORS = 40
#: CPU seconds of one command past which it is too slow (an honest sample takes one), and again per MB of file.
SLOW_SECONDS = 30.0
#: Address space over what the process starts with; keeps a runaway from taking the machine down.
_CEILING = 6 * 2**30


@dataclass
class Finding:
    """A broken promise."""

    kind: str
    command: str
    text: str
    place: str = ""
    trace: str = ""

    @property
    def signature(self) -> str:
        """What two findings of one defect have in common."""
        return f"{self.kind}: {self.place or re.sub(r'[0-9]+', 'N', self.text)[:100]}"


@dataclass
class Outcome:
    """What became of one mutant."""

    codes: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        findings = [{**asdict(found), "signature": found.signature} for found in self.findings]
        return {"codes": self.codes, "findings": findings, "seconds": self.seconds}


class Bench:
    """Runs the commands on one mutant after the other, in this process.

    Args:
        folder: Empty folder for inputs (``in``) and outputs (``out``).
    """

    def __init__(self, folder: Path) -> None:
        self._in, self._out = folder / "in", folder / "out"
        self._guard = Guard(self._out)
        tempfile.gettempdir()  # tries the folder by writing to it, once
        import spectool.api
        import spectool.cli  # noqa: F401 - loaded before anything is measured

        soft = _status("VmSize") + _CEILING
        resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def run(
        self, case: Case, compute: bool = True, more: str = "", shell: bool = False, form: str = "json"
    ) -> Outcome:
        """Run the commands on one input.

        Args:
            case: What to read.
            compute: Whether ``inspect`` computes; else it lists.
            more: ``clip -n``, ``clip -o`` (what is written is listed, too) or ``check``.
            shell: Whether to go through the command line's own parser.
            form: Format of what is printed.
        """
        for folder in (self._in, self._out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for name, data in case.files.items():
            (self._in / name).write_bytes(data)
        from spectool.cli.options import ClipMethodName

        path, out = self._in / case.target if case.target else self._in, self._out / "clipped"
        outcome = Outcome()
        began = time.process_time()
        shape = INPUTS.get(case.name)
        commands: list[tuple[str, dict[str, Any]]] = [("ls", {}), ("inspect", {"list_only": True})]
        if compute:
            commands.append(("inspect", {"top_k": 2, "max_matvecs": 24}))
        if more:
            kinds = {"kinds": ["linear"]} if case.size > 20_000 else {}
            options = {"limits": ["1.0"], "max_matvecs": 100, **kinds}
            if more.startswith("clip"):
                # The quickest method: the writer is under test here, not the solvers.
                options |= {"method": ClipMethodName.scale, "top_k": 1}
                options |= {"dry_run": True} if more == "clip -n" else {"output": str(out), "force": True}
            commands.append((more.split()[0], options))
        for command, options in commands:
            options["format"] = form
            if shape and command != "ls":
                options["inputs"] = ["x".join(map(str, shape))]
            code = self._one(command, path, options, case.size, shell, outcome)
            outcome.codes[command + ("-list" if "list_only" in options else "")] = code
            if command == "ls" and code != 0:
                break
        if more == "clip -o" and outcome.codes.get("clip") in (0, 4, 5):
            code = self._one("ls", out, {"format": form}, case.size, False, outcome)
            if code != 0:
                outcome.findings.append(
                    Finding("readback", "clip", f"what was written is refused with {code}")
                )
        if case.target and outcome.codes["ls"] == 0:
            # By now every command has taken notes of what happened; the ordinary loaders may do as they like.
            outcome.findings += [Finding("differs", "ls", text) for text in differences(path)]
        outcome.seconds = time.process_time() - began
        return outcome

    def _one(
        self, command: str, path: Path, options: dict[str, Any], size: int, shell: bool, outcome: Outcome
    ) -> int:
        gc.collect(0)
        before, began = _fresh_peak(), time.process_time()
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
        self._guard.start()
        found: Finding | None = None
        try:
            with _streams(out, err):
                code = _by_shell(command, path, options) if shell else _by_function(command, path, options)
        except BaseException as error:
            code = -1
            found = _exception(command, error)
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            self._guard.stop()
        texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)]  # type: ignore[attr-defined]
        for finding in (
            found,
            _streams_finding(command, code, *texts, options),
            _memory_finding(command, before, size + _declared(texts[0])),
            _time_finding(command, time.process_time() - began, size),
        ):
            if finding is not None:
                outcome.findings.append(finding)
        outcome.findings += [Finding("event", command, event) for event in self._guard.events]
        return code


def _by_function(command: str, path: Path, options: dict[str, Any]) -> int:
    """Call what the command line calls once it has parsed its arguments, which takes 15 ms."""
    from spectool.cli import check, clip, inspect, ls
    from spectool.errors import SpectoolError

    functions: dict[str, Callable[..., int]] = {
        "ls": ls.ls, "inspect": inspect.inspect, "clip": clip.clip, "check": check.check
    }  # fmt: skip
    if command != "ls":
        options = {**options, "no_progress": True}
    try:
        return functions[command](path, **options)
    except SpectoolError as error:
        if error.exit_code != 2:
            raise
        if not str(error).strip():
            raise AssertionError("an error without a message") from error
        return 2


def _by_shell(command: str, path: Path, options: dict[str, Any]) -> int:
    from spectool.cli import main

    flags = {
        "list_only": "--list", "top_k": "-k", "max_matvecs": "--max-matvecs", "dry_run": "-n", "output": "-o",
        "force": "--force", "limits": "--max", "inputs": "--input", "method": "--method", "kinds": "--kind",
        "format": "--format",
    }  # fmt: skip
    arguments = [command, str(path), "--debug"]
    for name, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            arguments += [flags[name]] if item is True else [flags[name], str(item)]
    return main(arguments)


@contextlib.contextmanager
def _streams(out: io.TextIOWrapper, err: io.TextIOWrapper) -> Iterator[None]:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()


_ALLOWED = {"ls": (0, 2), "inspect": (0, 2), "clip": (0, 2, 4, 5), "check": (0, 1, 2, 4, 5)}


def _streams_finding(command: str, code: int, out: str, err: str, options: dict[str, Any]) -> Finding | None:
    if code not in (-1, *_ALLOWED[command]):
        place = re.findall(r'File ".*?(spectool/[^"]+)", line (\d+)', err)
        last = next((line for line in err.splitlines() if line.startswith("error:")), err[-300:])
        where = f"{place[-1][0]}:{place[-1][1]} {last[:60]}" if place else ""
        return Finding("exit", command, f"code {code}: {last[:300]}", where, err[-6000:])
    if code == 2 and out.strip():
        return Finding("exit", command, f"refused, but wrote {out[:100]!r}")
    if code == 0 and options["format"].startswith("json"):
        try:
            for text in [out] if options["format"] == "json" else out.splitlines():
                json.loads(text, parse_constant=_no_constant)
        except ValueError as error:
            return Finding("output", command, f"no JSON: {error}")
    return None


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _exception(command: str, error: BaseException) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/spectool/" in frame.filename]
    place = f"{own[-1].filename.rpartition('/spectool/')[2]}:{own[-1].lineno}" if own else ""
    text = f"{type(error).__name__}: {error}"[:400]
    trace = "".join(traceback.format_exception(error))
    return Finding("exception", command, text, f"{place} {type(error).__name__}", trace[-6000:])


def _declared(out: str) -> int:
    """Return what vectors of the largest operator of a result take: sizes that a file declares, not ones it has."""
    try:
        rows = json.loads(out)["rows"]
    except (ValueError, KeyError, TypeError):
        return 0
    shapes = [row.get(name) or () for row in rows for name in ("input_shape", "output_shape")]
    return _VECTORS * 4 * max((math.prod(shape) for shape in shapes), default=0)


def _memory_finding(command: str, before: int, size: int) -> Finding | None:
    used = _status("VmHWM") - before
    if used > 2 * size + SPARE_BYTES:
        return Finding("memory", command, f"{used / 2**20:.0f} MiB for a file of {size / 2**20:.2f} MiB")
    return None


def _time_finding(command: str, seconds: float, size: int) -> Finding | None:
    limit = SLOW_SECONDS * (1 + size / 2**20)
    return Finding("slow", command, f"{seconds:.0f} s of CPU") if seconds > limit else None


def _status(field: str) -> int:
    """Return a size of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _fresh_peak() -> int:
    """Begin a new peak of resident memory; return what is resident now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")
