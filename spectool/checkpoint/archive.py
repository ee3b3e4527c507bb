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
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
#: A comment behind the directory can be no longer than this.
_LONGEST_TAIL = _END.size + (1 << 16)
_ENCRYPTED = 1
_UTF8 = 1 << 11
_FOLDER = 0x10  # of the attributes that MS-DOS gave files


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
        CorruptFile: If the directory is damaged, or if records overlap, repeat a name, are encrypted, call themselves
            folders or have names that leave the archive.
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
        folded: set[str] = set()
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
            if short.lower() in folded:
                # torch finds records without regard to case, and so might take the other one.
                raise CorruptFile(
                    f"{source.path}: {info.filename!r} differs from another zip record only in case"
                )
            folded.add(short.lower())
            self.records[short] = record

    def _directory(self) -> list[zipfile.ZipInfo]:
        path = self.source.path
        try:
            with (
                self.source.stream(self._limits, "directory_bytes") as stream,
                zipfile.ZipFile(stream) as archive,
            ):
                infos = archive.infolist()
                self._check_end(archive.start_dir)
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
        if infos and all(info.header_offset for info in infos):
            raise CorruptFile(
                f"{path}: the zip archive does not begin with one of its records",
                hint="another reader may take it for a file of another format: save it again with torch.save",
            )
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

    def _check_end(self, first: int) -> None:
        """Refuse an archive that another reader could take for another one.

        ``zipfile`` looks for the directory in front of the last end record and shifts every position when it is not
        where that record says; torch's reader goes by the record alone. A file could show each of them its own weights.

        Args:
            first: Where ``zipfile`` found the directory.
        """
        source = self.source
        # Records in front of the directory may be archives themselves, with ends of their own.
        size = min(source.size - max(first, 0), _LONGEST_TAIL)
        tail = source.read(source.size - size, size, "the end of the zip archive")
        at = tail.rfind(b"PK\5\6")
        fields = _END.unpack_from(tail, at)
        start, length, end = fields[6], fields[5], source.size - size + at
        fault = ""
        if tail.count(b"PK\5\6") > 1:
            fault = "has two ends"
        elif end + _END.size + fields[7] != source.size:
            fault = "has bytes behind its end"
        if not fault and (start == 0xFFFFFFFF or tail[max(at - _LOCATOR.size, 0) :][:4] == b"PK\6\7"):
            end -= _LOCATOR.size
            _, _, where, _ = _LOCATOR.unpack(source.read(end, _LOCATOR.size, "the zip64 locator"))
            wide = _END64.unpack(source.read(where, _END64.size, "the zip64 end record"))
            if wide[0] != b"PK\6\6" or where + 12 + wide[1] != end:
                fault = "has a zip64 end record that is not where it should be"
            start, length, end = wide[9], wide[8], where
        if fault or start != first or start + length != end:
            raise CorruptFile(
                f"{source.path}: the zip archive {fault or 'has its directory elsewhere than it says'}",
                hint="what one reader takes for its contents another may not: save it again with torch.save",
            )

    def _locate(self, info: zipfile.ZipInfo) -> Record:
        what = f"zip record {info.filename!r}"
        path = self.source.path
        if info.flag_bits & _ENCRYPTED:
            raise CorruptFile(
                f"{path}: {what} is encrypted", hint="unpack it with its password and save it again"
            )
        if info.file_size and (info.external_attr & _FOLDER or info.filename.endswith("/")):
            raise CorruptFile(
                f"{path}: {what} is marked as a folder and holds {info.file_size} bytes",
                hint="torch reads nothing of it, and leaves a tensor to chance: save it again with torch.save",
            )
        # The encoding zipfile decoded the name with: bit 11 says UTF-8, else it is cp437.
        name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        header = self.source.read(info.header_offset, _LOCAL.size + len(name), what)
        signature, _, _, method, *_, name_length, extra_length = _LOCAL.unpack_from(header)
        if signature != b"PK\3\4" or name_length != len(name) or header[_LOCAL.size :] != name:
            raise CorruptFile(f"{path}: {what} is not where the zip directory says", hint="copy it again")
        if method != info.compress_type:
            # Such a header can be the beginning of a file of another format.
            raise CorruptFile(f"{path}: {what} has another compression than the zip directory says")
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
