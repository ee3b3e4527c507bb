"""A table as data: typed columns and unformatted cells; what every tabular writer takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from spectool.errors import UsageError

Cell = str | int | float | bool | None
Kind = Literal["text", "shape", "integer", "number", "flag"]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: ASCII header.
        kind: ``text`` (anything, from a file), ``shape`` (``64x3x7x7``), ``integer``, ``number`` or ``flag``.
    """

    name: str
    kind: Kind = "text"


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells; None is unknown, and no float is NaN or infinite.

    Attributes:
        columns: In display order.
        rows: Cells parallel to ``columns``.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Headers."""
        return tuple(column.name for column in self.columns)

    def pick(self, names: Sequence[str]) -> Table:
        """Return the columns called ``names``, in that order.

        Raises:
            UsageError: If there is no such column.
        """
        places = [find_column(self.columns, name) for name in names]
        return Table(
            tuple(self.columns[place] for place in places),
            tuple(tuple(row[place] for place in places) for row in self.rows),
        )

    def take(self, order: Iterable[int]) -> Table:
        """Return the rows at these places."""
        return Table(self.columns, tuple(self.rows[place] for place in order))

    def order(self, sort: str) -> list[int]:
        """Return the places of the rows sorted by column ``sort`` (descending if it starts with ``-``).

        Equal rows keep their order and unknown cells come last, whichever the direction.

        Raises:
            UsageError: If there is no such column.
        """
        place = find_column(self.columns, sort.removeprefix("-"))
        known = [index for index, row in enumerate(self.rows) if row[place] is not None]
        unknown = [index for index, row in enumerate(self.rows) if row[place] is None]
        # A column holds one type of cell, so its cells compare.
        known.sort(key=lambda index: self.rows[index][place], reverse=sort.startswith("-"))  # type: ignore[arg-type, return-value]
        return known + unknown


def find_column(columns: Sequence[Column], name: str) -> int:
    """Return the place of the column called ``name``.

    Raises:
        UsageError: If there is no such column; the hint names the nearest, or all.
    """
    names = [column.name for column in columns]
    if name in names:
        return names.index(name)
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"columns: {', '.join(names)}"
    raise UsageError(f"there is no column called {name!r}", hint=hint)


def split_columns(text: str) -> tuple[str, ...]:
    """Return the names in ``layer,sigma_1``; empty for an empty text."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
