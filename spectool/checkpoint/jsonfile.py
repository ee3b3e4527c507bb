"""JSON from untrusted files: bounded, no key twice."""

from __future__ import annotations

import json
import re
from typing import Any

from spectool.errors import CorruptFile

_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in ``data``.

    Args:
        data: UTF-8 text, already bounded in size.
        what: File and part, for messages.

    Raises:
        CorruptFile: If it is no JSON object, has a key twice or text that is no Unicode.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise CorruptFile(f"{what} has the key {twice!r} twice")
        return entries

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique)
        if _HALF_CHARACTER.search(text):
            # Half of a surrogate pair is no character: such a name could be neither printed nor compared.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{what} is not valid JSON ({error})", hint="copy or download it again") from error
    if not isinstance(value, dict):
        raise CorruptFile(f"{what} is a JSON {type(value).__name__}, not an object")
    return value
