"""What ``clip`` did, as tables and as the JSON document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from spectool.report.clip import ClipReport, ClipRow, Enclosed
from spectool.report.document import document_head, plain, row_record
from spectool.report.frame import table_frame
from spectool.report.layers import layer_columns, layers_table, run_table
from spectool.report.layout import Layout, WriteOptions
from spectool.report.table import Cell, Column, Table
from spectool.report.text import finite
from spectool.report.writers import write_layout

if TYPE_CHECKING:
    import pandas as pd

# Behind those of `inspect`, which show the operator as written; new ones only ever at the end.
CLIP_COLUMNS = (
    Column("limit", "number"),
    Column("action"),
    Column("sigma_1_before", "number"),
    Column("sigma_1_before_lower", "number"),
    Column("sigma_1_before_upper", "number"),
    Column("proven", "number"),
    Column("metric"),
    Column("change", "number"),
    Column("change_lower_bound", "number"),
    Column("change_scaling", "number"),
    Column("raw_change", "number"),
    Column("below_limit_disturbed", "number"),
    Column("recentered"),
    Column("iterations", "integer"),
    Column("solver"),
    Column("reason"),
)
_BRIEF = (
    "layer",
    "kind",
    "limit",
    "action",
    "sigma_1_before",
    "sigma_1",
    "proven",
    "metric",
    "change",
    "change_lower_bound",
    "change_scaling",
    "reason",
)
_DEFAULTS = WriteOptions()


def clip_columns(k: int) -> tuple[Column, ...]:
    """Return the columns of a clip that reports k singular values per row."""
    return layer_columns(k) + CLIP_COLUMNS


def clip_table(report: ClipReport) -> Table:
    """Return one row per operator: the columns of ``inspect`` (as written), then what became of it."""
    layers = layers_table(replace(report.report, rows=tuple(row.row for row in report.rows)))
    cells = ((*known, *_cells(row)) for known, row in zip(layers.rows, report.rows, strict=True))
    return Table(layers.columns + CLIP_COLUMNS, tuple(cells))


def clip_layout(report: ClipReport, options: WriteOptions) -> Layout:
    """Return a clip's tables and JSON as asked for.

    Raises:
        UsageError: If a column is asked for that there is not.
    """
    report = sorted_clip(report, options.sort)
    table = clip_table(report)
    picked = table.pick(options.columns) if options.columns else table
    facts = run_table(report.report)
    made: list[tuple[Cell, ...]] = [("source", report.source), ("output", report.output)]
    made += [("tensors", report.tensors)]
    made += [(f"action.{name}", count) for name, count in report.counts.items()]
    made += [("changed", name) for name in report.changed]
    made += [(f"adjusted.{name}", finite(move)) for name, move in report.adjusted.items()]
    document = clip_document(report)
    return Layout(
        table=picked,
        sheets={"clip": picked, "run": Table(facts.columns, (*made, *facts.rows))},
        head={name: value for name, value in document.items() if name != "rows"},
        records=tuple(document["rows"]),
        brief=_BRIEF,
        scale="sigma_1",
        columns=options.columns,
    )


def sorted_clip(report: ClipReport, sort: str) -> ClipReport:
    """Return the report with its rows sorted by a column, downward with a leading ``-``; as it is for an empty text.

    Raises:
        UsageError: If there is no such column.
    """
    if not sort:
        return report
    return replace(report, rows=tuple(report.rows[place] for place in clip_table(report).order(sort)))


def clip_document(report: ClipReport) -> dict[str, Any]:
    """Return the document of schema 1 (``docs/schema/clip.schema.json``)."""
    return {
        **document_head(report.report),
        "source": report.source,
        "output": report.output,
        "tensors": report.tensors,
        "changed": list(report.changed),
        "adjusted": plain(report.adjusted),
        "counts": dict(report.counts),
        "rows": [clip_record(row) for row in report.rows],
    }


def clip_record(row: ClipRow) -> dict[str, Any]:
    """Return one entry of ``rows``: that of ``inspect`` as written, then what became of it."""
    after = row.after
    return {
        **row_record(row.row),
        "limit": row.limit,
        "action": row.action,
        "before": _enclosed(row.before),
        "after": None if after is None else {**(_enclosed(after) or {}), "proven": finite(after.proven)},
        "metric": row.metric,
        "change": finite(row.change),
        "change_lower_bound": finite(row.change_lower_bound),
        "change_scaling": finite(row.change_scaling),
        "raw_change": finite(row.raw_change),
        "below_limit_disturbed": finite(row.below_limit_disturbed),
        "recentered": list(row.recentered),
        "iterations": row.iterations,
        "solver": row.solver,
        "reason": row.reason,
    }


def clip_frame(report: ClipReport) -> pd.DataFrame:
    """Return one row per operator with the CSV's columns, typed; unknown is missing."""
    return table_frame(clip_table(report))


def write_clip(
    report: ClipReport, format: str, target: str | Path | BinaryIO, *, options: WriteOptions = _DEFAULTS
) -> int:
    """Write the result of a clip (not the checkpoint) to a file, atomically, or to a binary stream.

    Args:
        report: From ``spectool.clip``.
        format: A key of ``FORMATS``.
        target: A path or an open binary stream.
        options: Columns, order, guarding.

    Returns:
        How many text cells were guarded (CSV only).

    Raises:
        UsageError: If there is no such format or column.
        OutputError: If the file cannot be written; what stood there before still does.
    """
    return write_layout(clip_layout(report, options), format, target, options=options)


def _enclosed(value: Enclosed | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"sigma": finite(value.sigma), "lower": finite(value.lower), "upper": finite(value.upper)}


def _cells(row: ClipRow) -> tuple[Cell, ...]:
    before = row.before or Enclosed(None, None, None)
    return (
        row.limit,
        row.action,
        finite(before.sigma),
        finite(before.lower),
        finite(before.upper),
        None if row.after is None else finite(row.after.proven),
        row.metric,
        finite(row.change),
        finite(row.change_lower_bound),
        finite(row.change_scaling),
        finite(row.raw_change),
        finite(row.below_limit_disturbed),
        ";".join(row.recentered) or None,
        row.iterations,
        row.solver or None,
        row.reason or None,
    )
