"""What a file may ask for, as options say it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from spectool.errors import UsageError

if TYPE_CHECKING:
    from spectool.checkpoint.limits import Limits

_AMOUNT = re.compile(r"(\d+(?:_\d+)*|\d+(?:,\d{3})+|\d*\.\d+)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)
#: Python itself refuses numbers of some thousand digits; a float ends at 308.
_MOST_DIGITS = 100
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_limits(max_tensor_bytes: str | None, limits: Sequence[str]) -> Limits:
    """Return the limits that ``--max-tensor-bytes`` and ``--limit`` set; the others keep their defaults.

    Args:
        max_tensor_bytes: A size, or None.
        limits: Texts ``name=value``; the last of one name counts.

    Raises:
        UsageError: If one is no limit or no amount.
    """
    from spectool.checkpoint.limits import Limits

    known = [entry.name for entry in fields(Limits)]
    given: dict[str, int] = {}
    for text in limits:
        written, equals, value = text.partition("=")
        name = written.strip().replace("-", "_").lower()
        if not equals or name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}=N?" if near else f"limits: {', '.join(known)}"
            raise UsageError(f"--limit {text!r} is no limit", hint=hint if equals else "write NAME=VALUE")
        given[name] = parse_amount(value, f"--limit {text!r}")
    if max_tensor_bytes is not None:
        given["tensor_bytes"] = parse_amount(max_tensor_bytes, f"--max-tensor-bytes {max_tensor_bytes!r}")
    return Limits(**given)


def parse_amount(text: str, what: str) -> int:
    """Return a whole number: ``200``, ``1_000_000``, ``2GB`` (10⁹ each), ``1.5GiB`` (2³⁰ each).

    Args:
        text: What the user wrote.
        what: The option and its value, for the message.

    Raises:
        UsageError: If it is no such number.
    """
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]) or len(found[1]) > _MOST_DIGITS:
        raise UsageError(f"{what} is no amount", hint="write e.g. 200, 2GB or 512MiB")
    number, prefix, binary, _ = found.groups()
    unit: int = (1024 if binary else 1000) ** _POWERS[prefix.lower()]
    plain = number.replace("_", "").replace(",", "")
    # A number without a point stays exact whatever its size.
    return int(plain) * unit if "." not in plain else round(float(plain) * unit)
