"""From intervals to verdicts: nothing computed, every case by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spectool.api.baselines import Earlier
from spectool.api.verdicts import Gate, judge
from spectool.report import CheckReport, CheckRow, Report, Row

EXACT = Row(
    "fc.weight",
    "layer",
    "linear",
    ("fc.weight",),
    (4, 4),
    input_shape=(4,),
    output_shape=(4,),
    sigma=(1.5,),
    sigma_lower=(1.4,),
    sigma_upper=(1.6,),
    upper_kind="exact",
    converged=True,
)
ANYWHERE = replace(EXACT, input_shape=None, assumed=("infinite grid, stride 1, zero padding", "groups=1"))


@pytest.mark.parametrize(
    ("limit", "slack", "verdict"),
    [
        (1.6, 0.0, "proven"),  # at most: the limit itself is within
        (1.5999, 0.0, "undecided"),
        (1.4, 0.0, "undecided"),  # greater, not at least
        (1.3999, 0.0, "violated"),
        (1.5, 0.1, "proven"),
        (1.5, 0.05, "undecided"),
        (1.3, 0.1, "undecided"),  # slack moves the line for violations, too
        (1.3, 0.05, "violated"),
    ],
)
def test_the_interval_decides(limit: float, slack: float, verdict: str) -> None:
    found = judge(EXACT, limit, Gate(slack=slack))
    assert (found.verdict, found.limit, found.slack) == (verdict, limit, slack)
    assert bool(found.reason) == (verdict != "proven")


def test_slack_is_the_same_as_a_greater_limit() -> None:
    for limit in (1.0, 1.35, 1.4, 1.45, 1.55, 1.6):
        assert judge(EXACT, limit, Gate(slack=0.07)).verdict == judge(EXACT, limit * 1.07, Gate()).verdict


def test_a_better_interval_never_changes_a_decided_verdict() -> None:
    ends = [(1.4 + i / 100, 1.6 - j / 100) for i in range(0, 10, 3) for j in range(0, 10, 3)]
    for limit in (1.3, 1.45, 1.55, 1.65):
        for slack in (0.0, 0.05):
            before = judge(EXACT, limit, Gate(slack)).verdict
            for lower, upper in ends:
                after = judge(replace(EXACT, sigma_lower=(lower,), sigma_upper=(upper,)), limit, Gate(slack))
                assert before in ("undecided", after.verdict)


def test_the_slack_that_is_missing_is_told_and_would_do() -> None:
    found = judge(EXACT, 1.5, Gate(slack=0.01))
    assert found.needs == pytest.approx(1.6 / 1.5 - 1)
    assert judge(EXACT, 1.5, Gate(slack=found.needs * 1.0000001)).verdict == "proven"
    assert judge(EXACT, 1.3, Gate()).needs is None  # violated: no slack to suggest


def test_the_reason_shows_on_which_side_the_numbers_lie() -> None:
    close = replace(EXACT, sigma_lower=(1.00000012,), sigma_upper=(1.0000002,))
    assert judge(close, 1.0, Gate()).reason == "σ₁ is at least 1.0000001 and exceeds the limit 1"
    assert "1.0000002" in judge(replace(close, sigma_lower=(0.9,)), 1.0, Gate()).reason


def test_a_bound_by_chance_proves_nothing_unless_accepted() -> None:
    chance = replace(EXACT, upper_kind="probabilistic")
    found = judge(chance, 2.0, Gate())
    assert (found.verdict, found.needs) == ("undecided", None)
    assert "--accept-probabilistic" in found.reason
    assert judge(chance, 2.0, Gate(accept_probabilistic=True)).verdict == "proven"
    # Its lower end is no matter of chance.
    assert judge(chance, 1.0, Gate()).verdict == "violated"


def test_without_an_upper_end_nothing_is_proven() -> None:
    found = judge(replace(EXACT, sigma_upper=(None,), upper_kind="none", converged=False), 9.0, Gate())
    assert found.verdict == "undecided"
    assert "no upper bound" in found.reason
    assert "--max-matvecs" in found.reason


def test_an_operator_of_unknown_geometry_is_never_violated() -> None:
    assert judge(ANYWHERE, 1.7, Gate()).verdict == "proven"
    found = judge(ANYWHERE, 1.0, Gate())
    assert found.verdict == "undecided"
    assert "infinite grid" in found.reason
    for assumed in ("infinite grid", "groups=1", "eps=1e-5"):
        assert judge(replace(EXACT, assumed=(assumed,)), 1.0, Gate()).verdict == "undecided"
    known = replace(EXACT, assumed=("architecture: torchvision:resnet18 (recognised)",))
    assert judge(known, 1.0, Gate()).verdict == "violated"


def test_an_unknown_scale_decides_nothing() -> None:
    scaled = replace(EXACT, assumed=("alpha=r",))
    for limit in (1.0, 9.0):
        found = judge(scaled, limit, Gate())
        assert (found.verdict, found.needs) == ("undecided", None)
        assert "alpha=r" in found.reason


@pytest.mark.parametrize("status", ["skipped", "failed"])
def test_what_was_not_analysed_is_undecided_and_says_why(status: str) -> None:
    row = Row("a", "layer", "conv2d", ("a",), (1, 1, 3, 3), status=status, note="not understood")  # type: ignore[arg-type]
    assert judge(row, 9.0, Gate()).reason == f"{status}: not understood"
    assert judge(row, 9.0, Gate()).verdict == "undecided"
    assert judge(row, None, Gate(), None, compared=True).verdict == "undecided"


# --- baselines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "tolerance", "comparison", "verdict"),
    [
        ((1.4, 1.6), 0.0, "held", "proven"),  # unchanged
        ((1.5, 1.59), 0.01, "held", "proven"),
        ((1.0, 1.3), 0.01, "regressed", "violated"),
        ((1.0, 1.39), 0.01, "undecided", "undecided"),
        ((1.0, 1.5), 0.0, "undecided", "undecided"),
        ((None, None), 0.0, "undecided", "undecided"),
        ((0.0, 0.0), 0.5, "regressed", "violated"),
    ],
)
def test_a_row_is_held_or_has_regressed(
    then: tuple[float | None, float | None], tolerance: float, comparison: str, verdict: str
) -> None:
    earlier = Earlier(*then, input_shape=(4,))
    found = judge(EXACT, None, Gate(tolerance=tolerance), earlier, compared=True)
    assert found.baseline is not None
    assert (found.baseline.verdict, found.verdict) == (comparison, verdict)
    assert (found.baseline.lower, found.baseline.upper) == then
    assert found.limit is None


def test_with_a_limit_and_a_baseline_the_worse_verdict_counts() -> None:
    def both(limit: float, upper: float) -> str:
        return judge(EXACT, limit, Gate(), Earlier(1.0, upper), compared=True).verdict

    assert both(1.7, 1.7) == "proven"
    assert both(1.0, 1.7) == both(1.7, 1.0) == both(1.0, 1.5) == "violated"
    assert both(1.5, 1.7) == both(1.7, 1.5) == "undecided"


def test_a_new_row_is_judged_by_its_limit_alone() -> None:
    found = judge(EXACT, None, Gate(), None, compared=True)
    assert (found.verdict, found.reason) == ("unlimited", "not in the baseline")
    assert found.baseline is not None
    assert found.baseline.verdict == "new"
    assert judge(EXACT, 1.0, Gate(), None, compared=True).verdict == "violated"


def test_equal_assumptions_cancel_in_a_comparison_and_different_ones_do_not() -> None:
    small = Earlier(0.5, 0.6, ANYWHERE.assumed, None)
    assert judge(ANYWHERE, None, Gate(), small, compared=True).verdict == "violated"
    assert judge(ANYWHERE, None, Gate(), replace(small, assumed=()), compared=True).verdict == "undecided"


# --- the whole --------------------------------------------------------------------------------------------


def report(*verdicts: str) -> CheckReport:
    rows = tuple(
        CheckRow(replace(EXACT, layer=f"r{place}"), verdict, 1.0) for place, verdict in enumerate(verdicts)
    )  # type: ignore[arg-type]
    return CheckReport(
        rows, Report(tuple(row.row for row in rows), "net.pt", "torch-zip", None, {"k": 1}, "0")
    )


@pytest.mark.parametrize(
    ("verdicts", "code", "summary"),
    [
        (["proven", "proven"], 0, "PASS: 2 of 2 operators are proven to obey their bounds"),
        (["proven", "unlimited"], 0, "PASS: 1 of 1 operator is proven to obey its bound, 1 not gated"),
        (["violated", "proven"], 1, "FAIL: 1 of 2 operators exceeds its bound"),
        (
            ["violated", "undecided", "violated"],
            1,
            "FAIL: 2 of 3 operators exceed their bounds, 1 undecided",
        ),
        (["undecided", "proven"], 4, "UNDECIDED: 1 of 2 operators neither proven nor violated"),
    ],
)
def test_verdicts_sum_up_to_an_exit_code(verdicts: list[str], code: int, summary: str) -> None:
    found = report(*verdicts)
    assert (found.exit_code(), found.exit_code(strict=True)) == (code, code)
    assert found.ok == (code == 0)
    assert found.summary() == summary


def test_strict_minds_skipped_operators_that_no_limit_concerns() -> None:
    skipped = CheckRow(
        Row("s", "layer", "conv2d", ("s",), (1, 1), status="skipped", note="no"), "unlimited", reason="none"
    )
    proven = report("proven").rows[0]
    found = replace(
        report("proven"),
        rows=(proven, skipped),
        report=replace(report("proven").report, rows=(proven.row, skipped.row)),
    )
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 5)
    assert found.coverage == (1, 2, 1)
