"""Rows and reports as data, and one writer per output format."""

from __future__ import annotations

from spectool.report.check import CheckReport, CheckRow
from spectool.report.check_files import write_check
from spectool.report.clip import ClipReport, ClipRow
from spectool.report.clip_tables import write_clip
from spectool.report.document import to_document
from spectool.report.frame import to_frame
from spectool.report.layout import Layout, WriteOptions, report_layout
from spectool.report.listing import listing_layout
from spectool.report.row import Report, Row
from spectool.report.writers import FORMATS, format_of, write, write_layout

__all__ = [
    "FORMATS",
    "CheckReport",
    "CheckRow",
    "ClipReport",
    "ClipRow",
    "Layout",
    "Report",
    "Row",
    "WriteOptions",
    "format_of",
    "listing_layout",
    "report_layout",
    "to_document",
    "to_frame",
    "write",
    "write_check",
    "write_clip",
    "write_layout",
]
