"""Tables in GitHub-flavoured Markdown."""

from __future__ import annotations

import re

from spectool.report.delimited import cell_text
from spectool.report.table import Table
from spectool.report.text import visible

# An underscore inside a word is no emphasis, and layer names are full of them.
_SPECIAL = re.compile(r"[\\|<>*`\[\]~#]|(?<!\w)_|_(?!\w)")


def markdown_bytes(table: Table) -> bytes:
    """Return a table as Markdown, numbers to the right, every digit kept and markup in names escaped."""
    right = [column.kind in ("integer", "number") for column in table.columns]
    lines = [table.names, tuple("---:" if flush else "---" for flush in right)]
    lines += [tuple(escape(cell_text(cell)) for cell in row) for row in table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).encode()


def escape(text: str) -> str:
    r"""Return text that Markdown shows as it stands; controls are spelled out.

    Example:
        >>> print(escape("a|b_c *d*"))
        a\|b_c \*d\*
    """
    return _SPECIAL.sub(r"\\\g<0>", visible(text)).replace("&", "&amp;")
