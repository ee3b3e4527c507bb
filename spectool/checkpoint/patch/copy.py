"""Bytes from a source to an open file."""

from __future__ import annotations

import errno
import os
from typing import Any

from spectool.checkpoint.patch.content import Content
from spectool.checkpoint.patch.gzipped import header_of, packed
from spectool.checkpoint.source import Source, unreadable
from spectool.errors import CorruptFile

_BLOCK = 1 << 20
_MOST = 1 << 30


def write_content(content: Content, out: int) -> None:
    """Write a file with its changes, packed again if the original is a gzip stream.

    A plain file is copied by the system (shared blocks where the file system can) and changed afterwards.

    Raises:
        CorruptFile: If the original changed since it was opened, or changes meanwhile.
        OSError: If the system refuses.
    """
    source = content.source
    with source.descriptor() as original:
        if source.gzipped and content.splices:
            try:
                header = header_of(original)
            except (ValueError, IndexError) as error:
                raise CorruptFile(f"{source.path}: damaged gzip header ({error})") from error
            except OSError as error:
                raise unreadable(source.path, error, "its gzip header") from error
            for block in packed(header, content.blocks()):
                write_all(out, block)
        elif content.in_place:
            copy_all(source, original, out)
            for splice in content.splices:
                os.lseek(out, splice.start, os.SEEK_SET)
                write_all(out, splice.make())
        else:
            for part in content.blocks():
                write_all(out, part)


def copy_all(source: Source, original: int, out: int) -> None:
    """Copy a whole file.

    Raises:
        CorruptFile: If it ends early.
        OSError: If the system refuses.
    """
    size = os.fstat(original).st_size
    done = _copied_by_system(original, out, size)
    os.lseek(original, done, os.SEEK_SET)
    os.lseek(out, done, os.SEEK_SET)
    while done < size:
        try:
            block = os.read(original, min(_BLOCK, size - done))
        except OSError as error:
            raise unreadable(source.path, error, f"byte {done}") from error
        if not block:
            raise CorruptFile(
                f"{source.path} ends while it is copied", hint="run again when nothing writes to it"
            )
        write_all(out, block)
        done += len(block)


def _copied_by_system(original: int, out: int, size: int) -> int:
    done = 0
    function = getattr(os, "copy_file_range", None)
    while function is not None and done < size:
        try:
            count = function(original, out, min(_MOST, size - done), done, done)
        except OSError:
            # Not between these file systems, or a real fault: then the plain copy meets it again.
            break
        if count == 0:
            break
        done += count
    return done


def write_all(out: int, data: Any) -> None:
    """Write every byte of a buffer at the file's position."""
    view = memoryview(data)
    if not view.nbytes:
        return
    view = view.cast("B")
    while view:
        count = os.write(out, view[:_MOST])
        if count == 0:
            # No system should; going on might never end.
            raise OSError(errno.EIO, "nothing more is written")
        view = view[count:]
