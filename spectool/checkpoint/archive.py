"""The zip archives that torch writes: where each record's bytes lie, checked against the file."""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath

from spectool.checkpoint.limits import Limits
from spectool.checkpoint.source import Source
from spectool.errors import CorruptFile

_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1
_UTF8 = 1 << 11


@dataclass(frozen=True)
class Record:
    """One member of the archive.

    Attributes:
        name: Full name inside the archive, e.g. ``archive/data/0``.
        start: Position of its bytes in the archive's source.
        size: Bytes once unpacked.
        packed: Bytes in the file.
        stored: Whether the bytes are stored as they are (torch always stores tensors so).
    """

    name: str
    start: int
    size: int
    packed: int
    stored: bool


class Archive:
    """The records of one zip archive, by their names below the folder that all of them share.

    Args:
        source: Bytes that begin with a zip member.
        limits: Bounds on the directory.

    Raises:
        CorruptFile: If the directory is damaged, or if records overlap, repeat a name, are encrypted or have
            names that leave the archive.
        LimitExceeded: If there are too many records.
    """

    def __init__(self, source: Source, limits: Limits) -> None:
        self.source = source
        self._limits = limits
        infos = self._directory()
        tops = {PurePosixPath(info.filename).parts[0] for info in infos}
        nested = len(tops) == 1 and all("/" in info.filename for info in infos)
        self.top = next(iter(tops)) if nested else ""
        self.records: dict[str, Record] = {}
        prefix = len(self.top) + 1 if nested else 0
        end = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            record = self._locate(info)
            if info.header_offset < end:
                raise CorruptFile(f"{source.path}: zip record {info.filename!r} overlaps the one before it")
            end = record.start + record.packed
            short = info.filename[prefix:]
            if short in self.records:
                raise CorruptFile(f"{source.path}: the zip archive has {info.filename!r} twice")
            self.records[short] = record

    def _directory(self) -> list[zipfile.ZipInfo]:
        path = self.source.path
        try:
            with (
                self.source.stream(self._limits, "directory_bytes") as stream,
                zipfile.ZipFile(stream) as archive,
            ):
                infos = archive.infolist()
        # zipfile raises whatever the damaged field provokes.
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            ValueError,
            struct.error,
            EOFError,
            OverflowError,
        ) as error:
            raise CorruptFile(
                f"{path}: the zip archive is damaged or cut short ({error})", hint="copy or download it again"
            ) from error
        self._limits.check("records", len(infos), f"{path}: the zip archive")
        for info in infos:
            parts = PurePosixPath(info.filename).parts
            if (
                not parts
                or parts[0] == "/"
                or ".." in parts
                or "\\" in info.filename
                or "\0" in info.orig_filename
            ):
                raise CorruptFile(f"{path}: zip record with the unsafe name {info.filename!r}")
        return [info for info in infos if not info.is_dir()]

    def _locate(self, info: zipfile.ZipInfo) -> Record:
        what = f"zip record {info.filename!r}"
        path = self.source.path
        if info.flag_bits & _ENCRYPTED:
            raise CorruptFile(
                f"{path}: {what} is encrypted", hint="unpack it with its password and save it again"
            )
        # The encoding zipfile decoded the name with: bit 11 says UTF-8, else it is cp437.
        name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        header = self.source.read(info.header_offset, _LOCAL.size + len(name), what)
        signature, *_, name_length, extra_length = _LOCAL.unpack_from(header)
        if signature != b"PK\3\4" or name_length != len(name) or header[_LOCAL.size :] != name:
            raise CorruptFile(f"{path}: {what} is not where the zip directory says", hint="copy it again")
        start = info.header_offset + _LOCAL.size + name_length + extra_length
        stored = info.compress_type == zipfile.ZIP_STORED
        if stored and info.compress_size != info.file_size:
            raise CorruptFile(f"{path}: {what} is stored with two different sizes")
        if start + info.compress_size > self.source.size:
            raise CorruptFile(
                f"{path} ends after {self.source.size} bytes; {what} needs {start + info.compress_size}",
                hint="the file was cut short: copy or download it again",
            )
        return Record(info.filename, start, info.file_size, info.compress_size, stored)

    def __contains__(self, name: str) -> bool:
        return name in self.records

    def read(self, name: str, bound: str) -> bytes:
        """Return one whole record, unpacked.

        Args:
            name: Name below the common folder.
            bound: Which limit its size must keep, e.g. ``pickle_bytes``.

        Raises:
            CorruptFile: If there is no such record or it does not unpack to the size it claims.
            LimitExceeded: If it is too long.
        """
        path = self.source.path
        record = self.records.get(name)
        if record is None:
            raise CorruptFile(f"{path}: the zip archive has no record {name!r}", hint="copy or save it again")
        what = f"zip record {record.name!r}"
        self._limits.check(bound, record.size, f"{path}: {what}")
        self._limits.check(bound, record.packed, f"{path}: {what}")
        data = self.source.read(record.start, record.packed, what)
        if not record.stored:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = inflate.decompress(data, record.size + 1)
            except zlib.error as error:
                raise CorruptFile(f"{path}: {what} does not unpack ({error})") from error
        if len(data) != record.size:
            raise CorruptFile(f"{path}: {what} does not unpack to the {record.size} bytes it claims")
        return data
