"""Where the file of a result goes: whole or not at all, unless it is a stream that was open before."""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from spectool.checkpoint.patch.place import hint_for, look_of, place_file
from spectool.checkpoint.patch.temporary import new_file, temporary_file
from spectool.errors import OutputError

_OPEN_FILES = ("/dev/fd", "/proc/self/fd")
_MOST_LINKS = 40


def check_target(path: str | Path) -> None:
    """Refuse a file that cannot be written, before anything is computed.

    Raises:
        OutputError: If the folder is missing or closed, or the path is a folder.
    """
    path = Path(path)
    with _explained(path):
        if descriptor_of(path) is not None:
            return
        place = Path(os.path.realpath(path))
        if place.is_symlink():
            raise OutputError(f"cannot write to {path}: it is a link to itself", hint="remove it first")
        if place.is_dir():
            raise OutputError(f"cannot write to {path}: it is a folder", hint="name a file in it")
        if not (place.parent.is_dir() or _is_special(path)):
            raise OutputError(
                f"cannot write {path}: there is no folder {place.parent}", hint="create it first"
            )
        closed = [needed for needed in _needed(path, place) if not os.access(needed, os.W_OK)]
    if closed:
        raise OutputError(
            f"cannot write {path}: no permission to write {closed[0]}", hint="choose another file"
        )


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, then an atomic rename.

    A link is followed. What is no regular file (a pipe, ``/dev/null``) and what is open already (``/dev/stdout``,
    ``/dev/fd/3``) is written as it stands; a reader of it that has gone away is no error.

    Raises:
        OutputError: If it cannot be written; what stood there before still does.
    """
    check_target(path)
    with _explained(path):
        number = descriptor_of(path)
        if number is not None:
            _pour(os.dup(number), data)
        elif _is_special(path):
            _pour(os.open(path, os.O_WRONLY), data)
        else:
            _replace(Path(os.path.realpath(path)), data)


def descriptor_of(path: Path) -> int | None:
    """Return the number of the open file that a path stands for (``/dev/stdout``: 1); None for all others."""
    for _ in range(_MOST_LINKS):
        if path.name.isdecimal() and os.path.realpath(path.parent) in map(os.path.realpath, _OPEN_FILES):
            return int(path.name)
        if not os.path.islink(path):  # noqa: PTH114 - a closed folder is for who writes there to explain
            return None
        path = path.parent / path.readlink()
    return None


def _replace(place: Path, data: bytes) -> None:
    mode, owner = look_of(place, 0o666)
    # A new file is created as any other is, so that the system takes off the umask: to ask for that would change it
    # for the moment, and for the files of other threads.
    with temporary_file(place, mode if owner is None else 0o600) as ready:
        if owner is None:
            mode = stat.S_IMODE(ready.stat().st_mode)
        with (
            new_file(ready, mode, owner=owner, made=True) as descriptor,
            os.fdopen(descriptor, "wb", closefd=False) as stream,
        ):
            stream.write(data)
        place_file(ready, place, force=True)


def _pour(descriptor: int, data: bytes) -> None:
    with suppress(BrokenPipeError), os.fdopen(descriptor, "wb", buffering=0) as stream:
        write_whole(stream, data)


def write_whole(stream: IO[bytes], data: bytes) -> None:
    """Write every byte to an open stream, with or without a buffer.

    A stream without one (``PYTHONUNBUFFERED``) may take a part, when a disk is nearly full for example, and says no
    more than how much. One that does not wait for its reader (a pipe made by a program that shares it) is waited for.

    Raises:
        OSError: If the system refuses.
    """
    view = memoryview(data)
    while True:
        try:
            count = stream.write(view) or 0  # of nothing, too: a full device refuses that
        except BlockingIOError as error:
            count = error.characters_written
        view = view[count:]
        if not view:
            break
        if not count:
            _wait_for(stream)
    while True:
        try:
            stream.flush()
            return
        except BlockingIOError:
            _wait_for(stream)


def _wait_for(stream: IO[bytes]) -> None:
    select.select([], [stream], [])


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}", hint=hint_for(error)) from error


def _needed(path: Path, place: Path) -> list[Path]:
    """Return what must be writable: the folder, and the file where there is one (a rename alone would not ask it)."""
    if _is_special(path):
        return [path]
    return [place.parent, place] if place.exists() else [place.parent]


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
