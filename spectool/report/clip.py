"""What ``clip`` says of every row, as data: before, after, what it cost, and what it had to cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from spectool.report.row import Report, Row

if TYPE_CHECKING:
    import pandas as pd

Action = Literal["clipped", "kept", "listed", "refused"]
ACTIONS: tuple[Action, ...] = ("clipped", "kept", "listed", "refused")


@dataclass(frozen=True)
class Enclosed:
    """σ₁ and its interval.

    Attributes:
        sigma: Estimate.
        lower: Lower end.
        upper: Upper end; None where nothing is proven.
        proven: The smallest proven bound; None where there is none. Not given for the value before.
    """

    sigma: float | None
    lower: float | None
    upper: float | None
    proven: float | None = None


@dataclass(frozen=True)
class ClipRow:
    """A row and what became of it.

    Attributes:
        row: The operator as written (as it was, where it was not changed).
        action: ``clipped``; ``kept``: obeys its limit already; ``listed``: nothing is asked of it; ``refused``: it
            exceeds its limit and could not be clipped.
        limit: Limit on σ₁; None if it has none.
        before: σ₁ before.
        after: σ₁ of the tensors as stored, by a cold start.
        metric: In which the change was minimised: ``weights``, ``folded`` or ``data``.
        change: ‖x′ − x‖/‖x‖ in that metric.
        change_lower_bound: What any weights that obey the limit change at least, in that metric.
        change_scaling: What scaling the weight down would have changed.
        raw_change: ‖W′ − W‖/‖W‖ of the stored tensors, or of the weight that they make.
        below_limit_disturbed: Largest change of a computed singular value that was below the limit, over the limit.
        recentered: Tensors that were moved so that the mean of the output stays.
        iterations: Rounds of the solver.
        solver: What made the new weights, and why.
        reason: Why it was listed or refused.
    """

    row: Row
    action: Action
    limit: float | None = None
    before: Enclosed | None = None
    after: Enclosed | None = None
    metric: str | None = None
    change: float | None = None
    change_lower_bound: float | None = None
    change_scaling: float | None = None
    raw_change: float | None = None
    below_limit_disturbed: float | None = None
    recentered: tuple[str, ...] = ()
    iterations: int | None = None
    solver: str = ""
    reason: str = ""

    @property
    def within(self) -> bool | None:
        """Whether σ̂₁ as stored is within the limit; None where nothing is asked or nothing is known."""
        if self.limit is None or self.action == "listed" or self.after is None or self.after.sigma is None:
            return None
        return self.after.sigma <= self.limit * (1 + 1e-9)

    @property
    def proven(self) -> bool | None:
        """Whether a proven bound is within the limit; None as for ``within``."""
        if self.within is None or self.limit is None or self.after is None:
            return None
        return self.after.proven is not None and self.after.proven <= self.limit


@dataclass(frozen=True)
class ClipReport:
    """What became of one file.

    Attributes:
        rows: In display order.
        report: The same rows as ``inspect`` reports them, as written.
        output: The file written; None for a dry run.
        changed: Names of the tensors that changed.
        prove: Whether proven bounds were asked for.
        adjusted: Tensors moved so that means stay, with the largest move relative to the standard deviation.
        tensors: How many tensors the file holds; None if they were not counted.
        source: The file read; None if that was not kept.
        files: Every file written, data files of a model included.
    """

    rows: tuple[ClipRow, ...]
    report: Report
    output: str | None = None
    changed: tuple[str, ...] = ()
    prove: bool = False
    adjusted: dict[str, float] = field(default_factory=dict)
    tensors: int | None = None
    source: str | None = None
    files: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[Action, int]:
        """Action → how many rows."""
        return {action: sum(row.action == action for row in self.rows) for action in ACTIONS}

    @property
    def coverage(self) -> tuple[int, int, int]:
        """(analysed, total, skipped) operators with a weight matrix; those nothing is asked of are not analysed."""
        # Rows without a matrix count nothing; they tell which parts of a composed row are none.
        rows = (row.row for row in self.rows if row.action != "listed" or not row.row.operators)
        asked = replace(self.report, rows=tuple(rows))
        _, total, skipped = self.report.coverage
        return asked.coverage[0], total, skipped

    def exit_code(self, *, strict: bool = False) -> int:
        """Return the exit code: 0 done, 4 something undecided, 5 skipped operators under ``strict``.

        Args:
            strict: Whether skipped operators and refused rows count.
        """
        open_rows = [row for row in self.rows if row.action != "listed"]
        undecided = any(
            row.row.status in ("failed", "skipped")
            or row.row.converged is False
            or row.within is False
            or (self.prove and not row.proven)
            for row in open_rows
        )
        if undecided or any(row.action == "refused" for row in self.rows):
            return 4
        return 5 if strict and self.coverage[2] else 0

    def summary(self) -> str:
        """Return what happened, in one line."""
        counts = self.counts
        parts = [f"{counts['clipped']} clipped", f"{counts['kept']} within their limits already"]
        if counts["refused"]:
            parts.append(f"{counts['refused']} could not be clipped")
        if counts["listed"]:
            parts.append(f"{counts['listed']} not gated")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document (``docs/schema/clip.schema.json``) as plain data."""
        from spectool.report.clip_tables import clip_document

        return clip_document(self)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per operator, the CSV's columns, typed."""
        from spectool.report.clip_tables import clip_frame

        return clip_frame(self)

    def _repr_html_(self) -> str:
        """Show as a table in a notebook."""
        html: str = self.to_pandas().to_html(max_rows=200)
        return html
