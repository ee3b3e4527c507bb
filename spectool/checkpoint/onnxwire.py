"""Tell an ONNX model by the layout of its bytes, without importing onnx."""

from __future__ import annotations

from spectool.checkpoint.source import Source
from spectool.errors import CorruptFile

#: Top-level fields of a ModelProto by wire type: 0 is a number, 2 is a block of bytes.
_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_VERSION_FIELD, _GRAPH_FIELD, _OPSETS_FIELD = 1, 7, 8
_MOST_FIELD = 1000
#: What is read at once, and the most of it that the head of one field takes.
_BLOCK, _HEAD = 4096, 20


def is_onnx(source: Source) -> bool:
    """Tell whether the bytes are laid out like an ONNX model, without parsing it.

    Walks the top-level fields by their lengths: the known ones must have the type that a model gives them, a version
    and a graph must be among them. Fields of later ONNX versions may be there too.

    Raises:
        CorruptFile: If everything fits but the graph ends after the file.
    """
    position = first = 0
    block = b""
    seen: set[int] = set()
    while position < source.size:
        if position + _HEAD > first + len(block):
            # Fields of a few bytes can follow each other by the million.
            first, block = position, source.read(position, min(_BLOCK, source.size - position))
        head = block[position - first : position - first + _HEAD]
        tag, used = _varint(head)
        number, wire = tag >> 3, tag & 7
        value, more = _varint(head[used:])
        if used == 0 or more == 0 or wire not in (0, 2) or not 1 <= number <= _MOST_FIELD:
            return False
        if _FIELDS.get(number, wire) != wire or (number == _VERSION_FIELD and not 1 <= value <= 1000):
            return False
        if not seen and number not in (_VERSION_FIELD, 2, _OPSETS_FIELD):
            return False
        position += used + more + (value if wire == 2 else 0)
        seen.add(number)
        if position > source.size:
            if number == _GRAPH_FIELD and _VERSION_FIELD in seen:
                raise CorruptFile(
                    f"{source.path} ends after {source.size} bytes; its ONNX graph needs {position}",
                    hint="the file was cut short: copy or download it again",
                )
            return False
    return {_VERSION_FIELD, _GRAPH_FIELD} <= seen


def _varint(data: bytes) -> tuple[int, int]:
    """Return a protobuf number and how many bytes it takes; 0 bytes if it is not all there."""
    value = 0
    for index, octet in enumerate(data[:10]):
        value |= (octet & 0x7F) << (7 * index)
        if octet < 0x80:
            return value, index + 1
    return 0, 0
