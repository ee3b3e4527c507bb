"""Mutants of ONNX models, field by field; the lengths around a changed field are put right."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx

from .octets import number, text

_VARINT, _FIXED64, _BLOCK, _FIXED32 = 0, 1, 2, 5
_FEW = 8
#: Field → numbers that mean something in it.
_ENUMS = {
    "data_type": range(27),
    "elem_type": range(27),
    "type": range(16),
    "data_location": range(3),
}


@functools.cache
def op_types() -> list[str]:
    return sorted({schema.name for schema in onnx.defs.get_all_schemas()})


@dataclass(frozen=True)
class Field:
    """One field of a message: number, wire type, payload; its own fields where the schema has a message there."""

    number: int
    wire: int
    payload: bytes
    children: tuple[Field, ...] | None = None

    def encode(self) -> bytes:
        length = varint(len(self.payload)) if self.wire == _BLOCK else b""
        return varint(self.number << 3 | self.wire) + length + self.payload


def varint(value: int) -> bytes:
    """Return a number as protobuf writes it (negative ones as 64 bits)."""
    value %= 2**64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("no varint")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
        shift += 7


def split(data: bytes, descriptor: Any, depth: int = 0) -> tuple[Field, ...]:
    """Return the fields of a message.

    Raises:
        ValueError: If it is none.
    """
    fields, at = [], 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        wire, start = tag & 7, at
        if wire == _VARINT:
            _, at = _read_varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        elif wire == _BLOCK:
            length, start = _read_varint(data, at)
            at = start + length
        else:
            raise ValueError(f"wire type {wire}")
        if at > len(data):
            raise ValueError("cut short")
        known = descriptor.fields_by_number.get(tag >> 3) if descriptor else None
        children = None
        if wire == _BLOCK and known is not None and known.message_type is not None and depth < 40:
            children = split(data[start:at], known.message_type, depth + 1)
        fields.append(Field(tag >> 3, wire, data[start:at], children))
    return tuple(fields)


Path = tuple[int, ...]


def _walk(fields: tuple[Field, ...], descriptor: Any, path: Path = ()) -> Iterator[tuple[str, Path, Field]]:
    for index, field in enumerate(fields):
        known = descriptor.fields_by_number.get(field.number)
        label = f"{descriptor.name.removesuffix('Proto')}.{known.name if known is not None else field.number}"
        yield label, (*path, index), field
        if field.children is not None:
            yield from _walk(field.children, known.message_type, (*path, index))


Model = tuple[tuple[Field, ...], dict[str, list[tuple[Path, Field]]]]


@functools.lru_cache(maxsize=12)
def dissect(data: bytes) -> Model:
    """Return the fields of a model, and label → where such fields are.

    Raises:
        ValueError: If it is none.
    """
    fields = split(data, onnx.ModelProto.DESCRIPTOR)
    places: dict[str, list[tuple[Path, Field]]] = {}
    for label, path, field in _walk(fields, onnx.ModelProto.DESCRIPTOR):
        places.setdefault(label, []).append((path, field))
    if not places:
        raise ValueError("nothing in it")
    return fields, places


def _rebuild(fields: tuple[Field, ...], path: Path, new: list[Field]) -> tuple[Field, ...]:
    """Return fields in which the one at ``path`` gives way to ``new``."""
    at, *rest = path
    if not rest:
        return (*fields[:at], *new, *fields[at + 1 :])
    field = fields[at]
    children = _rebuild(field.children or (), tuple(rest), new)
    payload = b"".join(child.encode() for child in children)
    return (*fields[:at], Field(field.number, field.wire, payload, children), *fields[at + 1 :])


def mutate_onnx(data: bytes, rng: random.Random, donor: bytes | None = None) -> tuple[bytes, str]:
    """Return a changed model and what was done.

    Raises:
        ValueError: If it is none.
    """
    fields, places = dissect(data)
    # A field that occurs once gets as much attention as one that every node has; a choice of few of them.
    label = rng.choice(sorted(places))
    path, field = rng.choice(places[label])
    new, what = _replace(label, field, rng, places, donor)
    made = _rebuild(fields, path, new)
    return b"".join(entry.encode() for entry in made), f"{label} at {'.'.join(map(str, path))}: {what}"


def _replace(
    label: str,
    field: Field,
    rng: random.Random,
    places: dict[str, list[tuple[Path, Field]]],
    donor: bytes | None,
) -> tuple[list[Field], str]:
    match rng.randrange(12):
        case 0:
            return [], "deleted"
        case 1:
            count = rng.choice((2, 2, 3, 50))
            return [field] * count, f"{count} times"
        case 2:
            other = rng.choice(places[label])[1]
            return [other], "another one's"
        case 3:
            new = number(rng) % 30 or 1
            return [Field(new, field.wire, field.payload)], f"is field {new}"
        case 4 if donor is not None:
            try:
                others = dissect(donor)[1].get(label)
            except ValueError:
                others = None
            return ([rng.choice(others)[1]], "the other model's") if others else ([], "deleted")
        case 5 if field.children is not None:
            depth = rng.choice((2, 10, 60, 200))
            inner = field
            for _ in range(depth):
                inner = Field(inner.number, _BLOCK, inner.encode())
            return [inner], f"{depth} levels of itself"
        case _:
            return _change(label, field, rng, places)


def _change(
    label: str, field: Field, rng: random.Random, places: dict[str, list[tuple[Path, Field]]]
) -> tuple[list[Field], str]:
    """Return the field with another value of its kind."""
    name = label.partition(".")[2]
    if field.wire == _VARINT:
        old = _read_varint(field.payload, 0)[0]
        new = rng.choice(_ENUMS[name]) if name in _ENUMS and rng.random() < 0.7 else number(rng, old)
        if name in ("dims", "ints", "i", "dim_value") and rng.random() < 0.3:
            values = [other.payload for _, other in rng.choice((places[label], places[label][:_FEW]))]
            return [Field(field.number, _VARINT, rng.choice(values))], "another one's number"
        return [Field(field.number, _VARINT, varint(new))], f"{old} -> {new}"
    if field.wire != _BLOCK:
        return [Field(field.number, field.wire, rng.randbytes(len(field.payload)))], "random value"
    if field.children is not None:
        cut = rng.randrange(len(field.payload) + 1)
        return [Field(field.number, _BLOCK, field.payload[:cut])], f"cut to {cut} bytes"
    if name in (
        "raw_data",
        "float_data",
        "int64_data",
        "int32_data",
        "double_data",
        "floats",
        "ints",
        "dims",
    ):
        return [Field(field.number, _BLOCK, new)] if (
            new := _octets(field.payload, rng)
        ) else [], "other bytes"
    if name == "op_type" and rng.random() < 0.8:
        kind = rng.choice(op_types())
        return [Field(field.number, _BLOCK, kind.encode())], f"{field.payload[:40]!r} -> {kind}"
    texts = [other.payload for _, other in places[label][:200] if len(other.payload) < 200]
    texts += [other.payload for _, other in places.get("Node.output", ())[:200]]
    chosen = rng.choice(texts) if texts and rng.random() < 0.6 else text(rng).encode("utf-8", "surrogatepass")
    return [Field(field.number, _BLOCK, chosen)], f"{field.payload[:40]!r} -> {chosen[:40]!r}"


def _octets(data: bytes, rng: random.Random) -> bytes:
    """Return other bytes for a block of numbers."""
    at = rng.randrange(len(data) + 1)
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data + data[:at] + b"\0"
        case 2:
            return data[:at] + b"\xff" * min(8, len(data) - at) + data[at + 8 :]
        case 3:
            return bytes(len(data))
        case _:
            return data[:at] + rng.randbytes(min(4, len(data) - at)) + data[at + 4 :]
