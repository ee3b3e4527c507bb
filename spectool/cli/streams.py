"""The process's own stdin, stdout and stderr, in whatever state it was given them."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

from spectool.checkpoint.patch.place import hint_for
from spectool.errors import OutputError
from spectool.report.files import write_whole


def open_streams() -> None:
    """Open what the process was started without (``>&-``), and let no character end the program.

    Files that are opened later would get the free numbers, and with them what libraries write to stderr. A stdout
    that was closed refuses what is written to it, like one that is full; a closed stderr is where nobody listens.
    """
    for number, how in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, how)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show σ shows a question mark instead of ending the program.
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def check_stdout() -> None:
    """Refuse a stdout that takes nothing, before anything is computed.

    Raises:
        OutputError: If it is closed, or full.
    """
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        return  # not a file at all: someone catches what we say
    try:
        os.write(number, b"")
    except BrokenPipeError:
        return
    except OSError as error:
        raise _refused(error) from error


def emit(data: bytes) -> None:
    """Write data to stdout; a reader that has gone away (`| head`) is no error.

    Raises:
        OutputError: If it cannot be written, on a full disk for example.
    """
    try:
        if sys.stdout.isatty():
            # A bare CR would move the cursor over what stands there.
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\\r")
        sys.stdout.flush()
        write_whole(sys.stdout.buffer, data)
    except BrokenPipeError:
        drop_stdout()
    except OSError as error:
        drop_stdout()
        raise _refused(error) from error


def finish_stdout() -> None:
    """Write what text is still held back; errors as ``emit``."""
    emit(b"")


def drop_stdout() -> None:
    """Send to nowhere what is left for stdout: the interpreter flushes it once more when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _refused(error: OSError) -> OutputError:
    closed = error.errno == errno.EBADF
    why = "it is closed" if closed else error.strerror or str(error)
    hint = "redirect it, or write a file with -o" if closed else hint_for(error)
    return OutputError(f"cannot write to stdout: {why}", hint=hint)
