"""Run attacks through the real command line and say what came of them: ``python tests/attacks/run_attacks.py [NAME]``.

Every attack runs in a process of its own (a fork of this one, in which torch is loaded already) under a limit on
memory: what the process holds, twice the file's size and 1 GB. An audit hook notes everything that a file could have
made Python do. With ``--json`` the result of each attack is one line for the tests; without, a table.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from attack import FOREIGN, TOKEN, Attack  # noqa: E402

GROUPS = (
    "calls",
    "pickles",
    "archives",
    "geometry",
    "readers",
    "headers",
    "models",
    "graphs",
    "external",
    "programs",
    "folders",
    "values",
)
#: Whether to leave out commands that do what another does.
FEW = "--json" in sys.argv and os.environ.get("SPECTOOL_ATTACKS") != "all"
#: Events that reading, measuring or writing a checkpoint has no business with.
FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile"),
    *("os.chown", "os.symlink", "os.kill", "os.killpg"),
    *("subprocess.Popen", "pty.spawn", "socket.", "urllib.Request", "ftplib.", "smtplib.", "http.client."),
    *("pickle.find_class", "code.__new__", "webbrowser.open"),
    *("shutil.", "builtins.input", "sys.addaudithook", "glob.glob"),
)
#: Events that name a file which they change.
CHANGES = ("os.link", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.utime")


class Audit:
    """Notes what should not happen while it is armed."""

    def __init__(self) -> None:
        self.armed = False
        self.allowed: tuple[str, ...] = ()
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        self.armed = False  # what this function itself does is of no interest
        try:
            if self.foreign(event, arguments):
                self.seen.append(f"{event} {arguments!r}"[:300])
        finally:
            self.armed = True

    def foreign(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "import":
            return FOREIGN in str(arguments[0])
        if event == "exec":
            return TOKEN in repr(getattr(arguments[0], "co_consts", ""))
        if event == "open" and not isinstance(arguments[0], int) and Path(os.fsdecode(arguments[0])).is_dir():
            return False  # a temporary file without a name
        if event == "ctypes.dlopen":
            return TOKEN in str(arguments[0])
        if event == "open":
            path, mode, flags = arguments
            writes = set(str(mode or "")) & set("wax+") or (flags or 0) & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            )
            return bool(writes) and not self.inside(path)
        if event in CHANGES:
            return not all(
                self.inside(path) for path in arguments if isinstance(path, str | bytes | os.PathLike)
            )
        return event.startswith(FORBIDDEN)

    def inside(self, path: Any) -> bool:
        if isinstance(path, int):  # a descriptor, which somebody has opened
            return True
        place = os.path.realpath(os.fsdecode(path))
        return place == "/dev/null" or place.startswith(self.allowed)


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    """Put pipes' stand-ins in the place of both streams."""
    raw = io.BytesIO(), io.BytesIO()
    old = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(stream, "utf-8", write_through=True) for stream in raw)
    try:
        yield raw
    finally:
        wrappers = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = old
        for wrapper in wrappers:
            wrapper.detach()  # or it would close what it wrote to


def commands(attack: Attack, path: Path, out: Path, *, few: bool = False) -> dict[str, list[str]]:
    """Return command → arguments; only the two that tell most where time counts."""
    more = list(attack.options)
    shaped = [*more, "--input", attack.shape] if attack.shape else more
    found = {
        "ls": ["ls", str(path), "--format", "json", *more],
        "inspect": ["inspect", str(path), "--format", "json", "-k", "1", *shaped],
        "clip": ["clip", str(path), "--max", "1.5", "-o", str(out / "clipped"), "--format", "json", *shaped],
    }
    if few and (attack.refused or attack.shape):
        del found["inspect" if attack.refused else "clip"]
    return found


def perform(attack: Attack, folder: Path, audit: Audit) -> dict[str, Any]:
    """Run every command on one attack in this process."""
    from spectool.cli import main

    home, out = folder / "home", folder / "out"
    home.mkdir()
    out.mkdir()
    os.chdir(folder)
    (folder / ".git").mkdir()  # the search for a configuration ends here
    path = attack.build(home)
    before = snapshot(home)
    size = sum(entry.stat().st_size for entry in home.rglob("*") if entry.is_file())
    limit = held("VmSize") + 2 * size + 10**9
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    audit.allowed = (str(out.resolve()),)
    result: dict[str, Any] = {"size": size, "commands": {}}
    start = time.process_time()
    for name, arguments in commands(attack, path, out, few=FEW).items():
        with captured() as (data, messages):
            audit.armed = True
            code = main(arguments)
            audit.armed = False
        # A result may be long; what is looked for stands in rows, and an error in one line.
        result["commands"][name] = [code, data.getvalue().decode(), messages.getvalue().decode()]
    result["seconds"] = time.process_time() - start
    result["seen"] = audit.seen
    result["changed"] = sorted(str(entry) for entry in before.items() ^ snapshot(home).items())[:5]
    result["written"] = sorted(entry.relative_to(out).as_posix() for entry in out.rglob("*"))
    result["ran"] = (home / TOKEN).exists() or FOREIGN in sys.modules
    return result


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything in a folder; the folder's own time tells of what came and went."""
    return {
        str(entry): (entry.lstat().st_size, entry.lstat().st_mtime_ns)
        for entry in [folder, *folder.rglob("*")]
    }


def held(what: str) -> int:
    """Bytes of memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{what}:")).split()[1]) * 1024


def forked(action: Callable[[], dict[str, Any]], seconds: int) -> dict[str, Any]:
    """Run something in a process of its own and return its result, its end and the memory it took."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        signal.alarm(5 * seconds)
        try:
            data = json.dumps(action())
        except BaseException as error:  # the parent is the one to raise
            data = json.dumps({"error": f"{type(error).__name__}: {error}"})
        with os.fdopen(writer, "w") as stream:
            stream.write(data)
            stream.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        data = stream.read()
    _, status, usage = os.wait4(child, 0)
    result: dict[str, Any] = json.loads(data) if data else {}
    return {**result, "status": os.waitstatus_to_exitcode(status), "peak": usage.ru_maxrss * 1024}


def everything() -> dict[str, Attack]:
    """All attacks by name."""
    attacks = [attack for group in GROUPS for attack in importlib.import_module(f"attack_{group}").ATTACKS]
    assert len({attack.name for attack in attacks}) == len(attacks)
    return {attack.name: attack for attack in attacks}


def results(names: list[str], *, exact: bool = False) -> Iterator[tuple[Attack, dict[str, Any]]]:
    """Run attacks: all, or those whose names begin as given (or are those, where they are ``exact``)."""
    audit = Audit()
    attacks = everything()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / f"{FOREIGN}.py").write_text("")
        sys.path.append(place)
        chosen = [
            attack
            for attack in attacks.values()
            if not names or (attack.name in names if exact else attack.name.startswith(tuple(names)))
        ]
        warm(Path(place), configured=any(attack.name.startswith("config") for attack in chosen))
        sys.addaudithook(audit)
        gc.freeze()  # or every child would copy all of this process's memory when it collects garbage
        for number, attack in enumerate(chosen):
            folder = Path(place) / str(number)
            folder.mkdir()
            yield (
                attack,
                forked(lambda attack=attack, folder=folder: perform(attack, folder, audit), attack.seconds),
            )


def warm(place: Path, *, configured: bool) -> None:
    """Import what commands import, once for all; transformers only for configurations, which it builds."""
    from attack_folders import BERT, folder_of
    from attack_models import linear

    from spectool.cli import main

    path = place / "warm.onnx"
    path.write_bytes(linear().SerializeToString())
    if configured:
        folder = folder_of({**BERT, "num_hidden_layers": 1})(place)
        with captured():
            main(["inspect", str(folder), "--list"])
    with captured():
        for arguments in (["inspect"], ["clip", "--max", "1.5", "-n"], ["ls"]):
            assert main([arguments[0], str(path), *arguments[1:]]) == 0
        for name in ("digits_cnn.pt2", "digits_cnn_torchscript.pt"):
            main(["inspect", str(HERE.parents[1] / "sample_models" / name), "--list", "--input", "1x1x16x16"])


def main_() -> None:
    names = [argument for argument in sys.argv[1:] if argument != "--json"]
    for attack, result in results(names, exact="--json" in sys.argv):
        if "--json" in sys.argv:
            sys.stdout.write(json.dumps({"name": attack.name, **result}) + "\n")
            sys.stdout.flush()
            continue
        codes = {name: found[0] for name, found in result.get("commands", {}).items()}
        print(
            f"{attack.name:44} {codes} {result.get('seconds', 0):5.1f} s {result['peak'] >> 20:5} MiB"
            f" {result.get('error', '')}{str(result.get('seen') or '')[:200]}"
        )
        for name, (code, _, messages) in result.get("commands", {}).items():
            if code not in (0, 4):
                print(f"    {name}: {messages.splitlines()[0][:200] if messages else ''}")
        if result["status"]:
            print(f"    ended by {result['status']}")


if __name__ == "__main__":
    main_()
