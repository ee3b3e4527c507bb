"""From an interval and a limit to a verdict, and its reason in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectool.api.baselines import Earlier
from spectool.report.check import BaselineEntry, BaselineVerdict, CheckRow, Verdict, distinct
from spectool.report.row import Row

# The operator that stands for a layer of unknown geometry or eps bounds it from above only.
_ABOVE = ("infinite grid", "groups=", "eps=")
# A scale that is not in the file: neither end of the interval holds for the real layer.
_UNKNOWN = ("alpha",)


@dataclass(frozen=True)
class Gate:
    """What is asked of rows.

    Attributes:
        slack: Relative amount by which a limit may be exceeded.
        tolerance: Relative growth over the baseline that is no regression.
        accept_probabilistic: Whether an upper bound that fails with probability at most 1e-9 is a proof.
    """

    slack: float = 0.0
    tolerance: float = 0.0
    accept_probabilistic: bool = False


@dataclass(frozen=True)
class _Judged:
    verdict: Verdict
    reason: str = ""
    needs: float | None = None  # slack that would prove it


def judge(
    row: Row, limit: float | None, gate: Gate, earlier: Earlier | None = None, *, compared: bool = False
) -> CheckRow:
    """Return the verdict on a row that something is asked of.

    With a limit and a baseline the worse verdict counts. A limit C with slack s asks whether σ₁ ≤ C(1+s), a baseline
    with upper bound U and tolerance t whether σ₁ ≤ U(1+t).

    Args:
        row: The row with its numbers.
        limit: Limit on σ₁, None for none.
        gate: Slack and tolerance.
        earlier: The row in the baseline, None if it is new there.
        compared: Whether there is a baseline.
    """
    found: list[_Judged] = []
    entry: BaselineEntry | None = None
    if limit is not None:
        found.append(_judge(row, limit, gate.slack, gate, "the limit", same=False))
    if compared and earlier is None:
        entry = BaselineEntry(None, None, "new")
    elif compared and earlier is not None:
        judged = _compare(row, earlier, gate)
        said: dict[Verdict, BaselineVerdict] = {
            "proven": "held",
            "violated": "regressed",
            "undecided": "undecided",
        }
        entry = BaselineEntry(earlier.lower, earlier.upper, said[judged.verdict])
        found.append(judged)
    if not found and row.status in ("skipped", "failed"):
        # New and not analysed: that it is no worse than nothing cannot be said.
        found.append(_Judged("undecided", _unanalysed(row)))
    slack = gate.slack if limit is not None else 0.0
    verdicts: tuple[Verdict, ...] = ("violated", "undecided")
    for verdict in verdicts:
        told = [judged for judged in found if judged.verdict == verdict]
        if told:
            reasons = dict.fromkeys(judged.reason for judged in told)
            needs = told[0].needs if len(told) == 1 and limit is not None and told[0] is found[0] else None
            return CheckRow(row, verdict, limit, slack, entry, "; ".join(reasons), needs)
    if not found:
        return CheckRow(row, "unlimited", baseline=entry, reason="not in the baseline")
    return CheckRow(row, "proven", limit, slack, entry)


def ungated(row: Row, reason: str) -> CheckRow:
    """Return a row that nothing is asked of, and why."""
    return CheckRow(row, "unlimited", reason=reason)


def _compare(row: Row, earlier: Earlier, gate: Gate) -> _Judged:
    if earlier.upper is None:
        reason = _unanalysed(row) if row.status != "ok" else "the baseline has no upper bound for it"
        return _Judged("undecided", reason)
    same = earlier.assumed == row.assumed and earlier.input_shape == row.input_shape
    return _judge(row, earlier.upper, gate.tolerance, gate, "the baseline", same=same)


def _judge(row: Row, limit: float, slack: float, gate: Gate, name: str, *, same: bool) -> _Judged:
    """Judge σ₁ ≤ limit·(1+slack).

    Args:
        row: The row.
        limit: What to compare with.
        slack: Relative amount by which σ₁ may be greater.
        gate: What counts as a proof.
        name: Of what it is compared with.
        same: Whether that rests on the same assumptions, which then cancel.
    """
    if row.status != "ok" or (row.lower is None and row.upper is None):
        return _Judged("undecided", _unanalysed(row))
    line = limit * (1 + slack)
    shown = f"{name} {distinct(limit, line)}" + (f" by more than {slack * 100:g} %" if slack else "")
    assumed = () if same else row.assumed
    unknown = unknown_scale(assumed)
    above = [text for text in assumed if text.startswith(_ABOVE)]
    if unknown:
        return _Judged("undecided", f"its scale is not known ({'; '.join(unknown)} assumed)")
    upper = row.upper
    chance = upper is not None and row.upper_kind == "probabilistic" and not gate.accept_probabilistic
    if upper is not None and upper <= line and not chance:
        return _Judged("proven")
    lower = row.lower
    if lower is not None and lower > line and not above:
        return _Judged("violated", f"σ₁ is at least {distinct(lower, line)} and exceeds {shown}")
    needs = upper / limit - 1 if upper is not None and upper > line and limit and not chance else None
    return _Judged("undecided", _doubt(row, line, shown, above), needs)


def unknown_scale(assumed: Sequence[str]) -> list[str]:
    """Return the assumptions without which the scale of an operator is not known, so that no limit can be proven."""
    return [text for text in assumed if text.startswith(_UNKNOWN)]


def _doubt(row: Row, line: float, shown: str, above: list[str]) -> str:
    """Return why an interval decides nothing."""
    loose = "; not converged, --max-matvecs allows more work" if row.converged is False else ""
    if row.upper is None:
        return f"no upper bound is proven{loose}"
    if row.upper_kind == "probabilistic" and row.upper <= line:
        return f"its upper bound {distinct(row.upper, line)} is probabilistic (--accept-probabilistic){loose}"
    text = f"its upper bound {distinct(row.upper, line)} exceeds {shown}"
    if above:
        return f"{text}; {'; '.join(above)} assumed, so the real σ₁ may be smaller"
    if row.upper_kind == "probabilistic":
        text = f"{text} and is probabilistic"
    at_least = f", σ₁ is at least {distinct(row.lower, line)}" if row.lower else ""
    return f"{text}{at_least}{loose}"


def _unanalysed(row: Row) -> str:
    if row.status in ("skipped", "failed"):
        return f"{row.status}: {row.note}" if row.note else row.status
    return "nothing is known of σ₁"
