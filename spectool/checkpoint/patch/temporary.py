"""Temporary files and folders beside what they become, locked while somebody writes them."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

#: Bytes of a target's name that its temporary name repeats; 255 is what file systems allow in all.
_LONGEST = 200
_ATTEMPTS = 20
_CLOSE = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | _CLOSE
_OLD = os.O_RDWR | getattr(os, "O_BINARY", 0) | _CLOSE


def temporary_name(target: Path, suffix: str = "tmp") -> Path:
    """Return an unused-looking name beside a target: ``.NAME.spectool-XXXXXXXX.tmp``."""
    return target.with_name(f".{_short(target.name)}.spectool-{os.urandom(4).hex()}.{suffix}")


@contextmanager
def temporary_file(target: Path, mode: int = 0o600) -> Iterator[Path]:
    """Create an empty file beside ``target``, its own; what stands there at the end is removed, whatever happened.

    What killed runs with the same target left behind is removed first.

    Args:
        target: What it will become.
        mode: Its permissions, less what the umask takes.
    """
    with _temporary(target, lambda path: os.open(path, _NEW, mode)) as path:
        yield path


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Create a folder beside ``target``; as ``temporary_file``."""

    def make(path: Path) -> int:
        path.mkdir(0o700)
        return -1 if sys.platform == "win32" else os.open(path, os.O_RDONLY | _CLOSE)

    with _temporary(target, make) as path:
        yield path


@contextmanager
def new_file(
    path: Path, mode: int, *, owner: tuple[int, int] | None = None, made: bool = False
) -> Iterator[int]:
    """Open a file for writing, yield its descriptor, then give it its mode and force it to the disk.

    Args:
        path: The file.
        mode: Its permissions, whatever the umask.
        owner: User and group it should have, as far as this process may say so. Rights of a group that it could not
            be given to become those of everybody else.
        made: Whether it is there already, from ``temporary_file``; else it must not exist.
    """
    descriptor = os.open(path, _OLD if made else _NEW, 0o600)
    try:
        yield descriptor
        _dress(path, descriptor, mode, owner)
        with _unless_unknown():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dress_folder(path: Path, mode: int, owner: tuple[int, int] | None) -> None:
    """Give a folder its mode, and its owner as ``new_file`` does.

    Raises:
        OSError: If the system refuses.
    """
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY | _CLOSE)
    try:
        _dress(path, descriptor, mode, owner)
    finally:
        os.close(descriptor)


def _dress(path: Path, descriptor: int, mode: int, owner: tuple[int, int] | None) -> None:
    # Where the disk has no permissions (FAT, many network and user-space file systems) its own stay: this is no
    # reason to write nothing, and what was created for its owner alone has not been opened to anybody.
    with _unless_unknown(errno.EPERM):
        path.chmod(_owned(descriptor, mode, owner))


@contextmanager
def _unless_unknown(*more: int) -> Iterator[None]:
    """Go on where a file system has no such operation at all; what fails otherwise is raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, *more):
            raise


def remove(path: Path) -> None:
    """Remove a file or a folder, its read-only parts included, if it is there; what cannot be removed stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        # A folder, unless the system refuses: it says so with one of several numbers.
        with suppress(OSError):
            if not path.is_symlink():
                # Takes no file handle, which may be what there is none of.
                with suppress(OSError):
                    path.rmdir()
                for folder, _, _ in os.walk(path):
                    with suppress(OSError):
                        Path(folder).chmod(stat.S_IRWXU)
                shutil.rmtree(path, ignore_errors=True)


def discard_leftovers(target: Path) -> None:
    """Remove temporary files and folders of this target that no process holds: those of killed runs.

    Where the system or the file system knows no locks, nothing is removed.
    """
    pattern = re.compile(rf"\.{re.escape(_short(target.name))}\.spectool-[0-9a-f]{{8}}\.tmp")
    with suppress(OSError), os.scandir(target.parent) as entries:
        found = [entry.name for entry in entries if pattern.fullmatch(entry.name)]
        for name in found:
            _discard(target.with_name(name))


def _discard(path: Path) -> None:
    with suppress(OSError):
        # A pipe under such a name must not stop us.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _CLOSE)
        try:
            kind = os.fstat(descriptor).st_mode
            if (stat.S_ISREG(kind) or stat.S_ISDIR(kind)) and _lock(descriptor) == 0:
                remove(path)
        finally:
            os.close(descriptor)


@contextmanager
def _temporary(target: Path, make: Callable[[Path], int]) -> Iterator[Path]:
    discard_leftovers(target)
    path, lock = temporary_name(target), -1
    try:
        try:
            for attempt in range(_ATTEMPTS):
                # A run that cleans up may come between the steps, and take what it finds for a leftover.
                with _again_if_gone(attempt):
                    lock = make(path)
                    if _held(lock, path):
                        break
                    # Whoever holds it takes it for a leftover; where nothing can be locked, nobody else removes it.
                    remove(path)
                    os.close(lock)
                path, lock = temporary_name(target), -1
            else:
                raise OSError(errno.ENOLCK, "the file system locks nothing, and says that somebody else does")
            if sys.platform == "win32" and lock >= 0:
                # An open file cannot be renamed there.
                os.close(lock)
                lock = -1
            yield path
        finally:
            remove(path)
    finally:
        # Once more: the first time may have been interrupted.
        remove(path)
        if lock >= 0:
            with suppress(OSError):  # nothing was written through it
                os.close(lock)


@contextmanager
def _again_if_gone(attempt: int) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        if attempt == _ATTEMPTS - 1:
            raise


def _held(descriptor: int, path: Path) -> bool:
    """Lock what was just created; False if somebody removes it, as nobody's, at this moment."""
    if descriptor < 0:
        return True
    refused = _lock(descriptor)
    return os.path.lexists(path) if refused == 0 else refused not in (errno.EWOULDBLOCK, errno.EACCES)


def _lock(descriptor: int) -> int:
    """Lock an open file until it is closed; return 0, or the number of the error."""
    if sys.platform == "win32":
        return errno.ENOTSUP
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno or errno.ENOTSUP
    return 0


def _owned(descriptor: int, mode: int, owner: tuple[int, int] | None) -> int:
    """Give a file to somebody, and return the mode it may have then."""
    if owner is None or sys.platform == "win32":
        return mode
    for user, group in (owner, (-1, owner[1])):
        status = os.fstat(descriptor)
        if (status.st_uid if user == -1 else user, group) == (status.st_uid, status.st_gid):
            return mode
        with suppress(OSError):
            os.fchown(descriptor, user, group)
            return mode
    return mode & ~stat.S_IRWXG | mode & (mode & stat.S_IRWXO) << 3


def _short(name: str) -> str:
    while len(os.fsencode(name)) > _LONGEST:
        name = name[:-1]
    return name
