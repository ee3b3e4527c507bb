"""The tables of a report: one row per layer, one row per singular value, and how the run was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spectool.report.row import Report, Row, Shape
from spectool.report.table import Cell, Column, Table
from spectool.report.text import finite, shape_text

# The order is a contract: new columns only ever at the end (behind sigma_k).
LAYER_COLUMNS = (
    Column("layer"),
    Column("level"),
    Column("kind"),
    Column("weights"),
    Column("weight_shape", "shape"),
    Column("input_shape", "shape"),
    Column("output_shape", "shape"),
    Column("sigma_1", "number"),
    Column("sigma_1_lower", "number"),
    Column("sigma_1_upper", "number"),
    Column("upper_kind"),
    Column("residual", "number"),
    Column("multiplicity", "integer"),
    Column("converged", "flag"),
    Column("fro", "number"),
    Column("stable_rank", "number"),
    Column("method"),
    Column("matvecs", "integer"),
    Column("seconds", "number"),
    Column("assumed"),
    Column("status"),
    Column("note"),
)
TIDY_COLUMNS = (
    Column("layer"),
    Column("level"),
    Column("index", "integer"),
    Column("sigma", "number"),
    Column("lower", "number"),
    Column("upper", "number"),
    Column("residual", "number"),
)


def layer_columns(k: int) -> tuple[Column, ...]:
    """Return the columns of a report with k singular values per row."""
    return LAYER_COLUMNS + tuple(Column(f"sigma_{index}", "number") for index in range(2, k + 1))


def layers_table(report: Report) -> Table:
    """Return one row per layer and composition, the columns of the CSV contract."""
    longest = max((len(row.sigma) for row in report.rows), default=0)
    columns = layer_columns(max(int(report.settings.get("k") or 1), longest))
    width = len(columns) - len(LAYER_COLUMNS)
    return Table(columns, tuple(_layer_cells(row, width) for row in report.rows))


def tidy_table(report: Report) -> Table:
    """Return one row per (layer, index); the residual stands beside index 1, the only one a row keeps."""
    rows: list[tuple[Cell, ...]] = []
    for row in report.rows:
        for place, sigma in enumerate(row.sigma):
            lower = row.sigma_lower[place] if place < len(row.sigma_lower) else None
            upper = row.sigma_upper[place] if place < len(row.sigma_upper) else None
            residual = row.residual if place == 0 else None
            numbers = (finite(sigma), finite(lower), finite(upper), finite(residual))
            rows.append((row.layer, row.level, place + 1, *numbers))
    return Table(TIDY_COLUMNS, tuple(rows))


def run_table(report: Report) -> Table:
    """Return what made the report, one fact per row."""
    analysed, total, skipped = report.coverage
    facts: list[tuple[str, Any]] = [
        ("file", report.path),
        ("format", report.format),
        ("sha256", report.sha256),
        ("spectool", report.version),
        ("linear_maps", total),
        ("analysed", analysed),
        ("skipped", skipped),
        *((f"settings.{name}", value) for name, value in report.settings.items()),
        *(("note", note) for note in report.notes),
    ]
    rows = tuple((name, _plain(value)) for name, value in facts)
    return Table((Column("name"), Column("value")), rows)


def shape_cell(row: Row, shape: Shape | None) -> str | None:
    """Return a shape as text; ``any`` where the operator stands for every size, None where it is unknown."""
    if shape is not None:
        return shape_text(shape)
    return "any" if row.status == "ok" else None


def weight_shapes(row: Row) -> tuple[Shape, ...]:
    """Return the shapes of a row's weights as a tuple of shapes, composed or not."""
    shapes = row.weight_shape
    if shapes and isinstance(shapes[0], tuple):
        return tuple(shape for shape in shapes if isinstance(shape, tuple))
    return (tuple(size for size in shapes if isinstance(size, int)),) if shapes else ()


def _layer_cells(row: Row, extra: int) -> tuple[Cell, ...]:
    return (
        row.layer,
        row.level,
        row.kind,
        _joined(row.weights),
        _joined([shape_text(shape) for shape in weight_shapes(row)]),
        shape_cell(row, row.input_shape),
        shape_cell(row, row.output_shape),
        finite(row.sigma[0]) if row.sigma else None,
        finite(row.lower),
        finite(row.upper),
        row.upper_kind,
        finite(row.residual),
        row.multiplicity,
        row.converged,
        finite(row.fro),
        finite(row.stable_rank),
        row.method,
        row.matvecs,
        finite(row.seconds),
        _joined(row.assumed),
        row.status,
        row.note or None,
        *(finite(row.sigma[index]) if index < len(row.sigma) else None for index in range(1, extra + 1)),
    )


def _joined(parts: Sequence[str]) -> str | None:
    return ";".join(parts) or None


def _plain(value: Any) -> Cell:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, dict):
        return ";".join(f"{name}={_plain(entry)}" for name, entry in value.items()) or None
    if isinstance(value, (list, tuple)):
        return ";".join(str(_plain(entry)) for entry in value) or None
    return str(value)
