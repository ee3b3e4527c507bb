"""safetensors: headers that are long, deep, double, contradictory, or no text at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack import WEIGHT, Attack, Build

ENTRY = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}


def raw(header: Callable[[], bytes], data: bytes = WEIGHT.tobytes(), length: int | None = None) -> Build:
    """A file with these bytes for a header, made only when they are wanted."""

    def build(folder: Path) -> Path:
        text = header()
        path = folder / "net.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return path

    return build


def header(entries: dict[str, Any], data: bytes = WEIGHT.tobytes()) -> Build:
    return raw(lambda: json.dumps(entries).encode(), data)


def with_more(text: bytes) -> Build:
    """The honest entry and more text."""
    return raw(lambda: b'{"w":' + json.dumps(ENTRY).encode() + text + b"}")


def second(begin: int, end: int, **more: Any) -> dict[str, Any]:
    return {
        "w": ENTRY,
        "v": {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **more},
    }


ATTACKS = [
    Attack(
        "safetensors whose tensors overlap",
        header(second(32, 96), bytes(96)),
        refused="overlaps the tensor before",
    ),
    Attack("safetensors with a hole", header(second(72, 80), bytes(80)), refused="leaves a hole of 8 bytes"),
    Attack(
        "safetensors with bytes behind",
        header({"w": ENTRY}, bytes(68)),
        refused="4 bytes that its header does not",
    ),
    Attack("safetensors that ends early", header({"w": ENTRY}, bytes(60)), refused="its header describes"),
    Attack(
        "safetensors with a size that overflows",
        header({"w": {**ENTRY, "shape": [2**40, 2**40]}}),
        refused="cannot have 64 bytes",
    ),
    Attack(
        "safetensors with a negative size",
        header({"w": {**ENTRY, "shape": [-4, -4]}}),
        refused="is not dtype, shape",
    ),
    Attack(
        "safetensors with offsets backwards",
        header({"w": {**ENTRY, "data_offsets": [64, 0]}}),
        refused="is not dtype",
    ),
    Attack(
        "safetensors of a million axes",
        header({"w": {**ENTRY, "shape": [1] * 10**6}}),
        refused="is not dtype, shape",
    ),
    Attack(
        "safetensors with sizes as floats",
        header({"w": {**ENTRY, "shape": [4.0, 4]}}),
        refused="is not dtype, shape",
    ),
    Attack(
        "safetensors with sizes as truth",
        header({"w": {**ENTRY, "shape": [True, 16]}}),
        refused="is not dtype, shape",
    ),
    Attack(
        "safetensors with the key of a tensor twice",
        with_more(b',"w":' + json.dumps(ENTRY).encode()),
        refused="has the key 'w' twice",
    ),
    Attack(
        "safetensors with two metadata", with_more(b',"__metadata__":{},"__metadata__":{}'), refused="twice"
    ),
    Attack(
        "safetensors with bad UTF-8", with_more(b',"__metadata__":{"a":"\xff"}'), refused="is not valid JSON"
    ),
    Attack(
        "safetensors with lone surrogates",
        with_more(b',"__metadata__":{"a":"\\ud800"}'),
        refused="is not valid JSON",
    ),
    Attack("safetensors with NaN", with_more(b',"__metadata__":NaN'), refused="NaN is no number of JSON"),
    Attack(
        "safetensors with Infinity for an offset",
        raw(lambda: b'{"w":{"dtype":"F32","shape":[4,4],"data_offsets":[0,Infinity]}}'),
        refused="Infinity is no number",
    ),
    Attack(
        "safetensors with a number of 1 MB", with_more(b',"v":' + b"9" * 10**6), refused="is not valid JSON"
    ),
    Attack(
        "safetensors nested 50 million deep",
        raw(lambda: b'{"w":' + b"[" * 50_000_000),
        refused="limit json_values",
        seconds=60,
        slow=True,
    ),
    Attack(
        "safetensors nested a million deep",
        raw(lambda: b'{"w":' + b"[" * 10**6 + b"]" * 10**6 + b"}"),
        refused="nested too deeply",
    ),
    Attack(
        "safetensors nested 900 deep",
        with_more(b',"v":' + b"[" * 900 + b"]" * 900),
        refused="tensor 'v' is not dtype",
    ),
    Attack(
        "safetensors with a header of 100 MB",
        raw(lambda: b'{"w":' + json.dumps(ENTRY).encode() + b" " * 99_999_000 + b"}"),
        seconds=60,
        slow=True,
    ),
    Attack(
        "safetensors with a header of 101 MB",
        raw(lambda: b"{" + b" " * 101_000_000),
        refused="limit header_bytes",
        seconds=60,
        slow=True,
    ),
    Attack(
        "safetensors with a header of 2^39 bytes",
        raw(lambda: b"{}", length=2**39),
        refused="limit header_bytes",
    ),
    Attack("safetensors with a header past the file", raw(lambda: b"{}", length=5000), refused="ends after"),
    Attack(
        "safetensors with 100 000 empty dicts",
        with_more(b',"v":[' + b"{}," * 10**5 + b"{}]"),
        refused="tensor 'v' is not dtype",
    ),
    Attack(
        "safetensors with metadata that is no text",
        with_more(b',"__metadata__":{"a":1}'),
        refused="no. a map of strings",
    ),
    Attack(
        "safetensors of an unknown type",
        header({"w": {**ENTRY, "dtype": "F33"}}),
        refused="unknown type 'F33'",
    ),
    Attack("safetensors without a tensor", header({}, b""), refused="without a single tensor"),
]
