"""Any table of cells on a terminal: `spectool ls`, `--tidy` and `--columns`."""

from __future__ import annotations

from rich.table import Table as RichTable
from rich.text import Text

from spectool.cli.grid import GridColumn, fit
from spectool.cli.numbers import rounded_down, rounded_up, significant
from spectool.report.table import Cell, Table
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
        cells = tuple(_cell(column.name, row[place]) for row in table.rows)
        right = column.kind in ("integer", "number")
        columns.append(
            GridColumn(
                column.name,
                cells,
                "right" if right else "left",
                drop=0 if place == 0 else count - place,
                shrink=column.kind == "text",
            )
        )
    return fit(columns, width)


def _cell(name: str, cell: Cell) -> Text:
    if cell is None:
        return Text("")
    if isinstance(cell, bool):
        return Text("yes" if cell else "no")
    if not isinstance(cell, float):
        return Text(visible(str(cell)))
    if name.endswith("lower"):
        return Text(rounded_down(cell))
    return Text(rounded_up(cell) if name.endswith("upper") else significant(cell))
