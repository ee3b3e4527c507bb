"""Files that appear under their name whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from spectool.checkpoint.patch.temporary import remove, temporary_name
from spectool.errors import OutputError

_NO_LINKS = {
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,  # another number than EOPNOTSUPP on macOS
    errno.ENOSYS,
    errno.EMLINK,
    errno.EACCES,
    errno.EXDEV,
    errno.EINVAL,
}
_NO_REPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100
_HINTS = {
    errno.ENOSPC: "make room, or write to another disk",
    errno.EDQUOT: "make room, or write to another disk",
    errno.EROFS: "write to another folder",
    errno.EACCES: "write to a folder you may write in",
    errno.EPERM: "write to a folder you may write in",
    errno.ENOENT: "create the folder first",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "write to another disk, or raise the limit (ulimit -f)",
    errno.EMFILE: "too much is open: raise the limit (ulimit -n)",
    errno.ENFILE: "too much is open: close other programs",
}


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn what the system says about writing into an ``OutputError`` that names the target."""
    try:
        yield
    except OSError as error:
        what = f"{target} cannot be written ({error.strerror or error})"
        raise OutputError(what, hint=hint_for(error)) from error


def hint_for(error: OSError) -> str:
    """Return what to do where the system refuses to write."""
    return _HINTS.get(error.errno or 0, "nothing was written; try again or write elsewhere")


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
            there = target.parent.exists()
            what = f"{target.parent} is no folder" if there else f"there is no folder {target.parent}"
            raise OutputError(f"{out} cannot be written: {what}", hint="create the folder first")
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise OutputError(f"{out} is neither a file nor a folder", hint="name another output")
        if not target.name:
            raise OutputError(f"{out} names no file", hint="name a file in a folder")
    return target


def refuse_mounted(folder: Path) -> None:
    """Refuse a folder as output that cannot be renamed: a disk is mounted there, as volumes are in containers.

    Raises:
        OutputError: If it is one.
    """
    if folder.is_dir() and os.path.ismount(folder):
        raise OutputError(
            f"{folder} cannot be replaced: a disk is mounted there",
            hint=f"name a new folder in it: {folder / 'out'}",
        )


def look_of(target: Path, mode: int) -> tuple[int, tuple[int, int] | None]:
    """Return the mode that a file under this name should have, and its owner and group if it replaces one.

    Args:
        target: Its name.
        mode: That of the original it is a copy of.
    """
    try:
        status = target.stat()
    except FileNotFoundError:
        return mode, None
    return status.st_mode & 0o777, (status.st_uid, status.st_gid)


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
            # A file server whose answer was lost is asked again, and finds what it made itself.
            if not _same_file(ready, target):
                raise _taken(target) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _place_without_links(ready, target)
    sync_folder(target.parent)


def _same_file(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.samefile(other)
    return False


def _place_without_links(ready: Path, target: Path) -> None:
    """Take a name on a file system without hard links.

    Where it cannot rename without replacing either, an empty file reserves the name until it is replaced: to be
    killed between these two steps leaves that.
    """
    refused = _renamed(ready, target, _NO_REPLACE)
    if refused == errno.EEXIST:
        raise _taken(target)
    if refused == 0:
        return
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise _taken(target) from None
    try:
        ready.replace(target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _Step:
    """One of several files on its way to its name."""

    ready: Path
    target: Path
    #: Second name of what is replaced; None where nothing was there.
    old: Path | None

    def undo(self) -> None:
        """Put back what was there before, as far as it can be."""
        with suppress(OSError):
            if self.old is None:
                if not os.path.lexists(self.ready) or self.ready.samefile(self.target):
                    self.target.unlink(missing_ok=True)
            elif os.path.lexists(self.old):
                self.old.replace(self.target)


def _forget(steps: Sequence[_Step]) -> None:
    for step in steps:
        if step.old is not None:
            remove(step.old)


def place_each(files: Sequence[tuple[Path, Path, bool]]) -> None:
    """Give several finished files their names, in this order.

    If one fails, or the run is interrupted, those before it are taken back: new names removed, old files restored
    (on file systems with hard links). To be killed in between leaves some with their names and some not; files that
    were replaced by then are still there as ``.NAME.spectool-XXXXXXXX.old``.

    Args:
        files: (finished file, name, whether to replace what is there), the one that names the others last.

    Raises:
        OutputError, OSError: As ``place_file``.
    """
    steps: list[_Step] = []
    folders: list[Path] = []
    try:
        try:
            for ready, target, force in files:
                folders += [folder for folder in target.parents if not os.path.lexists(folder)]
                target.parent.mkdir(parents=True, exist_ok=True)
                there = force and os.path.lexists(target)
                step = _Step(ready, target, temporary_name(target, "old") if there else None)
                steps.append(step)
                if step.old is not None and len(files) > 1:
                    with suppress(OSError):
                        os.link(target, step.old, follow_symlinks=False)
                place_file(ready, target, force)
        except BaseException:
            for step in reversed(steps):
                step.undo()
            for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
                with suppress(OSError):
                    folder.rmdir()
            raise
        finally:
            _forget(steps)
    finally:
        # Once more: the first time may have been interrupted.
        _forget(steps)


def place_folder(ready: Path, target: Path, force: bool) -> Path | None:
    """Give a finished folder its name; an existing one is exchanged for it in one step where the system can.

    Where it cannot, to be killed between two steps leaves the old folder as ``.NAME.spectool-XXXXXXXX.old``.

    Returns:
        Where the folder is that was replaced; None if there was none.

    Raises:
        OutputError: If the name is taken and ``force`` is not given.
        OSError: If the system refuses.
    """
    old = None
    try:
        ready.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not force or not target.is_dir():
            raise _taken(target) from None
        old = ready
        if not _exchanged(ready, target):
            # Not .tmp: later runs remove those, and until the next step this is the only copy.
            old = temporary_name(target, "old")
            try:
                target.rename(old)
                ready.rename(target)
            except BaseException:
                if old.exists() and not target.exists():
                    old.rename(target)
                raise
    sync_folder(target.parent)
    return old


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    return _renamed(one, other, _EXCHANGE) == 0


def _renamed(one: Path, other: Path, how: int) -> int:
    """Rename as only Linux can; return 0, or the number of the error."""
    if sys.platform != "linux":
        return errno.ENOSYS
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return errno.ENOSYS
    names = os.fsencode(one), os.fsencode(other)
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(how)) == 0:
        return 0
    return ctypes.get_errno() or errno.ENOSYS


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
