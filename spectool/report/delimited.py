"""CSV for spreadsheets and TSV for pipes, every digit kept."""

from __future__ import annotations

import csv
import io

from spectool.report.table import Cell, Column, Table
from spectool.report.text import needs_guard, number_text, visible


def csv_bytes(table: Table, *, guard: bool = True) -> tuple[bytes, int]:
    """Return a table as RFC 4180: comma, CRLF, UTF-8 without BOM, floats by ``repr``, unknown empty.

    Control characters other than tab, CR and LF, which RFC 4180 has no place for, are spelled out.

    Args:
        table: Any table.
        guard: Whether to guard text cells that a spreadsheet would take for a formula, number or date.

    Returns:
        The bytes, and how many cells were guarded. Numbers and shapes are never touched.
    """
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow(table.names)
    guarded = 0
    for row in table.rows:
        cells = []
        for column, cell in zip(table.columns, row, strict=True):
            text = visible(cell_text(cell), keep="\t\r\n")
            if guard and column.kind == "text" and needs_guard(text):
                text, guarded = f"'{text}", guarded + 1
            cells.append(text)
        writer.writerow(cells)
    return stream.getvalue().encode(), guarded


def tsv_bytes(table: Table) -> bytes:
    r"""Return a table as lines of tab-separated cells; ``\t``, ``\n``, ``\\`` and controls in a cell are escaped."""
    lines = ["\t".join(table.names)]
    lines += ["\t".join(_escaped(column, cell) for column, cell in _pairs(table, row)) for row in table.rows]
    return "".join(f"{line}\n" for line in lines).encode()


def cell_text(cell: Cell) -> str:
    """Return a cell in full precision: floats by ``repr``, ``true`` and ``false``, unknown empty."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return number_text(cell) if isinstance(cell, float) else str(cell)


def _pairs(table: Table, row: tuple[Cell, ...]) -> list[tuple[Column, Cell]]:
    return list(zip(table.columns, row, strict=True))


def _escaped(column: Column, cell: Cell) -> str:
    text = cell_text(cell)
    return visible(text.replace("\\", "\\\\")) if column.kind == "text" else text
