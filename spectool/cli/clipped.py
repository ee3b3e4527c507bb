"""How `spectool clip` draws its table and what it says at the end."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectool.cli.messages import say
from spectool.cli.numbers import rounded_up, significant
from spectool.cli.output import Target
from spectool.report.check import distinct
from spectool.report.clip import ClipReport, ClipRow, Enclosed
from spectool.report.clip_tables import clip_layout, sorted_clip
from spectool.report.layout import WriteOptions

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from spectool.cli.layers import Remark

_STYLES = {"clipped": "green", "kept": "dim", "listed": "dim", "refused": "bold red"}
_DIM = ("kept", "listed")


def draw_clip(
    report: ClipReport, options: WriteOptions, width: int | None, every: bool
) -> tuple[RenderableType, list[str]]:
    """Draw the rows that were clipped, could not be, or are not within; or exactly the columns that were asked for.

    Args:
        report: What was done.
        options: Columns and order.
        width: Cells of the terminal; None for as many as it takes.
        every: Whether to draw all rows.
    """
    from rich.console import Group

    from spectool.cli.cells import cells_grid
    from spectool.cli.grid import fit
    from spectool.cli.layers import with_remarks

    if options.columns:
        return cells_grid(clip_layout(report, options).table, width)
    rows = [row for row in sorted_clip(report, options.sort).rows if every or _of_interest(row, report.prove)]
    if not rows:
        return Group(), []
    table, hidden = fit(_columns(rows, report.prove, width), width)
    return with_remarks(table, _remarks(rows)), hidden


def conclude_clip(report: ClipReport, target: Target, source: Path, *, verbose: bool = False) -> None:
    """Say why (``-v``), what to know, what was done and written, what to do next, and last the coverage line.

    Args:
        report: What was delivered.
        target: Where it went.
        source: The file that was read.
        verbose: Whether to say what made each row.
    """
    if verbose:
        for row in report.rows:
            if row.solver:
                say(f"{row.row.layer}: {row.solver}")
    if not target.quiet:
        for note in report.report.notes:
            say(note, label="note")
    say(report.summary())
    if not target.quiet:
        say(_written(report))
        if report.adjusted:
            count = len(report.adjusted)
            say(
                f"{count} {'mean follows' if count == 1 else 'means follow'} the weights, by at most "
                f"{significant(max(report.adjusted.values()))} standard deviations",
                label="note",
            )
        hint = next_step(report, source)
        if hint:
            say(hint, label="hint")
    analysed, total, skipped = report.coverage
    say(f"{analysed} of {total} linear maps analysed, {skipped} skipped")


def next_step(report: ClipReport, source: Path) -> str:
    """Return the most useful thing to do next; empty if there is none.

    Args:
        report: What was done.
        source: The file that was read.
    """
    gated = [row for row in report.rows if row.action in ("clipped", "kept")]
    loose = sum(row.row.converged is False for row in gated)
    anywhere = sum(any(text.startswith("infinite grid") for text in row.row.assumed) for row in gated)
    open_rows = [row for row in gated if row.proven is False]
    if loose:
        return f"{_rows(loose)} not converged: raise --max-matvecs"
    if report.output is None:
        return f"write it: spectool clip {_quoted(source)} {_options(report)} -o OUT"
    if not gated:
        return ""
    check = f"spectool check {_quoted(report.output)} {_options(report)}"
    if not open_rows:
        way = "--input" if report.report.format == "onnx" else "--arch with --input, or an ONNX or .pt2 export,"
        sizes = f"; {_rows(anywhere)} bounded for every input size, {way} would change less" if anywhere else ""
        return f"{check} proves it{sizes}"
    excess = [_excess(row) for row in open_rows]
    needs = [value for value in excess if value is not None]
    more = "" if report.prove else "; --prove clips until the bound itself is within"
    if len(needs) < len(excess):
        return f"no deterministic bound for {_rows(len(excess) - len(needs))}: {check} --accept-probabilistic{more}"
    slack = rounded_up(max(needs) * 100 * (1 + 1e-6) + 1e-9)
    return f"{_rows(len(needs))} proven only up to a slack: {check} --slack {slack}%{more}"


def _columns(rows: Sequence[ClipRow], prove: bool, width: int | None) -> list[GridColumn]:
    from rich.text import Text

    from spectool.cli.grid import GridColumn
    from spectool.cli.layers import row_columns

    def cells(value: Callable[[ClipRow], str | Text]) -> tuple[Text, ...]:
        made = ((row, value(row)) for row in rows)
        return tuple(
            cell if isinstance(cell, Text) else Text(cell, "dim" if row.action in _DIM else "")
            for row, cell in made
        )

    known = row_columns([row.row for row in rows], nested=False, brief=width is not None)
    names, kinds = (next(column for column in known if column.header == name) for name in ("layer", "kind"))
    columns = [
        GridColumn("layer", cells(lambda row: names.cells[places[id(row)]].plain), shrink=True),
        GridColumn("kind", cells(lambda row: kinds.cells[places[id(row)]].plain), drop=4),
        GridColumn("limit", cells(lambda row: _number(row.limit)), "right", drop=7),
        GridColumn("σ₁", cells(lambda row: Text(_path(row), _path_style(row)))),
        GridColumn("proven", cells(lambda row: Text(_bound(row), _bound_style(row))), "right", drop=6),
        GridColumn("changed", cells(lambda row: _percent(row.change)), "right"),
        GridColumn("at least", cells(lambda row: _percent(row.change_lower_bound, down=True)), "right", drop=5),
        GridColumn("by scaling", cells(lambda row: _percent(row.change_scaling)), "right", drop=3),
        GridColumn("metric", cells(lambda row: row.metric or ""), drop=2),
        GridColumn("σ below moved", cells(lambda row: _percent(row.below_limit_disturbed)), "right", drop=1),
        GridColumn("result", cells(lambda row: _result(row, prove))),
    ]
    return [column for column in columns if any(cell.plain for cell in column.cells)]


def _of_interest(row: ClipRow, prove: bool) -> bool:
    """Return whether a row is more than one that is all right as it is."""
    if row.action in ("clipped", "refused") or row.change is not None:
        return True
    return row.within is False or (prove and row.proven is False)


def _path(row: ClipRow) -> str:
    """Return ``12.956 → 3.0000``, or the one value where there is but one."""
    before, after = (None if value is None else value.sigma for value in (row.before, row.after))
    if row.action not in ("clipped", "refused") and row.change is None:
        return _number(after)
    if row.action == "refused" or before is None or after is None:
        return _number(before)
    limit = row.limit
    return f"{significant(before)} → {significant(after) if limit is None or after <= limit else distinct(after, limit)}"


def _excess(row: ClipRow) -> float | None:
    """Return by what share the proven bound exceeds the limit; None where there is no bound."""
    if row.after is None or row.after.proven is None or row.limit is None:
        return None
    return row.after.proven / row.limit - 1


def _percent(value: float | None, *, down: bool = False) -> str:
    """Return a share in per cent with four digits.

    Example:
        >>> _percent(0.0180412), _percent(0.54898676), _percent(0.54898676, down=True), _percent(0.0)
        ('1.804%', '54.90%', '54.89%', '0%')
    """
    if value is None:
        return ""
    if value == 0:
        return "0%"
