"""Write the verdicts of ``check`` in any format."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import BinaryIO

from spectool.errors import UsageError
from spectool.report.check import CheckReport
from spectool.report.check_ci import CHECK_FORMATS
from spectool.report.check_tables import check_layout
from spectool.report.files import replace_file
from spectool.report.layout import WriteOptions
from spectool.report.writers import FORMATS, write_layout

_DEFAULTS = WriteOptions()


def write_check(
    report: CheckReport, format: str, target: str | Path | BinaryIO, *, options: WriteOptions = _DEFAULTS
) -> None:
    """Write a check to a file, atomically, or to a binary stream.

    Args:
        report: From ``spectool.check``.
        format: A key of ``FORMATS`` or of ``CHECK_FORMATS``.
        target: A path or an open binary stream.
        options: Columns, order, guarding; they do not apply to ``CHECK_FORMATS``.

    Raises:
        UsageError: If there is no such format or column.
        OutputError: If the file cannot be written; what stood there before still does.
    """
    if format in FORMATS:
        write_layout(check_layout(report, options), format, target, options=options)
        return
    if format not in CHECK_FORMATS:
        raise UsageError(
            f"there is no format called {format!r}", hint=f"formats: {', '.join((*FORMATS, *CHECK_FORMATS))}"
        )
    data = CHECK_FORMATS[format](report)
    if isinstance(target, (str, PurePath)):
        replace_file(Path(target), data)
    else:
        target.write(data)
        target.flush()
