"""A report as a pandas data frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectool.report.layers import layers_table
from spectool.report.row import Report
from spectool.report.table import Table

if TYPE_CHECKING:
    import pandas as pd

_TYPES = {"text": "string", "shape": "string", "integer": "Int64", "number": "float64", "flag": "boolean"}


def to_frame(report: Report) -> pd.DataFrame:
    """Return one row per operator with the CSV's columns, typed; unknown is missing.

    Args:
        report: Any report.
    """
    return table_frame(layers_table(report))


def table_frame(table: Table) -> pd.DataFrame:
    """Return a table as a data frame, typed; unknown is missing."""
    import pandas as pd  # a second to import, and only library users need it

    cells = zip(*table.rows, strict=True) if table.rows else [() for _ in table.columns]
    return pd.DataFrame(
        {
            column.name: pd.Series(list(values), dtype=_TYPES[column.kind])
            for column, values in zip(table.columns, cells, strict=True)
        }
    )
