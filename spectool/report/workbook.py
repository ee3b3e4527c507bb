"""Excel workbooks with typed cells."""

from __future__ import annotations

import io
from typing import Any

from spectool.errors import OutputError
from spectool.report.layout import Layout
from spectool.report.table import Cell, Table
from spectool.report.text import number_text, visible

_MOST_ROWS = 1_048_576
_LONGEST_TEXT = 32_767
# Everything stays what it is: a name is text even if it looks like a formula, a link or a number.
_INERT = {
    "in_memory": True,
    "strings_to_formulas": False,
    "strings_to_urls": False,
    "strings_to_numbers": False,
}


class _Exact(float):
    """A float that XlsxWriter, which asks for 16 digits, writes with all it has."""

    def __format__(self, spec: str) -> str:
        return number_text(self)


def workbook_bytes(layout: Layout) -> bytes:
    """Return a workbook: numbers as numbers, frozen header, filters, a colour scale, one sheet per table.

    Raises:
        OutputError: If a table has more rows than a sheet can hold.
    """
    import xlsxwriter

    stream = io.BytesIO()
    with xlsxwriter.Workbook(stream, _INERT) as book:
        bold = book.add_format({"bold": True, "bottom": 1})
        for place, (name, table) in enumerate(layout.sheets.items()):
            sheet = book.add_worksheet(name)
            _fill(sheet, name, table, bold)
            if place == layout.active:
                sheet.activate()
            if place == 0 and layout.scale in table.names and table.rows:
                column = table.names.index(layout.scale)
                scale = {"type": "2_color_scale", "min_color": "#FFFFFF", "max_color": "#F4A582"}
                sheet.conditional_format(1, column, len(table.rows), column, scale)
    return stream.getvalue()


def _fill(sheet: Any, name: str, table: Table, bold: Any) -> None:
    if len(table.rows) >= _MOST_ROWS:
        raise OutputError(
            f"sheet {name!r} would have {len(table.rows)} rows, and Excel holds {_MOST_ROWS - 1}",
            hint="write csv, or lower --top-k",
        )
    for place, header in enumerate(table.names):
        sheet.write_string(0, place, header, bold)
    for line, row in enumerate(table.rows, start=1):
        for place, cell in enumerate(row):
            _write(sheet, line, place, cell)
    sheet.freeze_panes(1, 1)
    sheet.autofilter(0, 0, max(len(table.rows), 1), len(table.columns) - 1)
    sheet.autofit(300)
    # A key such as 1.10 is text on purpose: no green triangles.
    sheet.ignore_errors({"number_stored_as_text": f"A1:XFD{len(table.rows) + 1}"})


def _write(sheet: Any, line: int, place: int, cell: Cell) -> None:
    if cell is None:
        return
    if isinstance(cell, bool):
        sheet.write_boolean(line, place, cell)
    elif isinstance(cell, (int, float)):
        sheet.write_number(line, place, _Exact(cell) if isinstance(cell, float) else cell)
    else:
        text = visible(str(cell))
        sheet.write_string(
            line, place, text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
        )
