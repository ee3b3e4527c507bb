"""What ``check`` says of every row, as data; verdicts follow from intervals alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from spectool.report.row import Report, Row

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["proven", "violated", "undecided", "unlimited"]
BaselineVerdict = Literal["held", "regressed", "undecided", "new"]
VERDICTS: tuple[Verdict, ...] = ("proven", "violated", "undecided", "unlimited")


@dataclass(frozen=True)
class BaselineEntry:
    """What an earlier result says of a row, and how the row compares.

    Attributes:
        lower: Lower end of σ₁ then; None if unknown.
        upper: Upper end of σ₁ then; None if unknown.
        verdict: ``held``: proven no greater than ``upper``, up to the tolerance; ``regressed``: proven greater;
            ``undecided``; ``new``: the earlier result has no such row.
    """

    lower: float | None
    upper: float | None
    verdict: BaselineVerdict


@dataclass(frozen=True)
class CheckRow:
    """A row and its verdict.

    Attributes:
        row: The operator, with the interval of its σ₁.
        verdict: ``proven``, ``violated``, ``undecided`` or ``unlimited`` (listed, but nothing is asked of it).
        limit: Limit on σ₁; None if it has none.
        slack: Relative amount by which the limit may be exceeded.
        baseline: Comparison with an earlier result; None if none was asked for.
        reason: Why it is not ``proven``, in words; empty if it is.
        needs: Slack with which its upper bound would prove its limit; None where slack is not what is missing.
    """

    row: Row
    verdict: Verdict
    limit: float | None = None
    slack: float = 0.0
    baseline: BaselineEntry | None = None
    reason: str = ""
    needs: float | None = None

    @property
    def gated(self) -> bool:
        """Whether anything is asked of it."""
        return self.verdict != "unlimited"


@dataclass(frozen=True)
class BaselineFile:
    """The earlier result that rows were compared with.

    Attributes:
        path: Its file.
        tolerance: Relative growth of σ₁ that is no regression.
        vanished: Keys of its rows that are no more.
    """

    path: str
    tolerance: float
    vanished: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """The verdicts on one file.

    Attributes:
        rows: In display order.
        report: The same rows as ``inspect`` reports them, with file, settings and notes.
        baseline: What they were compared with; None if nothing.
    """

    rows: tuple[CheckRow, ...]
    report: Report
    baseline: BaselineFile | None = None

    @property
    def counts(self) -> dict[Verdict, int]:
        """Verdict → how many rows."""
        return {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in VERDICTS}

    @property
    def verdict(self) -> Literal["pass", "fail", "undecided"]:
        """``fail`` if any row is violated, else ``undecided`` if any is, else ``pass``."""
        counts = self.counts
        if counts["violated"]:
            return "fail"
        return "undecided" if counts["undecided"] else "pass"

    @property
    def ok(self) -> bool:
        """Whether every gated row is proven."""
        return self.verdict == "pass"

    @property
    def coverage(self) -> tuple[int, int, int]:
        """(analysed, total, skipped) operators with a weight matrix; ungated ones are not analysed."""
        gated = replace(self.report, rows=tuple(row.row for row in self.rows if row.gated or row.row.sigma))
        _, total, skipped = self.report.coverage
        return gated.coverage[0], total, skipped

    def exit_code(self, *, strict: bool = False) -> int:
        """Return the exit code: 0 all proven, 1 a violation, 4 undecided, 5 skipped operators.

        Args:
            strict: Whether skipped operators that no limit concerns count, too.
        """
        if self.verdict != "pass":
            return 1 if self.verdict == "fail" else 4
        return 5 if strict and self.coverage[2] else 0

    def summary(self) -> str:
        """Return the verdict in one line.

        Example:
            >>> from spectool.report.row import Report, Row
            >>> rows = (CheckRow(Row("fc.weight", "layer", "linear", (), ()), "violated", 1.0),)
            >>> CheckReport(rows, Report((), None, None, None, {}, "")).summary()
            'FAIL: 1 of 1 operator exceeds its bound'
        """
        counts = self.counts
        gated = len(self.rows) - counts["unlimited"]
        nouns = "operator" if gated == 1 else "operators"
        parts = []
        match self.verdict:
            case "fail":
                one = counts["violated"] == 1
                exceed = "exceeds its bound" if one else "exceed their bounds"
                parts.append(f"FAIL: {counts['violated']} of {gated} {nouns} {exceed}")
                if counts["undecided"]:
                    parts.append(f"{counts['undecided']} undecided")
            case "undecided":
                parts.append(
                    f"UNDECIDED: {counts['undecided']} of {gated} {nouns} neither proven nor violated"
                )
            case "pass":
                obey = "is proven to obey its bound" if gated == 1 else "are proven to obey their bounds"
                parts.append(f"PASS: {gated} of {gated} {nouns} {obey}")
        if self.baseline is not None:
            new = sum(row.baseline is not None and row.baseline.verdict == "new" for row in self.rows)
            parts += [f"{new} new"] if new else []
            parts += [f"{len(self.baseline.vanished)} vanished"] if self.baseline.vanished else []
        if counts["unlimited"]:
            parts.append(f"{counts['unlimited']} not gated")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document (``docs/schema/check.schema.json``) as plain data."""
        from spectool.report.check_tables import check_document

        return check_document(self)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per operator, the CSV's columns, typed."""
        from spectool.report.check_tables import check_frame

        return check_frame(self)

    def _repr_html_(self) -> str:
        """Show as a table in a notebook."""
        html: str = self.to_pandas().to_html(max_rows=200)
        return html


def distinct(value: float, other: float) -> str:
    """Return a number with five digits, or as many as show on which side of ``other`` it lies.

    Example:
        >>> distinct(1.2345678, 1.0), distinct(1.0000000123, 1.0)
        ('1.2346', '1.00000001')
    """
    for digits in range(5, 17):
        text = f"{value:.{digits}g}"
        if (float(text) > other) == (value > other) and (float(text) < other) == (value < other):
            return text
    return repr(value)
