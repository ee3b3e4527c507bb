"""What an attack is: a builder of bytes, and what has to come of them."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: A module that lies where Python would find it; whatever imports it has run something from the file.
FOREIGN = "foreign_module_of_an_attack"
#: A word in every payload, so that code or commands that come from a file can be told from others.
TOKEN = "payload-of-an-attack"
#: The weight of every harmless file; its largest singular value is 3.
WEIGHT = np.diag(np.array([3.0, 2.0, 1.0, 0.5], np.float32))

Build = Callable[[Path], Path]


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name: What it is, unique.
        build: Writes it into an empty folder and returns the file to open.
        refused: Pattern of the one-line error with which every command refuses it (exit code 2).
        lost: Pattern of the error of ``inspect`` and ``clip``; ``ls``, which reads less, lists it.
        failed: Pattern of the note of the row that fails or is skipped; the other rows, and ``ls``, go on.
            With none of the three the file is read and ``inspect`` finds the σ₁ = 3 of ``WEIGHT``.
        seconds: CPU time that all commands together may take, some ten times what they do.
        slow: Whether it takes more than a second or two, and runs only where all are wanted.
        options: More options for every command.
        shape: What ``inspect`` and ``clip`` are told of the input.
        clip: Exit code of ``clip`` where the file can be read: 4 if some row stays as it is, 2 if no copy can be made.
    """

    name: str
    build: Build
    refused: str = ""
    lost: str = ""
    failed: str = ""
    seconds: int = 20
    slow: bool = False
    options: tuple[str, ...] = ()
    shape: str = ""
    clip: int = 0


def torch_zip(path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """Write a torch zip around a pickle made by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", pickled)
        for name, content in (storages or {}).items():
            archive.writestr(f"net/data/{name}", content)
        archive.writestr("net/version", "3\n")
    return path


def text(value: str) -> bytes:
    """A string, pickled."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def tensor(
    key: str = "0",
    shape: tuple[int, ...] = WEIGHT.shape,
    stride: tuple[int, ...] = (4, 1),
    numel: int = WEIGHT.size,
    offset: int = 0,
) -> bytes:
    """A float32 tensor, pickled as torch does: a call of ``_rebuild_tensor_v2`` on a persistent id."""
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + integer(numel) + b"tQ"
    )
    sizes = [b"(" + b"".join(integer(size) for size in sizes) + b"t" for sizes in (shape, stride)]
    empty = b"ccollections\nOrderedDict\n)R"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return call + storage + integer(offset) + sizes[0] + sizes[1] + b"\x89" + empty + b"tR"


def integer(value: int) -> bytes:
    """An integer of any size, pickled."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def state(*entries: bytes) -> bytes:
    """A dict of pickled keys and values, beside the harmless weight."""
    body = b"".join(entries) + text("w") + tensor()
    return b"\x80\x02}(" + body + b"u."


def checkpoint(path: Path, *entries: bytes) -> Path:
    """A torch zip that holds the harmless weight ``w`` and more entries (pickled keys and values)."""
    return torch_zip(path, state(*entries), {"0": WEIGHT.tobytes()})


def zip_bytes(records: Mapping[str, bytes], **options: int) -> bytes:
    """A zip archive in memory."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:  # type: ignore[arg-type]
        for name, content in records.items():
            archive.writestr(name, content)
    return stream.getvalue()
