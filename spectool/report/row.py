"""Rows and reports: unformatted numbers in full precision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

_SUFFIX = re.compile(r"(\[[^\]]*\])?(#\d+)?$")

Status = Literal["ok", "skipped", "failed", "nonlinear"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One operator. Unknown is None; nothing here is NaN or infinite.

    Attributes:
        layer: Row key.
        level: ``layer`` or ``composed``.
        kind: Word of the documented vocabulary, joined by ``+``.
        weights: Tensor names of the linear part.
        weight_shape: Shape of the weight; for a composed row a tuple of shapes parallel to ``weights``.
        input_shape: Without the batch axis; None for any size.
        output_shape: Without the batch axis; None for any size.
        sigma: σ̂ descending, with multiplicity.
        sigma_lower: Lower ends of their intervals.
        sigma_upper: Upper ends; None where nothing is proven.
        upper_kind: What proves the upper end of σ₁.
        residual: Of σ₁, relative; None where the method is a theorem.
        multiplicity: Of σ₁.
        multiplicity_exact: Whether it is proven.
        converged: Whether the solver converged.
        fro: Frobenius norm of the operator.
        stable_rank: fro²/σ₁².
        method: What computed it.
        matvecs: Operator applications, all included.
        seconds: Wall time of this row.
        assumed: What had to be assumed.
        status: ``ok``, ``skipped``, ``failed`` or ``nonlinear``.
        note: Anything worth saying in words.
        operators: How many operators with a weight matrix it holds, for the coverage line; not exported.
        maximal: Whether no larger region contains it; not exported.
        why: Why the method was chosen; shown with ``-v``; not exported.
        looseness: For a chain, the product of its parts' σ₁ over its own; said in ``note``, not exported.
    """

    layer: str
    level: Literal["layer", "composed"]
    kind: str
    weights: tuple[str, ...]
    weight_shape: Shape | tuple[Shape, ...]
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    sigma: tuple[float, ...] = ()
    sigma_lower: tuple[float, ...] = ()
    sigma_upper: tuple[float | None, ...] = ()
    upper_kind: str = "none"
    residual: float | None = None
    multiplicity: int | None = None
    multiplicity_exact: bool | None = None
    converged: bool | None = None
    fro: float | None = None
    stable_rank: float | None = None
    method: str | None = None
    matvecs: int | None = None
    seconds: float | None = None
    assumed: tuple[str, ...] = ()
    status: Status = "ok"
    note: str = ""
    operators: int = 1
    maximal: bool = True
    why: str = ""
    looseness: float | None = None

    @property
    def lower(self) -> float | None:
        """Lower end of σ₁'s interval."""
        return self.sigma_lower[0] if self.sigma_lower else None

    @property
    def upper(self) -> float | None:
        """Upper end of σ₁'s interval."""
        return self.sigma_upper[0] if self.sigma_upper else None


def parts_text(looseness: float) -> str:
    """Return what a row's note says of the product of its parts."""
    return f"parts multiply to {looseness:.3g} times this"


@dataclass(frozen=True)
class Report:
    """The rows of one file and how they were made.

    Attributes:
        rows: Rows in display order.
        path: The file; None for a live module.
        format: Its container.
        sha256: Hash of the file if it was asked for.
        settings: Every option that shapes the numbers.
        version: spectool's version.
        notes: What a user should know about the file, in words.
    """

    rows: tuple[Row, ...]
    path: str | None
    format: str | None
    sha256: str | None
    settings: Mapping[str, Any]
    version: str
    notes: tuple[str, ...] = field(default=())

    @property
    def coverage(self) -> tuple[int, int, int]:
        """(analysed, total, skipped) operators with a weight matrix or kernel, each counted once."""
        analysed = skipped = 0
        seen: set[str] = set()
        for row in sorted(self.rows, key=lambda row: row.level == "composed"):
            # A composed row counts only where its layers have no rows of their own (`--level composed`), and
            # regions that overlap share operators.
            # Repetitions (`#2`) and parts (`[0:64]`) of a tensor are no operators of their own here.
            keys = {_SUFFIX.sub("", key) for key in row.layer.split(" + ")}
            count = row.operators if row.level == "layer" else min(row.operators, len(keys - seen))
            seen |= keys
            analysed += count if row.status in ("ok", "failed") else 0
            skipped += count if row.status == "skipped" else 0
        return analysed, analysed + skipped, skipped

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document of schema 1 as plain data."""
        from spectool.report.document import to_document

        return to_document(self)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per operator, the CSV's columns, typed."""
        from spectool.report.frame import to_frame

        return to_frame(self)

    def _repr_html_(self) -> str:
        """Show as a table in a notebook."""
        html: str = self.to_pandas().to_html(max_rows=200)
        return html
