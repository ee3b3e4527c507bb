"""Checksums of zip records whose bytes changed, wherever they stand."""

from __future__ import annotations

import struct
import zipfile
import zlib
from bisect import bisect_right

from spectool.checkpoint.limits import Limits
from spectool.checkpoint.patch.content import Content, Splice, fixed
from spectool.checkpoint.source import Source
from spectool.errors import CorruptFile

_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_DESCRIPTOR = 1 << 3
_LOCAL_CRC, _ENTRY_CRC = 14, 16


def is_zip(source: Source) -> bool:
    """Tell whether a file begins like a zip archive."""
    return source.head(4) == b"PK\3\4"


def with_checksums(content: Content, limits: Limits) -> Content:
    """Return a zip archive's content with the checksums of its changed records put right.

    A checksum stands in the central directory and in the record's header, or behind its bytes where the header
    says so. Records that are archives themselves (early .pt2 files) are put right from the inside out.

    Args:
        content: A zip archive with changes inside stored records.
        limits: Bounds on the directory.

    Raises:
        CorruptFile: If the directory or a header is not what the other says.
    """
    splices: list[Splice] = []
    for record, inner in _changed_records(content, limits):
        if content.source.read(record.start, min(4, record.stop - record.start)) == b"PK\3\4":
            window = content.source.window(record.start, record.stop - record.start)
            nested = with_checksums(Content(window, [s.shifted(-record.start) for s in inner]), limits)
            inner = [s.shifted(record.start) for s in nested.splices]
        checksum = 0
        for block in Content(content.source, inner).blocks(record.start, record.stop):
            checksum = zlib.crc32(block, checksum)
        splices += inner
        splices += [fixed(at, at + 4, struct.pack("<L", checksum)) for at in record.checksums]
    return Content(content.source, splices)


class _Record:
    """Where one changed record and the copies of its checksum lie."""

    def __init__(self, source: Source, info: zipfile.ZipInfo, entry: int) -> None:
        what = f"{source.path}: zip record {info.filename!r}"
        header = source.read(info.header_offset, _LOCAL.size, "a zip header")
        _, _, flags, _, _, _, crc, _, _, name, extra = _LOCAL.unpack(header)
        self.start = info.header_offset + _LOCAL.size + name + extra
        self.stop = self.start + info.compress_size
        self.checksums = [entry + _ENTRY_CRC]
        if not flags & _DESCRIPTOR:
            self.checksums.append(info.header_offset + _LOCAL_CRC)
            return
        if crc:
            # Some writers fill in both.
            self.checksums.append(info.header_offset + _LOCAL_CRC)
        behind = source.read(self.stop, 8, "a zip data descriptor")
        at = self.stop + (4 if behind[:4] == b"PK\7\x08" else 0)
        if int.from_bytes(source.read(at, 4), "little") != info.CRC:
            raise CorruptFile(f"{what} has no checksum behind its bytes", hint="copy or save the file again")
        self.checksums.append(at)


def _changed_records(content: Content, limits: Limits) -> list[tuple[_Record, list[Splice]]]:
    source = content.source
    try:
        with source.stream(limits, "directory_bytes") as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
            first: int = archive.start_dir
    except zipfile.BadZipFile as error:
        raise CorruptFile(f"{source.path}: {error}", hint="copy it again") from error
    directory = source.read(first, source.size - first, "the zip directory")
    entries, at = [], 0
    for info in infos:
        fields = _ENTRY.unpack_from(directory, at)
        if fields[0] != b"PK\1\2" or fields[7] != info.CRC:
            raise CorruptFile(f"{source.path}: the zip directory is damaged", hint="copy it again")
        entries.append((info.header_offset, first + at, info))
        at += _ENTRY.size + fields[10] + fields[11] + fields[12]
    entries.sort(key=lambda entry: entry[0])
    starts = [offset for offset, _, _ in entries]
    touched: dict[int, list[Splice]] = {}
    for splice in content.splices:
        touched.setdefault(bisect_right(starts, splice.start) - 1, []).append(splice)
    found = []
    for index, inside in touched.items():
        _, entry, info = entries[index]
        record = _Record(source, info, entry)
        if index < 0 or not all(record.start <= s.start and s.stop <= record.stop for s in inside):
            raise CorruptFile(f"{source.path}: a tensor leaves its zip record {info.filename!r}")
        found.append((record, inside))
    return found
