"""Files that appear under their name whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from spectool.errors import OutputError

_NO_LINKS = {
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EACCES,
    errno.EXDEV,
    errno.EINVAL,
}
_EXCHANGE = 2
_AT_FDCWD = -100
_HINTS = {
    errno.ENOSPC: "make room, or write to another disk",
    errno.EDQUOT: "make room, or write to another disk",
    errno.EROFS: "write to another folder",
    errno.EACCES: "write to a folder you may write in",
    errno.EPERM: "write to a folder you may write in",
    errno.ENOENT: "create the folder first",
}


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn what the system says about writing into an ``OutputError`` that names the target."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "nothing was written; try again or write elsewhere")
        raise OutputError(f"{target} cannot be written ({error.strerror or error})", hint=hint) from error


def destination(out: Path, force: bool) -> Path:
    """Return where ``out`` really is: the file that a symbolic link points to, ``out`` itself otherwise.

    Raises:
        OutputError: If its folder is missing, if something is there and ``force`` is not given, or if that is
            neither a file nor a folder.
    """
    with explained(out):
        if os.path.lexists(out) and not force:
            raise OutputError(f"{out} exists already", hint="name another output, or give --force")
        target = Path(os.path.realpath(out)) if out.is_symlink() or out.name in ("", "..") else out
        if not target.parent.is_dir():
            missing = (
                f"{target.parent} is no folder" if target.parent.exists() else f"no folder {target.parent}"
            )
            raise OutputError(f"{out} cannot be written: there is {missing}", hint="create the folder first")
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise OutputError(f"{out} is neither a file nor a folder", hint="name another output")
        if not target.name:
            raise OutputError(f"{out} names no file", hint="name a file in a folder")
    return target


def temporary_name(target: Path) -> Path:
    """Return an unused-looking name beside a target: ``.NAME.spectool-XXXXXXXX.tmp``."""
    name = target.name
    while len(os.fsencode(name)) > 200:
        name = name[:-1]
    return target.with_name(f".{name}.spectool-{os.urandom(4).hex()}.tmp")


@contextmanager
def new_file(path: Path, mode: int) -> Iterator[int]:
    """Create a file that must not exist, yield its descriptor, then give it its mode and force it to the disk."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        yield descriptor
        path.chmod(mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """Yield an unused name beside ``target``; what stands there at the end is removed, whatever happened."""
    path = temporary_name(target)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Create a folder beside ``target``; what is left of it at the end is removed, whatever happened."""
    path = temporary_name(target)
    try:
        path.mkdir(0o700)
        yield path
    finally:
        remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove a folder if it is there, its read-only parts included."""
    if path.is_dir() and not path.is_symlink():
        for folder, _, _ in os.walk(path):
            with suppress(OSError):
                Path(folder).chmod(stat.S_IRWXU)
        shutil.rmtree(path, ignore_errors=True)


def place_file(ready: Path, target: Path, force: bool) -> None:
    """Give a finished file its name.

    Without ``force`` a name that was taken in the meantime stays as it is, however many writers try at once.

    Args:
        ready: The finished file, in the target's folder.
        target: Its name.
        force: Whether to replace what is there.

    Raises:
        OutputError: If the name is taken.
        OSError: If the system refuses.
    """
    if force:
        ready.replace(target)
    else:
        try:
            os.link(ready, target)
        except FileExistsError:
            raise _taken(target) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _claim(ready, target)
    sync_folder(target.parent)


def _claim(ready: Path, target: Path) -> None:
    """Take a name on a file system without hard links: reserve it with an empty file, then replace that."""
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise _taken(target) from None
    try:
        ready.replace(target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def place_each(files: Sequence[tuple[Path, Path, bool]]) -> None:
    """Give several finished files their names, in this order; if one fails, the new ones before it are removed.

    Args:
        files: (finished file, name, whether to replace what is there), the one that names the others last.

    Raises:
        OutputError, OSError: As ``place_file``.
    """
    placed: list[Path] = []
    try:
        for ready, target, force in files:
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = not os.path.lexists(target)
            place_file(ready, target, force)
            if fresh:
                placed.append(target)
    except BaseException:
        for target in placed:
            target.unlink(missing_ok=True)
        raise


def place_folder(ready: Path, target: Path, force: bool) -> None:
    """Give a finished folder its name; an existing one is exchanged for it in one step where the system can.

    Raises:
        OutputError: If the name is taken and ``force`` is not given.
        OSError: If the system refuses.
    """
    try:
        ready.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not force or not target.is_dir():
            raise _taken(target) from None
        if not _exchanged(ready, target):
            old = temporary_name(target)
            target.rename(old)
            try:
                ready.rename(target)
            except BaseException:
                old.rename(target)
                raise
            remove_tree(old)
    sync_folder(target.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    done: int = function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_EXCHANGE))
    return done == 0


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, where the file system knows how."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _taken(target: Path) -> OutputError:
    return OutputError(
        f"{target} was created by somebody else meanwhile", hint="name another output, or give --force"
    )
