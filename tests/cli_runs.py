"""Run the command line with a library that answers at once: in this process, in a pipe and on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

HERE = Path(__file__).parent
_CODE = """
import sys, types
from report_cases import small_report
api = types.ModuleType("spectool.api")
api.inspect = lambda *arguments, **options: small_report()
sys.modules["spectool.api"] = api
from spectool.cli import main
sys.exit(main())
"""


def environment(**more: str) -> dict[str, str]:
    """Return a clean environment that finds the package and the tests' helpers."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("SPECTOOL_", "COLUMNS"))
    }
    kept.pop("NO_COLOR", None)
    return {**kept, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "TERM": "xterm-256color", **more}


def run(*arguments: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[bytes]:
    """Run spectool with both streams in pipes."""
    command = [sys.executable, "-c", _CODE, *arguments]
    return subprocess.run(
        command, capture_output=True, env=environment(**more), cwd=cwd, timeout=60, check=False
    )


def run_shell(line: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a shell line in which ``spectool`` is the program."""
    define = f'spectool() {{ {sys.executable} -c "$CODE" "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", define + line],
        capture_output=True,
        env=environment(CODE=_CODE),
        cwd=cwd,
        timeout=60,
        check=False,
    )


def run_terminal(*arguments: str, width: int = 80, cwd: Path | None = None, **more: str) -> tuple[int, str]:
    """Run spectool with stdout on a terminal of this width; return exit code and what stands there."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    command = [sys.executable, "-c", _CODE, *arguments]
    process = subprocess.Popen(
        command, stdout=slave, stderr=subprocess.PIPE, env=environment(**more), cwd=cwd
    )
    os.close(slave)
    parts = []
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # EIO: the other side has closed
            break
        if not part:
            break
        parts.append(part)
    os.close(master)
    assert process.stderr is not None
    process.stderr.read()
    process.stderr.close()
    return process.wait(timeout=60), b"".join(parts).decode()
