"""How much an ONNX model would take, told before anything is built from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spectool.checkpoint.limits import Limits
from spectool.errors import CorruptFile

#: Below this the most that a parser can make of a file (some 60 bytes of each) is no matter.
_SMALL = 8 * 2**20

_IN_ATTRIBUTE = ("tensor", "graph", "tensor", "graph", "other", "other", "sparse", "sparse")
#: Message → field → message in it. What is not listed is numbers, texts or bytes, or is small in every model.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "other", 14: "other", 20: "other", 25: "function"},
    "graph": {
        1: "node",
        5: "tensor",
        15: "sparse",
        **dict.fromkeys((11, 12, 13), "value"),
        14: "other",
        16: "other",
    },
    "function": {7: "node", 9: "other", 11: "attribute", 12: "value", 14: "other"},
    "node": {5: "attribute", 9: "other", 10: "other"},
    "attribute": dict(zip((5, 6, 10, 11, 14, 15, 22, 23), _IN_ATTRIBUTE, strict=True)),
    "tensor": {13: "other", 16: "other"},
    "sparse": {1: "tensor", 2: "tensor"},
    "value": {2: "type", 4: "other"},
    "type": {1: "tensortype"},
    "tensortype": {2: "dims"},
    "dims": {1: "other"},
    "other": {},
}
#: Message → fields that pack numbers of one byte and more into blocks; each becomes four or eight bytes.
_PACKED: dict[str, tuple[int, ...]] = {"tensor": (1, 5, 7, 11), "attribute": (8,), "sparse": (3,)}
_PACKED_SHARE = 8


def check_fields(data: bytes, path: Path, limits: Limits) -> None:
    """Refuse a model whose parsed form would take much more memory than its bytes.

    Raises:
        CorruptFile: If a field leaves its message.
        LimitExceeded: If there are more fields than ``model_fields``.
    """
    if len(data) <= _SMALL:
        return
    count = 0
    most = limits.model_fields
    pending = [("model", 0, len(data))]
    while pending:
        kind, at, stop = pending.pop()
        inner, packed = _MESSAGES[kind], _PACKED.get(kind, ())
        while at < stop:
            tag, at = _varint(data, at, path)
            number, wire = tag >> 3, tag & 7
            start = at
            if wire == 0:
                _, at = _varint(data, at, path)
            elif wire == 2:
                length, start = _varint(data, at, path)
                at = start + length
            else:
                at += {1: 8, 5: 4}.get(wire, 0)
            if at > stop or wire not in (0, 1, 2, 5):
                raise CorruptFile(
                    f"{path} begins like an ONNX model but does not parse", hint="copy or download it again"
                )
            count += 1
            if wire == 2 and number in inner:
                pending.append((inner[number], start, at))
            elif wire == 2 and number in packed:
                count += (at - start) // _PACKED_SHARE
            if count > most:
                limits.check("model_fields", count, f"{path}: the ONNX model")


def _varint(data: bytes, at: int, path: Path) -> tuple[int, int]:
    value = shift = 0
    for place in range(at, min(at + 10, len(data))):
        octet = data[place]
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value, place + 1
        shift += 7
    raise CorruptFile(
        f"{path} begins like an ONNX model but does not parse", hint="copy or download it again"
    )


def check_nodes(model: Any, path: Path, limits: Limits) -> None:
    """Refuse a model with too many nodes once its functions are inlined.

    Raises:
        CorruptFile: If a function calls itself, directly or through others.
        LimitExceeded: If there are more than ``nodes``.
    """
    functions = {(item.domain, item.name, _overload(item)): item for item in model.functions}
    sizes: dict[Any, int] = {}
    open_calls: set[Any] = set()
    # Depth first without recursion: a function is sized when all that it calls are.
    pending = list(functions)
    while pending:
        key = pending[-1]
        if key in sizes:
            pending.pop()
            continue
        calls = [call for call in _calls(functions[key]) if call in functions]
        missing = [call for call in calls if call not in sizes]
        if not missing:
            sizes[key] = sum(sizes.get(call, 1) for call in _calls(functions[key]))
            limits.check("nodes", sizes[key], f"{path}: function {key[1][:60]!r} with what it calls")
            open_calls.discard(key)
            pending.pop()
        elif key in open_calls:
            raise CorruptFile(f"{path}: function {key[1][:60]!r} of the model calls itself")
        else:
            open_calls.add(key)
            pending.extend(missing)
    total = 0
    for call in _calls(model.graph):
        total += sizes.get(call, 1)
        if total > limits.nodes:
            limits.check("nodes", total, f"{path}: its graph")


def _calls(graph: Any) -> Iterator[tuple[str, str, str]]:
    """Yield domain, name and overload of every node of a graph and of the bodies in it."""
    pending = [graph]
    while pending:
        for node in pending.pop().node:
            yield node.domain, node.op_type, _overload(node)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)


def _overload(item: Any) -> str:
    return getattr(item, "overload", "")
