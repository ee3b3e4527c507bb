"""The verdicts of ``check`` as tables and as the JSON document."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spectool.report.check import CheckReport, CheckRow
from spectool.report.document import document_head, row_record
from spectool.report.frame import table_frame
from spectool.report.layers import LAYER_COLUMNS, layers_table, run_table
from spectool.report.layout import Layout, WriteOptions
from spectool.report.table import Cell, Column, Table
from spectool.report.text import finite

if TYPE_CHECKING:
    import pandas as pd

# Behind those of `inspect -k 1`; new ones only ever at the end.
VERDICT_COLUMNS = (
    Column("limit", "number"),
    Column("slack", "number"),
    Column("verdict"),
    Column("reason"),
    Column("baseline_lower", "number"),
    Column("baseline_upper", "number"),
    Column("baseline_verdict"),
)
CHECK_COLUMNS = LAYER_COLUMNS + VERDICT_COLUMNS
_BRIEF = (
    "layer",
    "kind",
    "input_shape",
    "sigma_1_lower",
    "sigma_1_upper",
    "upper_kind",
    "limit",
    "verdict",
    "reason",
)


def check_table(report: CheckReport) -> Table:
    """Return one row per operator: the columns of ``inspect -k 1``, then the verdict's."""
    layers = layers_table(replace(report.report, rows=tuple(row.row for row in report.rows)))
    cells = ((*known, *_cells(row)) for known, row in zip(layers.rows, report.rows, strict=True))
    return Table(layers.columns + VERDICT_COLUMNS, tuple(cells))


def check_layout(report: CheckReport, options: WriteOptions) -> Layout:
    """Return a check's tables and JSON as asked for.

    Raises:
        UsageError: If a column is asked for that there is not.
    """
    report = sorted_check(report, options.sort)
    table = check_table(report)
    picked = table.pick(options.columns) if options.columns else table
    facts = run_table(report.report)
    verdicts = tuple((f"verdict.{name}", count) for name, count in report.counts.items())
    run = Table(facts.columns, (("verdict", report.verdict), *verdicts, *facts.rows))
    document = check_document(report)
    return Layout(
        table=picked,
        sheets={"check": picked, "run": run},
        head={name: value for name, value in document.items() if name != "rows"},
        records=tuple(document["rows"]),
        brief=_BRIEF,
        scale="sigma_1",
        columns=options.columns,
    )


def sorted_check(report: CheckReport, sort: str) -> CheckReport:
    """Return the report with its rows sorted by a column, downward with a leading ``-``; as it is for an empty text.

    Raises:
        UsageError: If there is no such column.
    """
    if not sort:
        return report
    return replace(report, rows=tuple(report.rows[place] for place in check_table(report).order(sort)))


def check_document(report: CheckReport) -> dict[str, Any]:
    """Return the document of schema 1 (``docs/schema/check.schema.json``)."""
    baseline = report.baseline
    return {
        **document_head(report.report),
        "verdict": report.verdict,
        "counts": dict(report.counts),
        "baseline": None
        if baseline is None
        else {
            "path": baseline.path,
            "tolerance": baseline.tolerance,
            "vanished": list(baseline.vanished),
        },
        "rows": [check_record(row) for row in report.rows],
    }


def check_record(row: CheckRow) -> dict[str, Any]:
    """Return one entry of ``rows``: that of ``inspect``, then the verdict."""
    entry = row.baseline
    return {
        **row_record(row.row),
        "limit": row.limit,
        "slack": row.slack,
        "verdict": row.verdict,
        "baseline": None
        if entry is None
        else {"lower": finite(entry.lower), "upper": finite(entry.upper), "verdict": entry.verdict},
        "reason": row.reason,
    }


def check_frame(report: CheckReport) -> pd.DataFrame:
    """Return one row per operator with the CSV's columns, typed; unknown is missing."""
    return table_frame(check_table(report))


def _cells(row: CheckRow) -> tuple[Cell, ...]:
    entry = row.baseline
    return (
        row.limit,
        row.slack,
        row.verdict,
        row.reason or None,
        None if entry is None else finite(entry.lower),
        None if entry is None else finite(entry.upper),
        None if entry is None else entry.verdict,
    )
