"""A report as the JSON document of schema 1: plain data, unknown is None."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from spectool.report.row import Report, Row, Shape
from spectool.report.text import finite

SCHEMA = 1


def to_document(report: Report) -> dict[str, Any]:
    """Return the document of schema 1 (``docs/schema/inspect.schema.json``).

    Args:
        report: Any report; NaN and infinities become None.
    """
    return {**document_head(report), "rows": [row_record(row) for row in report.rows]}


def document_head(report: Report) -> dict[str, Any]:
    """Return everything of the document but its rows."""
    return {
        "schema": SCHEMA,
        "spectool": report.version,
        "file": {"path": report.path, "format": report.format, "sha256": report.sha256},
        "settings": {name: plain(value) for name, value in report.settings.items()},
    }


def row_record(row: Row) -> dict[str, Any]:
    """Return one entry of ``rows``."""
    return {
        "layer": row.layer,
        "level": row.level,
        "kind": row.kind,
        "weights": list(row.weights),
        "weight_shape": plain(row.weight_shape),
        "input_shape": _shape(row.input_shape),
        "output_shape": _shape(row.output_shape),
        "sigma": [finite(value) for value in row.sigma],
        "sigma_lower": [finite(value) for value in row.sigma_lower],
        "sigma_upper": [finite(value) for value in row.sigma_upper],
        "lower": finite(row.lower),
        "upper": finite(row.upper),
        "upper_kind": row.upper_kind,
        "residual": finite(row.residual),
        "multiplicity": row.multiplicity,
        "multiplicity_exact": row.multiplicity_exact,
        "converged": row.converged,
        "fro": finite(row.fro),
        "stable_rank": finite(row.stable_rank),
        "method": row.method,
        "matvecs": row.matvecs,
        "seconds": finite(row.seconds),
        "assumed": list(row.assumed),
        "status": row.status,
        "note": row.note,
    }


def plain(value: Any) -> Any:
    """Return a value as JSON knows it: tuples as lists, paths as text, NaN and infinities as None."""
    if isinstance(value, float):
        return finite(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, PurePath):
        return str(value)
    return str(value)


def _shape(shape: Shape | None) -> list[int] | None:
    return None if shape is None else list(shape)
