"""Write a result in any format, whole or not at all."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO

from spectool.errors import UsageError
from spectool.report.delimited import csv_bytes, tsv_bytes
from spectool.report.files import replace_file
from spectool.report.jsontext import json_bytes, jsonl_bytes
from spectool.report.layout import Layout, WriteOptions, report_layout, without_columns
from spectool.report.markdown import markdown_bytes
from spectool.report.row import Report
from spectool.report.workbook import workbook_bytes


@dataclass(frozen=True)
class Rendered:
    """A result in one format.

    Attributes:
        data: The bytes of the file.
        guarded: How many text cells were guarded against spreadsheets.
    """

    data: bytes
    guarded: int = 0


Writer = Callable[[Layout, WriteOptions], Rendered]

# A new output format is one function and one entry here; its name is also its suffix.
FORMATS: dict[str, Writer] = {
    "csv": lambda layout, options: Rendered(*csv_bytes(layout.table, guard=options.guard)),
    "tsv": lambda layout, options: Rendered(tsv_bytes(layout.table)),
    "json": lambda layout, options: Rendered(json_bytes(layout)),
    "jsonl": lambda layout, options: Rendered(jsonl_bytes(layout)),
    "md": lambda layout, options: Rendered(markdown_bytes(without_columns(layout).table)),
    "xlsx": lambda layout, options: Rendered(workbook_bytes(layout)),
}
_DEFAULTS = WriteOptions()


def write(
    report: Report, format: str, target: str | Path | BinaryIO, *, options: WriteOptions = _DEFAULTS
) -> int:
    """Write a report to a file, atomically, or to a binary stream.

    Args:
        report: Any report.
        format: A key of ``FORMATS``.
        target: A path or an open binary stream.
        options: Columns, order, tidiness, guarding.

    Returns:
        How many text cells were guarded (CSV only).

    Raises:
        UsageError: If there is no such format or column.
        OutputError: If the file cannot be written; what stood there before still does.
    """
    return write_layout(report_layout(report, options), format, target, options=options)


def write_layout(
    layout: Layout, format: str, target: str | Path | BinaryIO, *, options: WriteOptions = _DEFAULTS
) -> int:
    """Write any result; as ``write``."""
    rendered = render(layout, format, options)
    if isinstance(target, (str, PurePath)):
        replace_file(Path(target), rendered.data)
    else:
        target.write(rendered.data)
        target.flush()
    return rendered.guarded


def render(layout: Layout, format: str, options: WriteOptions = _DEFAULTS) -> Rendered:
    """Return a result in one format.

    Raises:
        UsageError: If there is no such format.
    """
    if format not in FORMATS:
        raise UsageError(f"there is no format called {format!r}", hint=f"formats: {', '.join(FORMATS)}")
    return FORMATS[format](layout, options)


def format_of(path: str | Path) -> str:
    """Return the format that a file's suffix asks for.

    Raises:
        UsageError: If the suffix is none of them.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix in FORMATS:
        return suffix
    found = f"suffix .{suffix}" if suffix else "a name without a suffix"
    near = difflib.get_close_matches(suffix, FORMATS, n=1)
    guess = f"did you mean .{near[0]}? " if near else ""
    raise UsageError(
        f"cannot tell the format of {path} from {found}",
        hint=f"{guess}known: {', '.join(f'.{name}' for name in FORMATS)}; or give --format",
    )
