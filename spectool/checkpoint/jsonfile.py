"""JSON from untrusted files: bounded, no key twice."""

from __future__ import annotations

import json
import re
from typing import Any

from spectool.checkpoint.limits import Limits
from spectool.errors import CorruptFile

_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def parse_object(data: bytes, what: str, limits: Limits, *, infinities: bool = False) -> dict[str, Any]:
    """Return the JSON object in ``data``.

    Args:
        data: UTF-8 text, already bounded in size.
        what: File and part, for messages.
        limits: ``json_values`` applies here.
        infinities: Whether to take NaN and Infinity, which are no JSON but stand in some configurations, for numbers.

    Raises:
        CorruptFile: If it is no JSON object, has a key twice or text that is no Unicode.
        LimitExceeded: If it holds too many values.
    """
    # Each of them takes up to a hundred times the memory of its text. Those in texts count, too.
    limits.check("json_values", sum(map(data.count, (b",", b"[", b"{"))), what)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise CorruptFile(f"{what} has the key {twice[:200]!r} twice")
        return entries

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=float if infinities else constant)
        if _HALF_CHARACTER.search(text):
            # Half of a surrogate pair is no character: such a name could be neither printed nor compared.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise CorruptFile(
            f"{what} is not valid JSON (nested too deeply)", hint="no honest file is: download it again"
        ) from error
    except ValueError as error:
        raise CorruptFile(f"{what} is not valid JSON ({error})", hint="copy or download it again") from error
    if not isinstance(value, dict):
        raise CorruptFile(f"{what} is a JSON {type(value).__name__}, not an object")
    return value
