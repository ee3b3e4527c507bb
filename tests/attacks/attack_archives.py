"""Zip archives and gzip streams: bombs, records that overlap or deceive, and archives that two readers take for two."""

from __future__ import annotations

import gzip
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from attack import WEIGHT, Attack, checkpoint, state, text, zip_bytes

HONEST: Mapping[str, bytes] = {"net/data.pkl": state(), "net/data/0": WEIGHT.tobytes(), "net/version": b"3\n"}
Change = Callable[[bytes], bytes]


def built(data: Callable[[], bytes], name: str = "net.pt") -> Callable[[Path], Path]:
    """Write bytes that are made only when they are wanted."""

    def build(folder: Path) -> Path:
        (folder / name).write_bytes(data())
        return folder / name

    return build


def changed(change: Change, records: Mapping[str, bytes] = HONEST) -> Callable[[Path], Path]:
    """An honest archive with one thing changed."""
    return built(lambda: change(zip_bytes(records)))


def entry(data: bytes, name: bytes) -> int:
    """Position of a record's entry in the directory."""
    at = data.find(b"PK\1\2")
    while data[at + 46 : at + 46 + len(name)] != name:
        at = data.index(b"PK\1\2", at + 1)
    return at


def field(name: bytes, place: int, value: bytes) -> Change:
    """Put a value into a field of a record's entry in the directory."""

    def change(data: bytes) -> bytes:
        at = entry(data, name) + place
        return data[:at] + value + data[at + len(value) :]

    return change


def renamed(old: bytes, new: bytes) -> Change:
    """Give a record another name of the same length, in its header and in the directory."""
    return lambda data: data.replace(old, new)


def with_record(name: str, content: bytes = b"") -> Callable[[Path], Path]:
    return built(lambda: zip_bytes({**HONEST, name: content}))


def repeated(folder: Path) -> Path:
    """Two records of one name: which of them is the weight?"""
    checkpoint(folder / "net.pt")
    data = (folder / "net.pt").read_bytes()
    twice = zip_bytes({**HONEST, "net/data/1": (9 * WEIGHT).tobytes()}).replace(b"net/data/1", b"net/data/0")
    (folder / "net.pt").write_bytes(twice or data)
    return folder / "net.pt"


def compressed(what: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "net.pt", "w") as archive:
            for name, content in HONEST.items():
                method = zipfile.ZIP_DEFLATED if name.endswith(what) else zipfile.ZIP_STORED
                archive.writestr(name, content, method)
        return folder / "net.pt"

    return build


def bomb(size: int, claimed: int | None = None) -> Callable[[Path], Path]:
    """A pickle record that unpacks to much more than it takes in the file, or than it says."""

    def build(folder: Path) -> Path:
        pickled = b"\x80\x02" + b"N0" * (size // 2) + b"}."
        with zipfile.ZipFile(folder / "net.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("net/data.pkl", pickled)
            archive.writestr("net/data/0", WEIGHT.tobytes(), zipfile.ZIP_STORED)
        if claimed is not None:
            path = folder / "net.pt"
            data = path.read_bytes()
            path.write_bytes(data.replace(struct.pack("<I", len(pickled)), struct.pack("<I", claimed)))
        return folder / "net.pt"

    return build


def directory_of(data: bytes) -> tuple[int, int, int]:
    """Start of the directory, its length, and where the end record is."""
    at = data.rindex(b"PK\5\6")
    length, start = struct.unpack_from("<2L", data, at + 12)
    return start, length, at


def two_directories(data: bytes) -> bytes:
    """One file, two archives: ``zipfile`` reads the directory before the end record, torch the one that it names."""
    decoy = zip_bytes({**HONEST, "net/data/0": (WEIGHT / 100).tobytes()})
    start, length, end = directory_of(decoy)
    first, extent, _ = directory_of(data)
    assert length == extent
    moved = bytearray(decoy[start:end])
    body = data[: first + extent] + decoy[:start] + bytes(moved)
    # Positions in the second directory are shifted by what zipfile thinks was put before the archive.
    shift = len(data[: first + extent]) - (len(body) - length - first)
    at = len(body) - length
    whole = bytearray(body)
    while at < len(body):
        (where,) = struct.unpack_from("<L", whole, at + 42)
        struct.pack_into("<L", whole, at + 42, where + shift)
        name, extra, comment = struct.unpack_from("<3H", whole, at + 28)
        at += 46 + name + extra + comment
    return bytes(whole) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, length, first, 0)


def two_ends(data: bytes) -> bytes:
    """The comment of one end record holds another one."""
    start, _, end = directory_of(data)
    other = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 60, start, 0)
    return data[: end + 20] + struct.pack("<H", len(other)) + other


def zip64(directory: int, records: int = 3, at: int | None = None) -> Change:
    """The end of a zip64 archive, with freely chosen place of the directory and count of records."""

    def change(data: bytes) -> bytes:
        _, length, end = directory_of(data)
        wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, records, records, length, directory)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, end if at is None else at, 1)
        last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        return data[:end] + wide + locator + last

    return change


def many_records(count: int) -> bytes:
    """A directory of records that are not there."""
    name = b"net/a"
    one = (
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0) + name
    )
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name
    whole = local + one * count
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(one) * count, len(local))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(whole), 1)
    return (
        whole
        + wide
        + locator
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )


def packed(data: bytes) -> bytes:
    """gzip, fast."""
    return gzip.compress(data, 1)


UNSAFE = ["net/../x", "/net/x", "net\\x", "..", "net/x/.."]
ELSEWHERE = "has its directory elsewhere"

ATTACKS = [
    Attack(
        "zip with a compressed storage", compressed("data/0"), refused="is compressed, which torch never does"
    ),
    Attack("zip with a compressed pickle", compressed("data.pkl")),
    Attack(
        "zip bomb in the pickle",
        bomb(50 * 2**20),
        refused="limit pickle_bytes = 9,000,000",
        options=("--limit", "pickle_bytes=9MB"),
    ),
    Attack(
        "zip bomb that denies itself",
        bomb(50 * 2**20, 100),
        refused="does not unpack to the 100 bytes it claims",
    ),
    Attack(
        "zip with records that overlap",
        changed(field(b"net/data.pkl", 20, struct.pack("<2I", 320, 320))),
        refused="overlaps the one before it",
    ),
    Attack(
        "zip with one record under two names",
        changed(lambda data: field(b"net/version", 42, data[entry(data, b"net/data/0") + 42 :][:4])(data)),
        refused="is not where the zip directory says",
    ),
    Attack("zip with a record twice", repeated, refused="twice"),
    Attack(
        "zip with records that differ in case",
        with_record("net/DATA/0", (9 * WEIGHT).tobytes()),
        refused="differs from another zip record only in case",
    ),
    Attack(
        "zip with a record longer than the file",
        changed(field(b"net/version", 20, struct.pack("<2I", 1 << 31, 1 << 31))),
        refused="ends after",
    ),
    Attack(
        "zip with two sizes",
        changed(field(b"net/data/0", 20, struct.pack("<I", 8))),
        refused="two different sizes",
    ),
    Attack(
        "zip with a wrong size",
        changed(field(b"net/data/0", 20, struct.pack("<2I", 60, 60))),
        refused="needs a storage of 16 elements; its record has 60 bytes",
    ),
    Attack("zip with an encrypted record", changed(field(b"net/data/0", 8, b"\1\0")), refused="is encrypted"),
    Attack(
        "zip with a storage that is marked as a folder",
        changed(field(b"net/data/0", 38, b"\x10")),
        refused="is marked as a folder and holds 64 bytes",
    ),
    Attack(
        "zip with a storage that is named as a folder",
        built(
            lambda: zip_bytes(
                {"net/data.pkl": state().replace(text("0"), text("0/")), "net/data/0/": WEIGHT.tobytes()}
            )
        ),
        refused="the zip archive has no record .data/0/.",
    ),
    Attack(
        "zip with an unknown compression",
        changed(field(b"net/data/0", 10, b"\x63\0")),
        refused="has another compression",
    ),
    *(
        Attack(f"zip with the record {name!r}", with_record(name), refused="zip record with the unsafe name")
        for name in UNSAFE
    ),
    Attack(
        "zip with a name cut by NUL",
        changed(renamed(b"net/version", b"net/data/0\0")),
        refused="the unsafe name|twice",
    ),
    Attack("zip with two directories", changed(two_directories), refused=ELSEWHERE),
    Attack("zip with two ends", changed(two_ends), refused="has two ends|is damaged"),
    Attack(
        "zip with bytes behind its end",
        changed(lambda data: data + b"more"),
        refused="behind its end|damaged",
    ),
    Attack("zip with bytes before it", changed(lambda data: HONEST_HEAD + data), refused=ELSEWHERE),
    Attack("zip64 that is honest", changed(lambda data: zip64(directory_of(data)[0])(data))),
    Attack("zip64 with its directory at 2^60", changed(zip64(2**60)), refused="damaged|elsewhere"),
    Attack("zip64 with its end record at 2^60", changed(zip64(0, at=2**60)), refused="zip64 end record"),
    Attack("zip64 with 2^60 records", changed(lambda data: zip64(directory_of(data)[0], 2**60)(data))),
    Attack(
        "zip with many records",
        built(lambda: many_records(3000)),
        refused="limit records = 2,000",
        options=("--limit", "records=2000"),
    ),
    Attack(
        "zip with a million records",
        built(lambda: many_records(1_000_000)),
        refused="limit records = 500,000",
        seconds=60,
        slow=True,
    ),
    Attack(
        "zip inside a zip",
        built(lambda: zip_bytes({"net.pt": zip_bytes(HONEST)})),
        refused="around a checkpoint",
    ),
    Attack(
        "zip without a directory",
        changed(lambda data: data[: directory_of(data)[0]]),
        refused="damaged or cut short",
    ),
    # --- gzip
    Attack(
        "gzip bomb", built(lambda: packed(bytes(100 * 2**20)), "net.gz"), refused="limit unpack_ratio = 200"
    ),
    Attack(
        "gzip in gzip",
        built(lambda: packed(packed(zip_bytes(HONEST))), "net.gz"),
        refused="a gzip file inside a gzip",
    ),
    Attack("gzip of many members", built(lambda: packed(zip_bytes(HONEST)) + packed(b"") * 20_000, "net.gz")),
    Attack(
        "gzip cut short",
        built(lambda: packed(zip_bytes(HONEST))[:-9], "net.gz"),
        refused="damaged gzip stream",
    ),
    Attack(
        "gzip of another length than it says",
        built(lambda: packed(zip_bytes(HONEST))[:-4] + b"\1\0\0\0", "net.gz"),
        refused="damaged gzip stream",
    ),
]

HONEST_HEAD = zip_bytes({"net/data.pkl": b"\x80\x02}.", "net/data/0": np.zeros(16, np.float32).tobytes()})
