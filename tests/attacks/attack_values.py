"""What stands in tensors and in their names: numbers that are none, and names made for terminals and spreadsheets."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from attack import WEIGHT, Attack, Build

#: Kind → a name that does harm where it is shown as it stands.
NAMES: Mapping[str, str] = {
    "newline": "a\nb: 1\r\nc",
    "escape sequence": "\x1b]0;title\x07\x1b[2J\x1b[31mred",
    "one-byte controls": "\x9b2J\x90q\x9c",
    "backspaces": "evil\x08\x08\x08\x08good",
    "NUL": "a\0b",
    "bidi override": "w\u202ethgie\u2066.pt\u2069",
    "zero width": "we\u200bight\ufeff",
    "line separator": "a\u2028b\u2029c\x85d",
    "formula": "=cmd|'/c calc'!A0",
    "formula of plus": "+1+cmd|'/c calc'!A0",
    "formula of at": "@SUM(1+1)*cmd|'/c calc'!A0",
    "formula behind a tab": "\t=1+1",
    "hyperlink": '=HYPERLINK("http://evil.example","ok")',
    "script": "<script>alert(1)</script>",
    "image": '"><img src=x onerror=alert(1)>',
    "markdown": "[x](javascript:alert(1)) | `code` | **b**",
    "rich markup": "[bold red]x[/] [link=http://evil.example]y[/link] [/nothing]",
    "emoji code": ":bomb: :smiley:",
    "xml": "]]> &lt; <!-- \ufffe\uffff <failure/>",
    "workflow command": "x\n::error file=a::owned\n::set-output name=a::b",
    "workflow command by percent": "x%0A::error::owned",
    "csv": 'a","b\r\n=1+1',
    "path": "../../../../etc/passwd",
    "number": "1.10",
    "date": "2/3",
    "10 kB": "n" * 10_240,
    "nothing": "",
    "format": "{0.__class__} %s %n ${HOME} `id` $(id)",
}


def safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write float32 tensors, whatever they are called."""
    header, at = {}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + b"".join(value.tobytes() for value in tensors.values())
    )
    return path


def beside(value: float, where: tuple[int, int] = (0, 0)) -> Build:
    """The weight, and another one with this number in it."""
    other = WEIGHT.copy()
    other[where] = value
    return lambda folder: safetensors(folder / "net.safetensors", {"w": WEIGHT, "v": other})


def scaled(factor: float) -> Build:
    return lambda folder: safetensors(
        folder / "net.safetensors",
        {"w": WEIGHT, "v": (WEIGHT.astype(np.float64) * factor).astype(np.float32)},
    )


def called(name: str) -> Build:
    return lambda folder: safetensors(folder / "net.safetensors", {"w": WEIGHT, name: WEIGHT})


NOT_FINITE = "NaN or infinite values"
ATTACKS = [
    Attack("weight with a NaN", beside(float("nan")), failed=NOT_FINITE, clip=4),
    Attack("weight with an infinity", beside(float("inf"), (2, 1)), failed=NOT_FINITE, clip=4),
    Attack("weight with minus infinity", beside(float("-inf"), (3, 3)), failed=NOT_FINITE, clip=4),
    Attack(
        "weight with a signalling NaN",
        lambda folder: safetensors(
            folder / "net.safetensors",
            {"w": WEIGHT, "v": np.full((4, 4), 0x7F800001, np.uint32).view(np.float32)},
        ),
        failed=NOT_FINITE,
        clip=4,
    ),
    Attack("weight of denormals", scaled(1e-40)),
    Attack("weight near overflow", scaled(1e38)),
    Attack("weight with one large number", beside(3e38, (1, 2))),
    Attack("weight of zeros", scaled(0.0)),
    Attack("weight of minus zeros", scaled(-0.0)),
    *(Attack(f"name with {kind}", called(name)) for kind, name in NAMES.items() if kind != "nothing"),
]
