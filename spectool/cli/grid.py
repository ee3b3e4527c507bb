"""Lay out columns for a terminal: what does not fit is dropped in a fixed order, and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table as RichTable
from rich.text import Text

GAP = 2
_COMFORTABLE = 16
_NARROWEST = 8


@dataclass(frozen=True)
class GridColumn:
    """One column of a terminal table.

    Attributes:
        header: Its heading.
        cells: One per row.
        justify: Numbers stand to the right.
        drop: Columns with the smallest number go first when the terminal is narrow; 0 stays.
        shrink: Whether long cells may lose their middle.
    """

    header: str
    cells: tuple[Text, ...]
    justify: Literal["left", "right"] = "left"
    drop: int = 0
    shrink: bool = False

    @property
    def width(self) -> int:
        """Width at which nothing is lost."""
        return max([cell_len(self.header), *(cell.cell_len for cell in self.cells)])

    def crop(self, width: int) -> GridColumn:
        """Return the column with the middle of longer cells left out."""
        return replace(self, cells=tuple(crop_middle(cell, width) for cell in self.cells))


def fit(columns: Sequence[GridColumn], width: int | None) -> tuple[RichTable, list[str]]:
    """Return a table of at most ``width`` cells, and the headings of the columns that had to go.

    Columns that may shrink give way to three tenths of the terminal before anything is dropped, and further only when
    nothing is left to drop.

    Args:
        columns: In display order.
        width: Cells of the terminal; None for as many as it takes.
    """
    kept = list(columns)
    hidden: list[str] = []
    if width is not None:
        comfortable = max(_COMFORTABLE, width * 3 // 10)
        while _total(kept, comfortable) > width and any(column.drop for column in kept):
            first = min((column for column in kept if column.drop), key=lambda column: column.drop)
            kept.remove(first)
            hidden.append(first.header)
        kept = _shrink(kept, width)
    return _table(kept), hidden


def crop_middle(text: Text, width: int) -> Text:
    """Return text with its middle replaced by ``…`` where it is wider than ``width``; names differ at their ends."""
    if text.cell_len <= width:
        return text
    plain, style = text.plain, text.style
    tail = (width - 1) * 2 // 3
    head = width - 1 - tail
    return Text(f"{plain[:head]}…{plain[len(plain) - tail :] if tail else ''}", style=style)


def _total(columns: Sequence[GridColumn], comfortable: int | None = None) -> int:
    widths = [
        min(column.width, comfortable) if column.shrink and comfortable else column.width
        for column in columns
    ]
    return sum(widths) + GAP * (len(widths) - 1)


def _shrink(columns: list[GridColumn], width: int) -> list[GridColumn]:
    """Shrink what may shrink, widest first, until everything fits or nothing can give way."""
    shown = {column.header: column.width for column in columns}
    excess = _total(columns) - width
    givers = [column.header for column in columns if column.shrink]
    while excess > 0 and givers:
        widest = max(givers, key=lambda header: shown[header])
        if shown[widest] <= _NARROWEST:
            break
        shown[widest] -= 1
        excess -= 1
    return [
        column.crop(shown[column.header]) if shown[column.header] < column.width else column
        for column in columns
    ]


def _table(columns: Sequence[GridColumn]) -> RichTable:
    # A width of its own: should even the least not fit, lines run over rather than numbers lose their ends.
    table = RichTable(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
        width=_total(columns),
    )
    for column in columns:
        table.add_column(
            Text(column.header), justify=column.justify, no_wrap=True, overflow="ellipsis", width=column.width
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table
