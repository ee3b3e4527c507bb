"""How `spectool check` draws its table and what it says at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spectool.cli.messages import say
from spectool.cli.numbers import interval, rounded_up, significant
from spectool.cli.output import Target
from spectool.errors import UsageError
from spectool.report.check import CheckReport, CheckRow
from spectool.report.check_tables import check_layout, sorted_check
from spectool.report.layout import WriteOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spectool.cli.layers import Remark

_STYLES = {"proven": "green", "violated": "bold red", "undecided": "yellow", "unlimited": "dim"}
# Of the columns of `inspect`, those that a verdict rests on.
_KEPT = ("layer", "kind", "input", "σ₁", "bounds", "proof")
_NAMED = 5


def refuse_overwriting(target: Target, baseline: Path | None) -> None:
    """Refuse to replace the baseline: a regression would be the next run's baseline.

    Raises:
        UsageError: If the result would be written there.
    """
    path = target.path
    if (
        path is not None
        and baseline is not None
        and path.exists()
        and baseline.exists()
        and path.samefile(baseline)
    ):
        raise UsageError(f"{path} is the baseline; it is not overwritten", hint="name another file after -o")


def draw_check(
    report: CheckReport, options: WriteOptions, width: int | None, every: bool
) -> tuple[RenderableType, list[str]]:
    """Draw the rows that are violated or undecided, or exactly the columns that were asked for.

    Args:
        report: The verdicts.
        options: Columns and order.
        width: Cells of the terminal; None for as many as it takes.
        every: Whether to draw all rows.
    """
    from rich.console import Group
    from rich.text import Text

    from spectool.cli.cells import cells_grid
    from spectool.cli.grid import GridColumn, fit
    from spectool.cli.layers import row_columns, with_remarks

    if options.columns:
        return cells_grid(check_layout(report, options).table, width)
    rows = [
        row
        for row in sorted_check(report, options.sort).rows
        if every or row.verdict in ("violated", "undecided")
    ]
    if not rows:
        return Group(), []
    columns = row_columns([row.row for row in rows], nested=None, brief=width is not None)
    columns = [column for column in columns if column.header in _KEPT]
    columns += [
        GridColumn("limit", tuple(Text(_limit(row)) for row in rows), "right"),
        GridColumn("baseline", tuple(Text(_then(row), _style(row)) for row in rows), drop=5),
        GridColumn("verdict", tuple(Text(row.verdict, _STYLES[row.verdict]) for row in rows)),
    ]
    table, hidden = fit([column for column in columns if any(cell.plain for cell in column.cells)], width)
    return with_remarks(table, _remarks(rows)), hidden


def conclude_check(report: CheckReport, target: Target, *, verbose: bool = False) -> None:
    """Say why (``-v``), what to know, what to do next, the verdict, and last the coverage line."""
    if verbose:
        for row in report.rows:
            if row.row.why:
                say(f"{row.row.layer}: {row.row.why}")
    if not target.quiet:
        for note in report.report.notes:
            say(note, label="note")
        vanished = report.baseline.vanished if report.baseline is not None else ()
        if vanished:
            more = f" and {len(vanished) - _NAMED} more" if len(vanished) > _NAMED else ""
            say(f"in the baseline, not in the file: {', '.join(vanished[:_NAMED])}{more}", label="note")
        hint = next_step(report)
        if hint:
            say(hint, label="hint")
    say(report.summary())
    analysed, total, skipped = report.coverage
    say(f"{analysed} of {total} linear maps analysed, {skipped} skipped")


def next_step(report: CheckReport) -> str:
    """Return what would decide the most of what is undecided; empty if nothing is, or nothing would."""
    undecided = [row for row in report.rows if row.verdict == "undecided"]
    anywhere = sum(any(text.startswith("infinite grid") for text in row.row.assumed) for row in undecided)
    loose = sum(row.row.converged is False for row in undecided)
    needs = [row.needs for row in undecided if row.needs is not None]
    if anywhere:
        way = (
            "--input" if report.report.format == "onnx" else "--arch with --input, or an ONNX or .pt2 export,"
        )
        return f"{_rows(anywhere)} known from above only, for every input size: {way} gives exact ones"
    if loose:
        return f"{_rows(loose)} not converged: raise --max-matvecs"
    if needs:
        which = "all that is undecided" if len(needs) == len(undecided) else f"{_rows(len(needs))}"
        return f"--slack {rounded_up(max(needs) * 100)}% would prove {which}"
    return ""


def _remarks(rows: list[CheckRow]) -> Iterator[Remark]:
    """Yield the reasons once, with the rows they are about; what columns show is not said again."""
    from spectool.cli.layers import grouped

    for verdict in ("violated", "undecided", "unlimited"):
        reasons = [(_reason(row), row.row) for row in rows if row.verdict == verdict]
        yield from grouped(verdict, _STYLES[verdict], [(text, row) for text, row in reasons if text])


def _reason(row: CheckRow) -> str:
    if row.verdict == "violated":
        return "" if row.baseline is None else row.reason
    if row.needs is None:
        return row.reason
    parts = ["its interval reaches beyond the limit"]
    if row.row.assumed:
        parts.append(f"{'; '.join(row.row.assumed)} assumed")
    if row.row.converged is False:
        parts.append("not converged")
    return "; ".join(parts)


def _limit(row: CheckRow) -> str:
    if row.limit is None:
        return ""
    return significant(row.limit) + (f" + {row.slack * 100:g}%" if row.slack else "")


def _then(row: CheckRow) -> str:
    entry = row.baseline
    if entry is None:
        return ""
    return (
        entry.verdict if entry.lower is None and entry.upper is None else interval(entry.lower, entry.upper)
    )


def _style(row: CheckRow) -> str:
    return (
        "dim"
        if row.baseline is None
        else {"regressed": "red", "undecided": "yellow"}.get(row.baseline.verdict, "")
    )


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
