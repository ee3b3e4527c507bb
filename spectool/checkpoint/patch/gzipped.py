"""A gzip stream with other contents: the header of the old one, one member, the same bytes every time."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator

_EXTRA, _NAME, _COMMENT, _CHECKSUM = 4, 8, 16, 2
#: What a header's ninth byte says about how hard the data was packed.
_LEVELS = {2: 9, 4: 1}
_MOST_HEADER = 1 << 17


def header_of(descriptor: int) -> bytes:
    """Return the header of a gzip file (time, file name and comment), as its bytes.

    Raises:
        ValueError: If it does not end within its first 128 KiB.
    """
    os.lseek(descriptor, 0, os.SEEK_SET)
    head = b""
    # A system may give less than it is asked for.
    while len(head) < _MOST_HEADER and (more := os.read(descriptor, _MOST_HEADER - len(head))):
        head += more
    flags, at = head[3], 10
    if flags & _EXTRA:
        at += 2 + int.from_bytes(head[at : at + 2], "little")
    for flag in (_NAME, _COMMENT):
        if flags & flag:
            at = head.index(b"\0", at) + 1
    if flags & _CHECKSUM:
        at += 2
    if at > len(head):
        raise ValueError("a gzip header without an end")
    return head[:at]


def packed(header: bytes, blocks: Iterable[memoryview]) -> Iterator[bytes]:
    """Yield a gzip file.

    Args:
        header: Taken over as it is.
        blocks: What is packed.
    """
    yield header
    deflate = zlib.compressobj(_LEVELS.get(header[8], 6), zlib.DEFLATED, -zlib.MAX_WBITS)
    checksum = size = 0
    for block in blocks:
        checksum = zlib.crc32(block, checksum)
        size += len(block)
        yield deflate.compress(block)
    yield deflate.flush()
    yield struct.pack("<LL", checksum, size & 0xFFFFFFFF)
