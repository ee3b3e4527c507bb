"""Turn values into text: floats, shapes, and names that nobody vetted."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

# Controls, formatting marks (bidi overrides, zero-width), lone surrogates, line and paragraph separators: what can
# move a cursor, colour a terminal or make one name look like another.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sep(?:t(?:ember)?)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
)
_CLOCK = r"\d{1,3}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:\s?[ap]m?)?"
_DAY = (
    r"\d{1,4}[-/.]\d{1,2}(?:[-/.]\d{0,4})?",  # 2/3, 1-2, 2020-01-02, 1.10.2, 3.4.
    rf"(?:\d{{1,4}}[-/. ]?)?{_MONTH}\.?(?:[-/., ]*\d{{1,4}}){{1,2}}",  # MAR1, dec-5, 1 Jan 2020
    rf"\d{{1,4}}[-/. ]?{_MONTH}\.?",  # 1mar, 2020-jan
)
_DATE = re.compile(rf"(?:(?:{'|'.join(_DAY)})(?:[T ]+{_CLOCK}Z?)?|{_CLOCK}|\d+ +\d+/\d+)", re.IGNORECASE)


def finite(value: float | None) -> float | None:
    """Return the value as a plain float, and None for NaN and infinity, which no file may hold."""
    return None if value is None or not math.isfinite(value) else float(value)


def number_text(value: float) -> str:
    """Return the shortest decimal that reads back as the same float."""
    return repr(float(value))


def shape_text(shape: Sequence[int]) -> str:
    """Return ``64x3x7x7`` for (64, 3, 7, 7) and ``scalar`` for ()."""
    return "x".join(str(size) for size in shape) or "scalar"


def visible(text: str, *, keep: str = "") -> str:
    r"""Return text with every invisible or control character spelled out (``\x1b``, ``\n``, ``\u202e``).

    Args:
        text: Anything, e.g. a tensor name from a file.
        keep: Characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        char
        if char in keep or unicodedata.category(char) not in _HIDDEN
        else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def needs_guard(text: str) -> bool:
    """Return whether a spreadsheet would take this text for a formula, a number or a date.

    Example:
        >>> [text for text in ("1.10", "2/3", "=1+1", "dec1", "1.10.weight") if needs_guard(text)]
        ['1.10', '2/3', '=1+1', 'dec1']
    """
    if text.startswith(_FORMULA):
        return True
    bare = text.strip()
    return _is_number(bare) or _DATE.fullmatch(bare) is not None


def _is_number(text: str) -> bool:
    # Spreadsheets also read 1,000 · 5% · $5 · (5) as numbers.
    plain = text.strip("$€£¥%() \u00a0").replace(",", "").replace("\u00a0", "")
    try:
        float(plain)
    except ValueError:
        return False
    return True
