"""Compare output with files under tests/golden; SPECTOOL_UPDATE_GOLDEN=1 overwrites them instead."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def check_golden(name: str, data: str | bytes) -> None:
    """Assert that ``data`` is what the golden file ``name`` holds, byte for byte."""
    found = data.encode() if isinstance(data, str) else data
    place = FOLDER / name
    if os.environ.get("SPECTOOL_UPDATE_GOLDEN") == "1":
        place.write_bytes(found)
    assert place.is_file(), (
        f"no golden file {name}: run with SPECTOOL_UPDATE_GOLDEN=1 and look at what it writes"
    )
    expected = place.read_bytes()
    lines = difflib.unified_diff(
        expected.decode().splitlines(), found.decode().splitlines(), "golden", "found", lineterm=""
    )
    assert found == expected, "\n".join([f"{name} differs", *lines])
