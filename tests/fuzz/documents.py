"""Mutants of JSON documents and of the safetensors header; duplicate keys can be made."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

from .octets import number, text


class Pairs(list):  # type: ignore[type-arg]
    """A JSON object as a list of [key, value]."""


def parse(data: bytes) -> Any:
    """Return a document with objects as ``Pairs``.

    Raises:
        ValueError: If it is no JSON.
    """
    return json.loads(data, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))


def dump(value: Any) -> bytes:
    """Return the text of a document."""
    if isinstance(value, Pairs):
        return b"{" + b",".join(json.dumps(key).encode() + b":" + dump(item) for key, item in value) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(dump, value)) + b"]"
    return value if isinstance(value, bytes) else json.dumps(value).encode()


Slot = tuple[Any, int, str]  # container, index, the key (or "[]") it stands under


def slots(value: Any, label: str = "") -> list[Slot]:
    """Return every place of a document where a value stands."""
    found: list[Slot] = []
    pending = [value]
    while pending:
        node = pending.pop()
        for index, item in enumerate(node):
            inner = item[1] if isinstance(node, Pairs) else item
            found.append((node, index, item[0] if isinstance(node, Pairs) else "[]"))
            if isinstance(inner, list):
                pending.append(inner)
    return found


def mutate_json(data: bytes, rng: random.Random, others: list[str] | None = None) -> tuple[bytes, str]:
    """Return a changed document and what was done.

    Raises:
        ValueError: If it is no JSON.
    """
    root = parse(data)
    what = mutate_document(root, rng, others or [])
    return dump(root), what


def mutate_document(root: Any, rng: random.Random, others: list[str]) -> str:
    """Change a document in place."""
    if not isinstance(root, list) or not root:
        return "nothing to change"
    places = slots(root)
    # A key that occurs once gets as much attention as one that occurs in every entry.
    counts = Counter(name for _, _, name in places)
    names = sorted(counts)
    shared = [name for name in names if counts[name] > 1]
    wanted = rng.choice(shared if shared and rng.random() < 0.6 else names)
    node, index, name = rng.choice([place for place in places if place[2] == wanted])
    old = node[index][1] if isinstance(node, Pairs) else node[index]
    match rng.randrange(9):
        case 0:
            del node[index]
            return f"{name}: deleted"
        case 1:
            node.insert(rng.randrange(len(node) + 1), list(node[index]) if isinstance(node, Pairs) else old)
            return f"{name}: repeated"
        case 2:
            other, where, label = rng.choice(places)
            new = other[where][1] if isinstance(other, Pairs) else other[where]
            _set(node, index, parse(dump(new)))
            return f"{name}: = the value of {label}"
        case 3 if isinstance(node, Pairs):
            node[index][0] = text(rng, names)
            return f"{name}: renamed to {node[index][0][:40]!r}"
        case 4:
            depth = int(10 ** rng.uniform(0.5, 4))
            opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
            _set(node, index, opening * depth + b"1" + closing * depth)
            return f"{name}: {depth} levels of {opening!r}"
        case 5:
            new = rng.choice(
                (None, True, False, 1.5, -0.0, 1e400, Pairs(), [], [[]], [None], b"NaN", b"1e400", b"-")
            )
            _set(node, index, new)
            return f"{name}: {str(old)[:40]} -> {new!r}"
        case _:
            new = _like(old, rng, [*others, *names], places)
            _set(node, index, new)
            return f"{name}: {str(old)[:40]} -> {str(new)[:60]!r}"


def _like(old: Any, rng: random.Random, texts: list[str], places: list[Slot]) -> Any:
    """Return another value of the same kind."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float):
        return number(rng, int(old))
    if isinstance(old, str):
        values = (node[index][1] for node, index, _ in places if isinstance(node, Pairs))
        return text(rng, [*texts, *(value for value in values if isinstance(value, str))])
    if (
        isinstance(old, list)
        and old
        and not isinstance(old, Pairs)
        and all(type(item) is int for item in old)
    ):
        new = list(old)
        new[rng.randrange(len(new))] = number(rng, rng.choice(old))
        return rng.choice((new, new[::-1], [*old, 1], [1, *old], old[:-1], [*old, 0], [1] * 70))
    return rng.choice((number(rng), text(rng, texts), [], Pairs(), [old], Pairs([["a", old]])))


def _set(node: Any, index: int, value: Any) -> None:
    if isinstance(node, Pairs):
        node[index][1] = value
    else:
        node[index] = value


DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "U16",
    "C64",
    "F6_E2M3",
]


def mutate_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a safetensors file with a changed header whose length is right.

    Raises:
        ValueError: If it is no such file.
    """
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    root = parse(header)
    tensors = [pair for pair in root if pair[0] != "__metadata__" and isinstance(pair[1], Pairs)]
    what = (
        _consistent(tensors, rng) if tensors and rng.random() < 0.25 else mutate_document(root, rng, DTYPES)
    )
    new = dump(root)
    if rng.random() < 0.5:
        new += b" " * (-len(new) % 8)
    return len(new).to_bytes(8, "little") + new + body, f"header: {what}"


def _consistent(tensors: list[Any], rng: random.Random) -> str:
    """Change type, shape or order of tensors so that their sizes still fit their bytes."""
    name, entry = rng.choice(tensors)
    fields = {key: index for index, (key, _) in enumerate(entry)}
    if not {"dtype", "shape", "data_offsets"} <= fields.keys():
        return f"{name}: left alone"
    shape = entry[fields["shape"]][1]
    match rng.randrange(5):
        case 0:
            entry[fields["shape"]][1] = new = rng.choice(
                (shape[::-1], [1, *shape], [*shape, 1], [_product(shape)])
            )
        case 1:
            entry[fields["dtype"]][1] = new = rng.choice(DTYPES)
        case 2:
            other = rng.choice(tensors)
            entry[:], other[1][:], new = list(other[1]), list(entry), [other[0]]
        case 3:
            sizes = [number(rng) for _ in range(rng.choice((1, 2, 3, 4, 5)))]
            begin = entry[fields["data_offsets"]][1][0]
            entry[fields["shape"]][1] = new = [0, *sizes]
            entry[fields["data_offsets"]][1] = [begin, begin]
        case _:
            new = f"x.{name}"
            position = next(index for index, pair in enumerate(tensors) if pair[0] == name)
            tensors[position][0] = new = rng.choice(
                (
                    f"{name}.lora_A.weight",
                    f"{name}.weight_g",
                    f"{name}.weight_orig",
                    "conv.weight",
                    f"{name}.qweight",
                )
            )
    return f"{name}: fitting {str(new)[:60]}"


def _product(shape: list[Any]) -> int:
    count = 1
    for size in shape:
        count *= size if isinstance(size, int) else 1
    return count
