"""Which limit a row has."""

from __future__ import annotations

import math

import pytest

from spectool.api.limits import Bounds, as_bounds, parse_bounds, parse_fraction
from spectool.errors import UsageError

PAIR = ("layer4.0.conv1.weight + layer4.0.bn1.weight", ("layer4.0.conv1.weight", "layer4.0.bn1.weight"))


def test_a_bare_number_is_the_default_wherever_it_stands() -> None:
    for texts in (["1.5", "layer4.*=0.8"], ["layer4.*=0.8", "1.5"], ["9", "layer4.*=0.8", "1.5"]):
        bounds = parse_bounds(texts)
        assert bounds.for_row("fc.weight") == 1.5
        assert bounds.for_row("layer4.0.conv1.weight") == 0.8


def test_of_the_patterns_that_match_the_last_counts() -> None:
    assert parse_bounds(["layer*=2", "layer4.*=0.8"]).for_row("layer4.x") == 0.8
    assert parse_bounds(["layer4.*=0.8", "layer*=2"]).for_row("layer4.x") == 2.0


def test_a_pattern_matches_the_key_or_any_weight() -> None:
    assert parse_bounds(["*.bn1.weight=3"]).for_row(*PAIR) == 3.0
    assert parse_bounds(["layer4.0.bn1.weight=3"]).for_row(*PAIR) == 3.0
    assert parse_bounds([f"{PAIR[0]}=3"]).for_row(*PAIR) == 3.0
    assert parse_bounds(["bn1*=3"]).for_row(*PAIR) is None


def test_a_key_with_brackets_and_one_with_an_equals_sign_match_themselves() -> None:
    assert parse_bounds(["rnn.weight_ih_l0[0:64]=2"]).for_row("rnn.weight_ih_l0[0:64]") == 2.0
    assert parse_bounds(["a=b.weight=2"]).for_row("a=b.weight") == 2.0


def test_without_a_default_a_row_may_have_no_limit() -> None:
    bounds = parse_bounds(["layer4.*=0.8"])
    assert bounds
    assert bounds.for_row("fc.weight") is None
    assert not parse_bounds([])


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "fc.*=0", "fc.*=nan", "fc.*=-inf"])
def test_limits_are_positive_and_finite(text: str) -> None:
    with pytest.raises(UsageError, match="no positive finite number"):
        parse_bounds([text])


@pytest.mark.parametrize("text", ["", "one", "fc.*", "fc.*=", "1.0=fc.*"])
def test_what_is_no_limit_says_how_one_looks(text: str) -> None:
    with pytest.raises(UsageError, match="is no limit") as caught:
        parse_bounds([text])
    assert "layer4.*=0.8" in caught.value.hint


def test_a_limit_without_its_pattern_is_refused() -> None:
    with pytest.raises(UsageError, match="no pattern before the ="):
        parse_bounds(["=1.0"])


def test_a_pattern_that_matches_nothing_names_the_nearest_keys() -> None:
    rows = [("layer4.0.conv1.weight", ("layer4.0.conv1.weight",)), ("fc.weight", ("fc.weight",))]
    parse_bounds(["1", "fc.*=2"]).check_used(rows)
    with pytest.raises(UsageError, match=r"the limit layr4.0.conv1\.\*=0.8 matches no row") as caught:
        parse_bounds(["fc.*=2", "layr4.0.conv1.*=0.8"]).check_used(rows)
    assert "layer4.0.conv1.weight" in caught.value.hint


def test_the_library_takes_a_number_or_a_mapping() -> None:
    assert as_bounds(None) == Bounds()
    assert as_bounds(2) == Bounds(2.0)
    table = {"layer4.*": 0.8, "*": 1.0}
    assert as_bounds(table).for_row("layer4.x") == 0.8
    assert as_bounds(table).for_row("fc") == 1.0
    given = parse_bounds(["a*=1", "b*=2", "3", "a*=4"])
    again = as_bounds(given.to_dict())
    assert [again.for_row(key) for key in ("ab", "ba", "c")] == [4.0, 2.0, 3.0]


@pytest.mark.parametrize("value", ["1.0", True, {"a": "1"}, [1.0]])
def test_the_library_refuses_what_is_no_number(value: object) -> None:
    with pytest.raises(UsageError, match="is no number"):
        as_bounds(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_the_library_refuses_limits_that_are_none(value: float) -> None:
    with pytest.raises(UsageError, match="no positive finite number"):
        as_bounds(value)
    with pytest.raises(UsageError, match="no positive finite number"):
        as_bounds({"fc.*": value})


def test_a_relative_amount_is_a_percentage_or_a_share() -> None:
    assert parse_fraction("1%", "--slack") == parse_fraction(" 0.01 ", "--slack") == 0.01
    assert parse_fraction("0", "--slack") == 0.0
    for text in ("", "%", "-1%", "nan", "inf", "1%%", "a lot"):
        with pytest.raises(UsageError, match=r"--slack .* is no relative amount"):
            parse_fraction(text, "--slack")
