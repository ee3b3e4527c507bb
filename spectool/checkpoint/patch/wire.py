"""Protobuf messages as bytes: where each field lies, without decoding anything else."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from spectool.checkpoint.patch.content import Splice, fixed

NUMBER, WIDE, BLOCK, NARROW = 0, 1, 2, 5


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        wire: ``NUMBER`` (varint), ``WIDE`` (8 bytes), ``BLOCK`` (bytes, text, message, packed numbers) or
            ``NARROW`` (4 bytes).
        head: Position of a block's length, else of the value.
        start: First byte of the value.
        stop: Its end.
    """

    wire: int
    head: int
    start: int
    stop: int


class Messages:
    """The fields of one message and of those nested in it, each message scanned once.

    Args:
        data: A serialised message.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._scanned: dict[tuple[int, int], dict[int, list[Field]]] = {}

    def fields(self, start: int, stop: int) -> dict[int, list[Field]]:
        """Return the fields of the message at a place, by number, in the order of the bytes.

        Raises:
            ValueError: If the bytes are no message, or one of the groups that proto3 dropped.
        """
        found = self._scanned.get((start, stop))
        if found is None:
            found = self._scanned[start, stop] = self._scan(start, stop)
        return found

    def _scan(self, at: int, stop: int) -> dict[int, list[Field]]:
        found: dict[int, list[Field]] = {}
        data = self.data
        while at < stop:
            tag, at = read_varint(data, at)
            wire, head = tag & 7, at
            if wire == NUMBER:
                _, end = read_varint(data, at)
            elif wire == WIDE:
                end = at + 8
            elif wire == NARROW:
                end = at + 4
            elif wire == BLOCK:
                length, at = read_varint(data, at)
                end = at + length
            else:
                raise ValueError(f"a field of wire type {wire}")
            if end > stop:
                raise ValueError("a field that leaves its message")
            found.setdefault(tag >> 3, []).append(Field(wire, head, at, end))
            at = end
        return found


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number and the position behind it.

    Raises:
        ValueError: If it has more than ten bytes or no end.
    """
    value = shift = 0
    for position in range(at, min(at + 10, len(data))):
        octet = data[position]
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value, position + 1
        shift += 7
    raise ValueError("a number without an end")


def write_varint(value: int) -> bytes:
    """Return a number as protobuf writes it; negative ones as 64 bits."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def with_lengths(data: Any, changes: list[Splice], around: Iterable[Field]) -> list[Splice]:
    """Add to changes the lengths of the blocks around those that change a length.

    Args:
        data: The outermost message.
        changes: Disjoint splices.
        around: Every block that encloses one of them, in any order, repeats allowed.

    Returns:
        The changes and one splice per length that differs.
    """
    ordered = sorted(changes, key=lambda change: change.start)
    if all(change.length == change.stop - change.start for change in ordered):
        return ordered
    positions = [change.start for change in ordered]
    deltas = [change.length - (change.stop - change.start) for change in ordered]
    # Innermost first: a length that takes more bytes than before makes the blocks around it longer.
    for block in sorted(set(around), key=lambda block: block.stop - block.start):
        low, high = bisect_left(positions, block.start), bisect_right(positions, block.stop - 1)
        delta = sum(deltas[low:high])
        if not delta:
            continue
        new = write_varint(block.stop - block.start + delta)
        at = bisect_left(positions, block.head)
        ordered.insert(at, fixed(block.head, block.start, new))
        positions.insert(at, block.head)
        deltas.insert(at, len(new) - (block.start - block.head))
    return ordered
