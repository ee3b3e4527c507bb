"""Mutants of zip archives: records changed with their sizes and sums put right, and headers that lie."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from .octets import TEXTS, number

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
#: Field → (position, width) in a local header, a directory entry, the end record.
_FIELDS = {
    "local": {
        "version": (4, 2), "flags": (6, 2), "method": (8, 2), "crc": (14, 4), "packed": (18, 4), "size": (22, 4),
        "name length": (26, 2), "extra length": (28, 2),
    },
    "entry": {
        "made by": (4, 2), "version": (6, 2), "flags": (8, 2), "method": (10, 2), "date": (14, 2), "crc": (16, 4),
        "packed": (20, 4), "size": (24, 4), "name length": (28, 2), "extra length": (30, 2), "comment": (32, 2),
        "disk": (34, 2), "attributes": (38, 4), "offset": (42, 4),
    },
    "end": {
        "disk": (4, 2), "here": (8, 2), "total": (10, 2), "directory size": (12, 4), "directory offset": (16, 4),
        "comment": (20, 2),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One record: unpacked contents, and what its headers say besides."""

    name: bytes
    data: bytes
    flags: int
    method: int
    local_extra: bytes
    extra: bytes


def members(data: bytes) -> list[Member]:
    """Return the records of an archive.

    Raises:
        ValueError: If it cannot be taken apart.
    """
    end = data.rfind(b"PK\5\6")
    if end < 0:
        raise ValueError("no end record")
    try:
        *_, count, _, at, _ = _END.unpack_from(data, end)
        found = []
        for _ in range(count):
            fields = _CENTRAL.unpack_from(data, at)
            flags, method, packed = fields[3], fields[4], fields[8]
            name_length, extra_length, comment, offset = fields[10], fields[11], fields[12], fields[16]
            name = data[at + 46 : at + 46 + name_length]
            extra = data[at + 46 + name_length : at + 46 + name_length + extra_length]
            local_name, local_extra = _LOCAL.unpack_from(data, offset)[-2:]
            start = offset + _LOCAL.size + local_name + local_extra
            body = data[start : start + packed]
            if method == 8:
                body = zlib.decompressobj(-15).decompress(body, 1 << 26)
            padding = data[start - local_extra : start]
            found.append(Member(name, body, flags, method, padding, extra))
            at += 46 + name_length + extra_length + comment
    except (struct.error, zlib.error, IndexError) as error:
        raise ValueError(str(error)) from error
    if not found:
        raise ValueError("no records")
    return found


def archive(parts: list[Member]) -> tuple[bytearray, dict[str, list[int]]]:
    """Return a sound archive and where its headers are."""
    out = bytearray()
    directory = bytearray()
    where: dict[str, list[int]] = {"local": [], "entry": [], "end": []}
    entries = []
    for part in parts:
        offset, crc = len(out), zlib.crc32(part.data)
        body = part.data
        if part.method == 8:
            packer = zlib.compressobj(9, zlib.DEFLATED, -15)
            body = packer.compress(part.data) + packer.flush()
        # No data descriptors: sizes stand in the header.
        sizes = (crc, len(body), len(part.data))
        flags = part.flags & ~8
        lengths = (len(part.name), len(part.local_extra))
        out += _LOCAL.pack(b"PK\3\4", 20, flags, part.method, 0, 0x21, *sizes, *lengths)
        out += part.name + part.local_extra + body
        where["local"].append(offset)
        entries.append(len(directory))
        lengths = (len(part.name), len(part.extra))
        directory += _CENTRAL.pack(
            b"PK\1\2", 20, 20, flags, part.method, 0, 0x21, *sizes, *lengths, 0, 0, 0, 0, offset
        )
        directory += part.name + part.extra
    start = len(out)
    where["entry"] = [start + entry for entry in entries]
    out += directory
    where["end"] = [len(out)]
    out += _END.pack(b"PK\5\6", 0, 0, len(parts) % 2**16, len(parts) % 2**16, len(directory), start, 0)
    return out, where


Inner = Callable[[str, bytes], tuple[bytes, str]]


def mutate_zip(data: bytes, rng: random.Random, inner: Inner) -> tuple[bytes, str]:
    """Return a changed archive and what was done.

    Args:
        data: An archive.
        rng: Source of chance.
        inner: Mutates the contents of one record, given its name.

    Raises:
        ValueError: If it cannot be taken apart.
    """
    parts = members(data)
    telling = [index for index, part in enumerate(parts) if not _is_data(part.name)]
    if telling and rng.random() < 0.85:
        at = rng.choices(telling, [1 + len(parts[index].data) ** 0.5 for index in telling])[0]
    else:
        at = rng.randrange(len(parts))
    part = parts[at]
    name = part.name.decode("latin1")
    match rng.choice(
        ("inner",) * 10 + ("field",) * 4 + ("name", "drop", "twice", "swap", "method", "around", "size")
    ):
        case "inner":
            body, what = inner(name, part.data)
            parts[at] = replace(part, data=body)
            what = f"{name}: {what}"
        case "field":
            out, where = archive(parts)
            return _lie(out, where, rng)
        case "name":
            names = [other.name for other in parts]
            new = rng.choice(
                (*names, *(text.encode("utf-8", "replace") for text in TEXTS), part.name + b"/", b"a/b")
            )
            parts[at] = replace(part, name=new[:60000])
            what = f"{name} is called {new[:40]!r}"
        case "drop":
            del parts[at]
            what = f"{name} is left out"
        case "twice":
            parts.insert(rng.randrange(len(parts) + 1), part)
            what = f"{name} is there twice"
        case "swap":
            other = rng.randrange(len(parts))
            parts[at], parts[other] = (
                replace(part, data=parts[other].data),
                replace(parts[other], data=part.data),
            )
            what = f"{name} and {parts[other].name.decode('latin1')} have each other's contents"
        case "method":
            parts[at] = replace(part, method=8)
            what = f"{name} is compressed"
        case "around":
            out, _ = archive(parts)
            filler = rng.randbytes(rng.choice((1, 8, 100)))
            made = rng.choice((filler + out, out + filler, out + out, out[:-22] + b"\0" * 60 + out[-22:]))
            return bytes(made), f"{len(made) - len(out)} bytes around the archive"
        case _:
            size = rng.choice((0, 1, len(part.data) - 1, len(part.data) + 1, 2 * len(part.data)))
            parts[at] = replace(part, data=part.data.ljust(max(size, 0), b"\0")[: max(size, 0)])
            what = f"{name} has {size} bytes"
    return bytes(archive(parts)[0]), what


def _lie(out: bytearray, where: dict[str, list[int]], rng: random.Random) -> tuple[bytes, str]:
    """Change one field of one header."""
    kind = rng.choice(("local", "entry", "entry", "end"))
    index = rng.randrange(len(where[kind])) if where[kind] else 0
    label = rng.choice(sorted(_FIELDS[kind]))
    offset, width = _FIELDS[kind][label]
    at = (where[kind][index] if where[kind] else 0) + offset
    old = int.from_bytes(out[at : at + width], "little")
    new = number(rng, old) % 2 ** (8 * width)
    out[at : at + width] = new.to_bytes(width, "little")
    return bytes(out), f"{kind} {index}: {label} {old} -> {new}"


def _is_data(name: bytes) -> bool:
    return b"/data/" in name or b"/constants/" in name
