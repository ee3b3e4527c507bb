"""Bytes of one file, opened anew for every read, so that nothing stays open and nothing is loaded twice."""

from __future__ import annotations

import errno
import gzip
import io
import os
import stat
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from spectool.checkpoint.limits import Limits
from spectool.errors import CheckpointError, CorruptFile

#: Unpacked gzip up to this size stays in memory; more goes to a temporary file.
IN_MEMORY = 64 * 2**20


class Source:
    """Random access to the bytes of a file, or to a window of it.

    A file is opened per read and recognised by its size, time and inode, so a file that changed after its
    structure was read is noticed instead of giving other bytes.

    Args:
        path: A regular file.

    Raises:
        CheckpointError: If it does not exist, may not be read or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file or directory", hint="check the path") from None
        except OSError as error:
            raise unreadable(path, error) from error
        except ValueError as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file", hint="name a checkpoint file or a folder")
        self.path = path
        self.base = 0
        self.size = status.st_size
        self.mode = status.st_mode & 0o777
        self._stamp = _stamp(status)
        self._spool: BinaryIO | None = None
        self._lock = threading.Lock()

    def window(self, start: int, size: int) -> Source:
        """Return the part of ``size`` bytes from ``start`` as a source of its own; ``base`` says where it lies."""
        self._inside(start, size, "a part of it")
        part = Source.__new__(Source)
        part.__dict__.update(self.__dict__, base=self.base + start, size=size, parent=self)
        return part

    def read(self, start: int, size: int, what: str = "data") -> bytes:
        """Return exactly ``size`` bytes from ``start``.

        Raises:
            CorruptFile: If they are not all there, or if the file changed since it was opened.
        """
        buffer = bytearray(size)
        self.read_into(start, memoryview(buffer), what)
        return bytes(buffer)

    def read_into(self, start: int, buffer: memoryview, what: str = "data") -> None:
        """Fill ``buffer`` with the bytes from ``start``; errors as ``read``."""
        self._inside(start, len(buffer), what)
        with self._opened() as stream:
            try:
                stream.seek(self.base + start)
                done = 0
                while done < len(buffer):
                    # One call returns at most 2 GiB on Linux.
                    count = stream.readinto(buffer[done:])  # type: ignore[attr-defined]
                    if not count:
                        raise CorruptFile(
                            f"{self.path} ends in the middle of {what}",
                            hint="the file was cut short: copy it again",
                        )
                    done += count
            except OSError as error:
                raise unreadable(self.path, error, what) from error

    def head(self, size: int) -> bytes:
        """Return the first ``size`` bytes, or fewer where the file is shorter."""
        return self.read(0, min(size, self.size), "its first bytes")

    @property
    def gzipped(self) -> bool:
        """Whether the file is a gzip stream and the bytes here are what it unpacks to."""
        return self._spool is not None

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """Open the file itself (the packed bytes if ``gzipped``) and yield its descriptor.

        Raises:
            CorruptFile: If the file is another one than when its structure was read, before or after the use.
        """
        try:
            number = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise unreadable(self.path, error) from error
        try:
            self._check(number)
            yield number
            self._check(number)
        finally:
            os.close(number)
        self.check()

    def check(self) -> None:
        """Ask whether the file is still the one whose structure was read.

        Raises:
            CorruptFile: If it changed or vanished.
        """
        self._check(None)

    def _check(self, descriptor: int | None) -> None:
        try:
            status = self.path.stat() if descriptor is None else os.fstat(descriptor)
        except FileNotFoundError as error:
            raise CorruptFile(
                f"{self.path} vanished while it was read ({error.strerror})",
                hint="run again when nothing moves it",
            ) from error
        except OSError as error:
            raise unreadable(self.path, error) from error
        if _stamp(status) != self._stamp:
            raise CorruptFile(
                f"{self.path} changed after it was opened", hint="run again when nothing writes to it"
            )

    @contextmanager
    def stream(self, limits: Limits, bound: str) -> Iterator[BinaryIO]:
        """Open for reading by a parser that expects a file; one read may not exceed the limit ``bound``."""
        with io.BufferedReader(_Stream(self, limits, bound), 1 << 16) as reader:
            yield reader

    def _inside(self, start: int, size: int, what: str) -> None:
        if start < 0 or size < 0 or start + size > self.size:
            raise CorruptFile(
                f"{self.path} ends after {self.size} bytes; {what} needs bytes {start} to {start + size}",
                hint="the file was cut short or damaged: copy or download it again",
            )

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        if self._spool is not None:
            with self._lock:
                yield self._spool
            return
        try:
            stream = self.path.open("rb", buffering=0)
        except OSError as error:
            raise unreadable(self.path, error) from error
        with stream:
            self._check(stream.fileno())
            yield stream
            # Bytes that changed while they were read may be a mixture.
            self._check(stream.fileno())

    @classmethod
    def unpacked(cls, packed: Source, limits: Limits) -> Source:
        """Unpack a gzip file, to memory or to a temporary file that goes with the returned source.

        Raises:
            CorruptFile: If the gzip stream is damaged.
            LimitExceeded: If it unpacks to too much (``unpacked_bytes``, ``unpack_ratio``).
        """
        spool = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 - lives as long as the source
        size = 0
        try:
            with packed.stream(limits, "unpacked_bytes") as raw, gzip.GzipFile(fileobj=raw) as stream:
                while block := stream.read(1 << 20):
                    size += len(block)
                    limits.check("unpacked_bytes", size, f"{packed.path}: the gzip stream")
                    if size > IN_MEMORY:
                        ratio = size // max(packed.size, 1)
                        limits.check("unpack_ratio", ratio, f"{packed.path}: the gzip stream")
                    spool.write(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            spool.close()
            raise CorruptFile(
                f"{packed.path}: damaged gzip stream ({error})", hint="copy or download it again"
            ) from error
        except OSError as error:
            spool.close()
            raise CheckpointError(
                f"{packed.path}: cannot be unpacked to a temporary file ({error.strerror or error})",
                hint="make room in the folder for temporary files, or name another in TMPDIR",
            ) from error
        except BaseException:
            spool.close()
            raise
        source = cls.__new__(cls)
        source.__dict__.update(packed.__dict__, base=0, size=size)
        source._spool = spool  # type: ignore[assignment]
        weakref.finalize(source, spool.close)
        return source


class _Stream(io.RawIOBase):
    """A ``Source`` as a raw binary file."""

    def __init__(self, source: Source, limits: Limits, bound: str) -> None:
        super().__init__()
        self._source = source
        self._limits = limits
        self._bound = bound
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = min(len(buffer), max(self._source.size - self._at, 0))
        self._limits.check(self._bound, size, f"{self._source.path}: one part of it")
        if size:
            self._source.read_into(self._at, memoryview(buffer)[:size])
            self._at += size
        return size


def unreadable(path: Path, error: OSError, what: str = "") -> CheckpointError:
    """Return what is raised where the system refuses to read a file."""
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = "ask for permission to read it"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "too much is open: raise the limit (ulimit -n), or close other programs"
    elif error.errno == errno.ENOENT:
        hint = "check the path"
    else:
        hint = "try again, or copy the file to another disk"
    part = f" at {what}" if what else ""
    return CheckpointError(f"{path}: cannot be read{part} ({error.strerror or error})", hint=hint)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino
