"""safetensors: a JSON header and raw bytes. The header is read here, so that listing a file needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectool.checkpoint.dtypes import ITEMSIZE, SAFETENSORS, SAFETENSORS_PACKED
from spectool.checkpoint.inert import MOST_AXES
from spectool.checkpoint.jsonfile import parse_object
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.read import Reader, row_major
from spectool.checkpoint.source import Source
from spectool.checkpoint.types import Checkpoint, TensorRef
from spectool.errors import CorruptFile, NothingToAnalyse

#: A header that begins past this is no safetensors file but some text with a brace in ninth place.
PLAUSIBLE_HEADER = 2**40


def is_safetensors(head: bytes) -> bool:
    """Tell whether a file begins like safetensors: a plausible length, then ``{``."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < PLAUSIBLE_HEADER


def open_safetensors(source: Source, limits: Limits) -> Checkpoint:
    """Read the header of one safetensors file.

    Raises:
        CorruptFile: If the header is no valid JSON, or the tensors overlap, leave holes or leave the file.
        LimitExceeded: If the header is too long.
    """
    path = source.path
    length = int.from_bytes(source.read(0, 8, "the header length"), "little")
    limits.check("header_bytes", length, f"{path}: the safetensors header")
    header = parse_object(
        source.read(8, length, "the safetensors header"), f"{path}: the safetensors header", limits
    )
    extra = header.pop("__metadata__", None)
    if extra is not None and not (
        isinstance(extra, dict) and all(isinstance(v, str) for v in extra.values())
    ):
        raise CorruptFile(f"{path}: __metadata__ of the safetensors header is not a map of strings")
    limits.check("names", len(header), f"{path}: the number of tensors")
    tensors: dict[str, TensorRef] = {}
    unread: dict[str, str] = {}
    extents = []
    for name, entry in header.items():
        code, shape, begin, end = _entry(path, name, entry)
        if code in SAFETENSORS_PACKED:
            bits = SAFETENSORS_PACKED[code]
            unread[name] = f"elements of {bits} bits ({code})"
        elif code in SAFETENSORS:
            bits = 8 * ITEMSIZE[SAFETENSORS[code]]
        else:
            raise CorruptFile(f"{path}: tensor {name!r} has the unknown type {code!r}")
        count = 1
        for size in shape:
            count *= size
        if (count * bits + 7) // 8 != end - begin:
            raise CorruptFile(
                f"{path}: tensor {name!r} of type {code}, shape {shape} cannot have {end - begin} bytes"
            )
        extents.append((begin, end, name))
        if code in SAFETENSORS:
            start = 8 + length + begin
            tensors[name] = TensorRef(
                name, SAFETENSORS[code], shape, row_major(shape), path, "", start, name, end - begin
            )
    _check_extents(source, extents, 8 + length)
    if not (tensors or unread):
        raise NothingToAnalyse(
            f"{path}: a safetensors file without a single tensor", hint="name a file that holds weights"
        )
    return Checkpoint(path, "safetensors", tensors, {}, extra or {}, None, (), Reader({path: source}), unread)


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        sound = isinstance(code, str) and isinstance(shape, list) and len(shape) <= MOST_AXES
        sound = (
            sound and all(type(number) is int and 0 <= number < 2**63 for number in numbers) and begin <= end
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CorruptFile(f"{path}: the header entry of tensor {name!r} is not dtype, shape and data_offsets")
    return code, tuple(shape), begin, end


def _check_extents(source: Source, extents: list[tuple[int, int, str]], data: int) -> None:
    """Refuse tensors that overlap, leave holes or do not end with the file, as the format's own reader does."""
    at = 0
    for begin, end, name in sorted(extents):
        if begin != at:
            fault = (
                "overlaps the tensor before it"
                if begin < at
                else f"leaves a hole of {begin - at} bytes before it"
            )
            raise CorruptFile(f"{source.path}: tensor {name!r} {fault}", hint="write the file again")
        at = end
    if data + at > source.size:
        raise CorruptFile(
            f"{source.path} ends after {source.size} bytes; its header describes {data + at}",
            hint="the file was cut short: copy or download it again",
        )
    if data + at < source.size:
        raise CorruptFile(
            f"{source.path} has {source.size - data - at} bytes that its header does not describe",
            hint="write the file again",
        )
