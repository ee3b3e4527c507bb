"""What a command hands to the writers: its tables and its JSON, nothing formatted yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from spectool.errors import UsageError
from spectool.report.document import document_head, row_record
from spectool.report.layers import TIDY_COLUMNS, layer_columns, layers_table, run_table, tidy_table
from spectool.report.row import Report
from spectool.report.table import Column, Table, find_column

# Markdown is read by people: the columns that fit a pull request. `--columns` asks for others.
_BRIEF = (
    "layer",
    "kind",
    "weight_shape",
    "input_shape",
    "sigma_1",
    "sigma_1_lower",
    "sigma_1_upper",
    "upper_kind",
    "multiplicity",
    "converged",
    "stable_rank",
    "assumed",
    "status",
    "note",
)


@dataclass(frozen=True)
class WriteOptions:
    """How a result is laid out.

    Attributes:
        columns: Columns to keep, in that order; empty for all.
        sort: Column to sort by, descending with a leading ``-``; empty for the order of the graph.
        tidy: Whether to give one row per (layer, index) instead of one per layer.
        guard: Whether a text cell of a CSV that a spreadsheet would take for a formula, number or date is
            guarded by a leading ``'``.
    """

    columns: tuple[str, ...] = ()
    sort: str = ""
    tidy: bool = False
    guard: bool = True


@dataclass(frozen=True)
class Layout:
    """A result as tables and as JSON.

    Attributes:
        table: The main table, for csv, tsv and md.
        sheets: Name → table, for workbooks.
        head: JSON members before the list of records.
        records: Entries of the JSON list.
        member: Name of the JSON list.
        brief: Columns that Markdown shows unless it is asked for others.
        scale: Column of the first sheet that a workbook colours by value.
        active: Place of the sheet a workbook opens at.
        columns: Columns asked for; empty for all.
    """

    table: Table
    sheets: Mapping[str, Table]
    head: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    member: str = "rows"
    brief: tuple[str, ...] = ()
    scale: str = ""
    active: int = 0
    columns: tuple[str, ...] = ()


def report_layout(report: Report, options: WriteOptions) -> Layout:
    """Return a report's tables and JSON as asked for.

    Raises:
        UsageError: If a column is asked for that there is not.
    """
    if options.sort and not options.tidy:
        report = sorted_report(report, options.sort)
    layers, tidy = layers_table(report), tidy_table(report)
    if options.sort and options.tidy:
        tidy = tidy.take(tidy.order(options.sort))
    chosen = tidy if options.tidy else layers
    picked = chosen.pick(options.columns) if options.columns else chosen
    first, second = (layers, picked) if options.tidy else (picked, tidy)
    records = (
        tuple(dict(zip(tidy.names, row, strict=True)) for row in tidy.rows)
        if options.tidy
        else tuple(row_record(row) for row in report.rows)
    )
    return Layout(
        table=picked,
        sheets={"layers": first, "spectrum": second, "run": run_table(report)},
        head=document_head(report),
        records=records,
        member="spectrum" if options.tidy else "rows",
        brief=() if options.tidy else _BRIEF,
        scale="sigma_1",
        active=1 if options.tidy else 0,
        columns=options.columns,
    )


def sorted_report(report: Report, sort: str) -> Report:
    """Return the report with its rows sorted by a column of the CSV, downward with a leading ``-``.

    Raises:
        UsageError: If there is no such column.
    """
    return replace(report, rows=tuple(report.rows[place] for place in layers_table(report).order(sort)))


def check_options(options: WriteOptions, format: str, k: int) -> None:
    """Refuse columns and sorts that a report of k values per row will not have, before anything is computed.

    Raises:
        UsageError: If a column is unknown, or the format keeps every member.
    """
    columns = TIDY_COLUMNS if options.tidy else layer_columns(k)
    check_columns(columns, options, format)


def check_columns(columns: tuple[Column, ...], options: WriteOptions, format: str) -> None:
    """Refuse columns and sorts that are not among ``columns``.

    Raises:
        UsageError: If a column is unknown, or the format keeps every member.
    """
    for name in (*options.columns, *([options.sort.removeprefix("-")] if options.sort else [])):
        find_column(columns, name)
    if options.columns and format in ("json", "jsonl"):
        raise UsageError(
            f"--columns does not apply to {format}: its members are fixed by a schema",
            hint="use csv, tsv, md, xlsx or the terminal table, or filter with jq",
        )


def without_columns(layout: Layout) -> Layout:
    """Return the layout with Markdown's brief columns, unless others were asked for."""
    if layout.columns or not layout.brief:
        return layout
    return replace(layout, table=layout.table.pick(layout.brief))
