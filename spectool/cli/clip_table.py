"""The table of `spectool clip` on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal

from rich.console import Group, RenderableType
from rich.text import Text

from spectool.cli.cells import cells_grid
from spectool.cli.grid import GridColumn, fit
from spectool.cli.layers import Remark, grouped, row_columns, with_remarks
from spectool.cli.numbers import rounded_up, significant
from spectool.report.check import distinct
from spectool.report.clip import ClipReport, ClipRow
from spectool.report.clip_tables import clip_layout, sorted_clip
from spectool.report.layout import WriteOptions

_STYLES = {"clipped": "green", "kept": "dim", "listed": "dim", "refused": "bold red"}
_DIM = ("kept", "listed")
_WORDS = {"kept": "within", "listed": "not gated", "refused": "not clipped"}


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
    if options.columns:
        return cells_grid(clip_layout(report, options).table, width)
    rows = [row for row in sorted_clip(report, options.sort).rows if every or _of_interest(row, report.prove)]
    if not rows:
        return Group(), []
    table, hidden = fit(_columns(rows, report.prove, brief=width is not None), width)
    return with_remarks(table, _remarks(rows)), hidden


def percent(value: float | None, *, down: bool = False) -> str:
    """Return a share in per cent with four digits, a lower bound rounded down.

    Example:
        >>> percent(0.0180412), percent(0.54898676), percent(0.54898676, down=True), percent(0.0)
        ('1.804%', '54.90%', '54.89%', '0%')
    """
    if value is None:
        return ""
    if value <= 0:
        return "0%"
    rounding = ROUND_FLOOR if down else ROUND_HALF_EVEN
    rounded = Context(prec=4, rounding=rounding).create_decimal(Decimal(value * 100))
    places = 3 - rounded.adjusted()
    return f"{rounded:.{max(places, 0)}f}%" if places <= 6 else f"{rounded:.3e}%"


def _columns(rows: Sequence[ClipRow], prove: bool, *, brief: bool) -> list[GridColumn]:
    """Return the columns that say anything; what a clip is for stays, however narrow the terminal."""

    def cells(value: Callable[[ClipRow], str | Text]) -> tuple[Text, ...]:
        made = ((row, value(row)) for row in rows)
        return tuple(cell if isinstance(cell, Text) else Text(cell, _shade(row)) for row, cell in made)

    known = {column.header: column for column in row_columns([r.row for r in rows], nested=None, brief=brief)}
    names, kinds = (
        tuple(Text(cell.plain, _shade(row)) for cell, row in zip(known[name].cells, rows, strict=True))
        for name in ("layer", "kind")
    )
    columns = [
        GridColumn("layer", names, shrink=True),
        GridColumn("kind", kinds, drop=3),
        GridColumn("limit", cells(lambda row: _number(row.limit)), "right", drop=6),
        GridColumn("σ₁", cells(_path)),
        GridColumn("proven", cells(_bound), "right", drop=5),
        GridColumn("changed", cells(lambda row: percent(row.change)), "right"),
        GridColumn(
            "at least", cells(lambda row: percent(row.change_lower_bound, down=True)), "right", drop=4
        ),
        GridColumn("by scaling", cells(lambda row: percent(row.change_scaling)), "right", drop=2),
        GridColumn("metric", cells(lambda row: row.metric or ""), drop=1),
        GridColumn("result", cells(lambda row: _result(row, prove))),
    ]
    return [column for column in columns if any(cell.plain for cell in column.cells)]


def _of_interest(row: ClipRow, prove: bool) -> bool:
    """Return whether a row is more than one that was all right as it was."""
    if row.action in ("clipped", "refused") or row.change is not None:
        return True
    return row.within is False or (prove and row.proven is False)


def _shade(row: ClipRow) -> str:
    return "dim" if row.action in _DIM else ""


def _path(row: ClipRow) -> str | Text:
    """Return ``12.956 → 3.0000``, or the one value where nothing moved."""
    before, after = (None if value is None else value.sigma for value in (row.before, row.after))
    if row.action == "refused" or before is None or after is None:
        return _beside(before, row.limit)
    if row.action != "clipped" and row.change is None:
        return _number(after)
    if row.within is False:
        return Text(f"{_beside(before, row.limit)} → {_beside(after, row.limit)}", "red")
    return f"{_beside(before, row.limit)} → {significant(after)}"


def _bound(row: ClipRow) -> str | Text:
    """Return the smallest proven bound, coloured by whether it is within the limit; that of an untouched row is dim."""
    if row.action == "refused" or row.after is None or row.after.proven is None:
        return ""
    text = rounded_up(row.after.proven)
    if row.action in _DIM:
        return text
    return Text(text, "green" if row.proven else "yellow")


def _result(row: ClipRow, prove: bool) -> Text:
    if row.row.status in ("failed", "skipped"):
        return Text(row.row.status, "bold red")
    if row.within is False and row.action != "refused":
        return Text("above limit", "bold red")
    if prove and row.proven is False and row.action != "refused":
        return Text("not proven", "yellow")
    if row.row.converged is False:
        return Text("not converged", "yellow")
    return Text(_WORDS.get(row.action, row.action), _STYLES[row.action])


def _beside(value: float | None, limit: float | None) -> str:
    """Return a number with as many digits as it takes to show that it is above the limit."""
    if value is None or limit is None or value <= limit or float(significant(value)) > limit:
        return _number(value)
    return distinct(value, limit)


def _number(value: float | None) -> str:
    return "" if value is None else significant(value)


def _remarks(rows: Sequence[ClipRow]) -> Iterator[Remark]:
    """Yield every reason once, with the rows it is about."""
    for action, label in (("refused", "not clipped"), ("listed", "not gated")):
        reasons = [(row.reason or "no reason is known", row.row) for row in rows if row.action == action]
        yield from grouped(label, _STYLES[action], reasons)
    yield from grouped(
        "note",
        "bold",
        [(row.reason, row.row) for row in rows if row.action in ("clipped", "kept") and row.reason],
    )
    loose = [(row, row.row) for row in rows if row.row.converged is False]
    yield from grouped(
        "~", "yellow", [("not converged; the interval holds, σ₁ may be low", row) for _, row in loose]
    )
    moved = [("running means or biases follow", row.row) for row in rows if row.recentered]
    yield from grouped("mean", "bold", moved)
    assumed = [("; ".join(row.row.assumed), row.row) for row in rows if row.row.assumed]
    yield from grouped("assumed", "bold", assumed)
