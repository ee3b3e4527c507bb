"""A child that stands still at every system call, by ptrace: the disk is then as a kill there leaves it."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_SYSGOOD, _EXITKILL = 1, 1 << 20
_SYSCALL_STOP = signal.SIGTRAP | 0x80


def _ptrace(request: int, process: int, data: int = 0) -> None:
    function = ctypes.CDLL(None, use_errno=True).ptrace
    function.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_long
    if function(request, process, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def child(action: Callable[[], object], traced: bool = False) -> int:
    """Run something in a child process that ends with 0, or with 1 and what went wrong on stderr."""
    with warnings.catch_warnings():
        # Newer Pythons warn if a library keeps threads; the child uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        number = os.fork()
    if number:
        return number
    code = 1
    try:
        if traced:
            _ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
        action()
        code = 0
    except BaseException as error:
        sys.__stderr__.write(f"child: {type(error).__name__}: {error}\n")  # type: ignore[union-attr]
        sys.__stderr__.flush()  # type: ignore[union-attr]
    finally:
        os._exit(code)


def ended(number: int) -> int:
    """Wait for a child; its exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def boundaries(action: Callable[[], object]) -> Iterator[int]:
    """Run something in a child and yield at every entry to and exit from a system call, while the child stands still.

    A caller that stops iterating kills the child there.
    """
    number = child(action, traced=True)
    alive = True
    try:
        _, status = os.waitpid(number, 0)
        assert os.WIFSTOPPED(status), "the child ended before it began"
        _ptrace(_SETOPTIONS, number, _SYSGOOD | _EXITKILL)
        pending, count = 0, 0
        while True:
            _ptrace(_SYSCALL, number, pending)
            _, status = os.waitpid(number, 0)
            if not os.WIFSTOPPED(status):
                alive = False
                assert os.waitstatus_to_exitcode(status) == 0
                return
            pending = 0
            if os.WSTOPSIG(status) == _SYSCALL_STOP:
                yield count
                count += 1
            elif os.WSTOPSIG(status) != signal.SIGTRAP:
                pending = os.WSTOPSIG(status)
    finally:
        if alive:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)


def traceable() -> str:
    """Return why no process can be traced here; empty if one can."""
    if sys.platform != "linux":
        return "ptrace as Linux has it"
    try:
        return "" if sum(1 for _ in boundaries(lambda: os.getppid())) > 1 else "ptrace sees nothing"
    except (OSError, AttributeError, AssertionError) as error:
        number = getattr(error, "errno", None)
        return f"ptrace is not allowed here ({errno.errorcode.get(number or 0, error)})"


def tree(folder: Path) -> dict[str, bytes]:
    """Relative name → bytes of every file below a folder."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.is_symlink()
    }
