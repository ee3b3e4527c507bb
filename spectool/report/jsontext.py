"""JSON documents and JSON lines: one record per line in both, so that they diff and grep well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spectool.report.layout import Layout


def json_bytes(layout: Layout) -> bytes:
    """Return the document; ASCII only, so that no name in it can steer a terminal."""
    head = "".join(f'"{name}": {_dump(value)},\n ' for name, value in layout.head.items())
    records = ",\n".join(f"  {_dump(record)}" for record in layout.records)
    body = f"[\n{records}\n ]" if records else "[]"
    return f'{{{head}"{layout.member}": {body}}}\n'.encode("ascii")


def jsonl_bytes(layout: Layout) -> bytes:
    """Return one record per line."""
    return "".join(f"{_dump(record)}\n" for record in layout.records).encode("ascii")


def _dump(value: Mapping[str, Any] | Any) -> str:
    # allow_nan=False: a NaN that got this far is a defect, and a loud one.
    return json.dumps(value, allow_nan=False).replace("\x7f", "\\u007f")
