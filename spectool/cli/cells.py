"""Any table of cells on a terminal: `spectool ls`, `--tidy` and `--columns`."""

from __future__ import annotations

from rich.table import Table as RichTable
from rich.text import Text

from spectool.cli.grid import GridColumn, fit
from spectool.cli.numbers import significant
from spectool.report.table import Cell, Column, Table
from spectool.report.text import visible


def cells_grid(table: Table, width: int | None) -> tuple[RichTable, list[str]]:
    """Return a terminal table, and the headings of the columns that did not fit (the last go first).

    Args:
        table: Any table; its columns are shown in their order.
        width: Cells of the terminal; None for as many as it takes.
    """
    count = len(table.columns)
    columns = []
    for place, column in enumerate(table.columns):
        cells = tuple(_cell(row[place]) for row in table.rows)
        right = column.kind in ("integer", "number")
        columns.append(
            GridColumn(
                column.name,
                cells,
                "right" if right else "left",
                drop=0 if place == 0 else count - place,
                shrink=_may_shrink(column),
            )
        )
    return fit(columns, width)


def _may_shrink(column: Column) -> bool:
    return column.kind == "text"


def _cell(cell: Cell) -> Text:
    if cell is None:
        return Text("")
    if isinstance(cell, bool):
        return Text("yes" if cell else "no")
    return Text(significant(cell) if isinstance(cell, float) else visible(str(cell)))
