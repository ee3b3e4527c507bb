"""How `spectool inspect` draws its table and what it says at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectool.cli.messages import say
from spectool.cli.output import TABLE, Target
from spectool.report.layout import WriteOptions, report_layout, sorted_report
from spectool.report.row import Report

if TYPE_CHECKING:
    from rich.console import RenderableType


def draw_report(report: Report, options: WriteOptions, width: int | None) -> tuple[RenderableType, list[str]]:
    """Draw a report for a terminal: the designed table, or exactly the columns that were asked for."""
    from spectool.cli.cells import cells_grid
    from spectool.cli.layers import layers_grid

    if options.columns or options.tidy:
        return cells_grid(report_layout(report, options).table, width)
    if options.sort:
        return layers_grid(sorted_report(report, options.sort), width, nested=False)
    return layers_grid(report, width)


def conclude(report: Report, target: Target, *, verbose: bool = False, listed: bool = False) -> None:
    """Say why (``-v``), what to know, what to do next, and last the coverage line.

    Args:
        report: What was delivered.
        target: Where it went.
        verbose: Whether to say why each method was chosen.
        listed: Whether operators were listed only, nothing computed.
    """
    if verbose:
        for row in report.rows:
            if row.why:
                say(f"{row.layer}: {row.why}")
    if not target.quiet:
        for note in report.notes:
            say(note, label="note")
        hint = "" if listed else next_step(report, target)
        if hint:
            say(hint, label="hint")
    say(coverage_line(report, listed=listed))


def coverage_line(report: Report, *, listed: bool = False) -> str:
    """Return how many linear maps were analysed (or listed only), of how many."""
    analysed, total, skipped = report.coverage
    verb = "listed" if listed else "analysed"
    return f"{analysed} of {total} linear maps {verb}, {skipped} skipped"


def next_step(report: Report, target: Target) -> str:
    """Return the most useful thing to do next; empty if there is none."""
    loose = sum(row.converged is False for row in report.rows)
    failed = sum(row.status == "failed" for row in report.rows)
    anywhere = sum(any("infinite grid" in text for text in row.assumed) for row in report.rows)
    if loose:
        return f"{_rows(loose)} not converged: raise --max-matvecs"
    if failed:
        return f"{_rows(failed)} failed: the note column says why"
    if anywhere:
        way = "--input" if report.format == "onnx" else "--arch with --input, or an ONNX or .pt2 export,"
        return f"{_rows(anywhere)} bounded for every input size: {way} gives exact ones"
    if report.coverage[2] and target.format != TABLE:
        return "the note column says why operators were skipped"
    if target.format == TABLE and target.path is None and report.path:
        return f"all digits and columns: spectool inspect {report.path} -o report.xlsx"
    return ""


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
