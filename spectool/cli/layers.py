"""The table of `spectool inspect` on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from spectool.cli.grid import GridColumn, fit
from spectool.cli.numbers import interval, significant, sparkline
from spectool.report.layers import shape_cell, weight_shapes
from spectool.report.row import Report, Row, parts_text
from spectool.report.text import shape_text, visible

_STYLES = {"skipped": "yellow", "failed": "red", "nonlinear": "dim"}
_NAMED = 3
_HANGING, _BESIDE = "└ ", "+ "
_COMPOSED = (
    "composed: what it names, taken together as one linear map; rows without this mark are stored layers"
)
Remark = tuple[str, str, str, str]  # label, style, text, keys of the rows


def layers_grid(
    report: Report, width: int | None, *, nested: bool = True
) -> tuple[RenderableType, list[str]]:
    """Return the table with its remarks, and the headings of the columns that did not fit.

    Args:
        report: Any report.
        width: Cells of the terminal; None for as many as it takes.
        nested: Whether composed rows still follow their layers, so that they can hang below them.
    """
    rows = report.rows
    columns = [
        column
        for column in row_columns(rows, nested=nested, brief=width is not None)
        if any(cell.plain for cell in column.cells)
    ]
    table, hidden = fit(columns, width)
    return with_remarks(table, [*_remarks(rows), *_legend(rows, nested)]), hidden


def with_remarks(table: RenderableType, entries: Iterable[Remark]) -> RenderableType:
    """Return the table with remarks below it, if there are any."""
    remarks = RichTable.grid(padding=(0, 2, 0, 0))
    remarks.add_column(no_wrap=True)
    remarks.add_column(overflow="fold")
    for label, style, text, keys in entries:
        remarks.add_row(Text(label, style=style), Text.assemble(visible(text), (f"  {keys}", "dim")))
    return Group(table, Text(""), remarks) if remarks.row_count else table


def row_columns(rows: Sequence[Row], *, nested: bool | None, brief: bool) -> list[GridColumn]:
    """Return the columns of a table of rows.

    Args:
        rows: In display order.
        nested: Whether composed rows still follow their layers, so that they can hang below them; None to mark none.
        brief: Whether long kinds are cut.
    """
    longest = max((len(row.sigma) for row in rows), default=0)
    curve = f"σ₁…σ{''.join('₀₁₂₃₄₅₆₇₈₉'[int(digit)] for digit in str(longest))}" if longest > 1 else ""

    marks = {} if nested is None else _marks(rows, nested)

    def cells(value: Callable[[Row], str | Text]) -> tuple[Text, ...]:
        made = (value(row) for row in rows)
        return tuple(cell if isinstance(cell, Text) else Text(cell) for cell in made)

    # Numbers never lose their interval: σ₁ and its bounds are the two columns that always stay.
    return [
        GridColumn("layer", cells(lambda row: _name(row, marks)), shrink=True),
        GridColumn("kind", cells(lambda row: _kind(row, brief)), drop=10),
        GridColumn("weight", cells(_weight), drop=6),
        GridColumn("input", cells(lambda row: shape_cell(row, row.input_shape) or ""), drop=9),
        GridColumn("σ₁", cells(_sigma), "right"),
        GridColumn("bounds", cells(lambda row: interval(row.lower, row.upper) if row.sigma_upper else "")),
        GridColumn(
            "proof", cells(lambda row: Text(row.upper_kind if row.sigma_upper else "", "dim")), drop=8
        ),
        GridColumn(curve, cells(lambda row: sparkline(row.sigma) if len(row.sigma) > 1 else ""), drop=7),
        GridColumn("parts", cells(_looseness), "right", drop=4),
        GridColumn("copies", cells(_multiplicity), "right", drop=5),
        GridColumn("stable rank", cells(lambda row: _short(row.stable_rank)), "right", drop=4),
        GridColumn("method", cells(lambda row: row.method or ""), drop=3),
        GridColumn(
            "matvecs", cells(lambda row: "" if row.matvecs is None else str(row.matvecs)), "right", drop=2
        ),
        GridColumn(
            "seconds", cells(lambda row: "" if row.seconds is None else f"{row.seconds:.2f}"), "right", drop=1
        ),
    ]


def _name(row: Row, marks: Mapping[str, str]) -> Text:
    style = _STYLES.get(row.status, "")
    if row.level == "layer":
        return Text(visible(row.layer), style)
    return Text(f"{marks.get(row.layer, '')}{_composed_name(row.layer)}", style)


def _marks(rows: Sequence[Row], nested: bool) -> dict[str, str]:
    """Return what stands before the keys of composed rows, where there are rows of stored layers beside them."""
    stored = {row.layer for row in rows if row.level == "layer"}
    if not stored:
        return {}
    composed = (row.layer for row in rows if row.level == "composed")
    return {key: _HANGING if nested and key.partition(" + ")[0] in stored else _BESIDE for key in composed}


def _legend(rows: Sequence[Row], nested: bool) -> Iterator[Remark]:
    """Say what the marks mean."""
    for mark in dict.fromkeys(_marks(rows, nested).values()):
        yield mark.strip(), "bold", _COMPOSED, ""


def _composed_name(key: str) -> str:
    """Return ``layer1.0.conv1.weight + …bn1.weight``: the parts stand in full in the rows above."""
    first, *others = [visible(part) for part in key.split(" + ")]
    prefix = first[: first.rfind(".") + 1]
    while prefix and not all(part.startswith(prefix) for part in others):
        prefix = prefix[: prefix.rstrip(".").rfind(".") + 1]
    short = [f"…{part[len(prefix) :]}" if prefix else part for part in others]
    if len(short) > 2:
        short = [f"… {len(short) - 1} more", short[-1]]
    return " + ".join([first, *short])


def _kind(row: Row, brief: bool) -> str:
    first, *others = visible(row.kind).split("+")
    return f"{first}+{len(others)} more" if brief and len(others) > 1 else visible(row.kind)


def _weight(row: Row) -> str:
    return "" if row.level == "composed" else ";".join(shape_text(shape) for shape in weight_shapes(row))


def _sigma(row: Row) -> Text:
    if not row.sigma:
        return Text("" if row.status == "ok" else row.status, _STYLES.get(row.status, ""))
    number = significant(row.sigma[0])
    return Text(f"~{number}", "yellow") if row.converged is False else Text(number)


def _multiplicity(row: Row) -> str:
    if row.multiplicity is None or row.multiplicity < 2:
        return ""
    return f"{'' if row.multiplicity_exact else '≥'}{row.multiplicity}"


def _looseness(row: Row) -> str:
    return "" if row.looseness is None else f"{row.looseness:.2f}×"


def _remark(row: Row) -> str:
    """Return the note without what a column shows already."""
    if row.looseness is None:
        return row.note
    return row.note.removesuffix(parts_text(row.looseness)).removesuffix("; ")


def _short(value: float | None) -> str:
    return "" if value is None else significant(value)


def _remarks(rows: Sequence[Row]) -> Iterator[Remark]:
    """Yield every reason and assumption once, with the rows it is about."""
    for status in ("failed", "skipped"):
        yield from grouped(status, _STYLES[status], [(row.note, row) for row in rows if row.status == status])
    loose = [row for row in rows if row.converged is False]
    yield from grouped(
        "~", "yellow", [("not converged; the interval holds, the estimate may be low", row) for row in loose]
    )
    reasons = [(row.note, row) for row in rows if row.status == "nonlinear"]
    yield from grouped("nonlinear", "dim", reasons)
    yield from grouped("assumed", "bold", [("; ".join(row.assumed), row) for row in rows if row.assumed])
    yield from grouped(
        "note", "bold", [(_remark(row), row) for row in rows if row.status == "ok" and _remark(row)]
    )


def grouped(label: str, style: str, reasons: Sequence[tuple[str, Row]]) -> Iterator[Remark]:
    """Yield a remark per text, with the keys of the rows it is about; many are counted instead of named."""
    groups: dict[str, list[str]] = {}
    for text, row in reasons:
        groups.setdefault(text, []).append(visible(row.layer))
    for text, keys in groups.items():
        more = f" and {len(keys) - _NAMED + 1} more" if len(keys) > _NAMED else ""
        yield label, style, text, ", ".join(keys[: _NAMED - 1] if more else keys) + more
