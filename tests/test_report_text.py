"""How values become text: exact floats, visible names, and what a spreadsheet would misread."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectool.report.text import finite, needs_guard, number_text, shape_text, visible


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_read_back_as_the_same_float(value: float) -> None:
    assert float(number_text(value)) == value


def test_numpy_floats_are_written_as_plain_numbers() -> None:
    import numpy as np

    assert number_text(np.float64(0.1)) == "0.1"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
def test_nan_and_infinity_are_unknown(value: float | None) -> None:
    assert finite(value) is None


def test_shapes() -> None:
    assert shape_text((64, 3, 7, 7)) == "64x3x7x7"
    assert shape_text((512,)) == "512"
    assert shape_text(()) == "scalar"


@given(st.text())
def test_visible_text_holds_nothing_that_steers_a_terminal(text: str) -> None:
    shown = visible(text)
    assert all(unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in shown)
    shown.encode("utf-8")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb", "a\\nb"),
        ("\u202eevil", "\\u202eevil"),
        ("\x9b2J", "\\x9b2J"),
        ("\udcff", "\\udcff"),
        ("σ₁ größe", "σ₁ größe"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "=1+1", "+a", "-conv", "@x", "\tname", "\rname",
        "1", "1.10", " 2 ", "1e5", "-3", "1_000", "1,000", "5%", "$5", "(5)", "inf", "NaN", "１.５",
        "2/3", "1-2", "2020-01-02", "1/2/2020", "1.10.2", "2020-01-02 10:30", "2020-01-02T10:30:00Z", "1:30", "1 1/2",
        "MAR1", "dec-5", "5 Jan", "Jan 5, 2020", "1mar", "sept2",
    ],
)  # fmt: skip
def test_what_a_spreadsheet_misreads_is_guarded(text: str) -> None:
    assert needs_guard(text)


@pytest.mark.parametrize(
    "text",
    [
        "conv1.weight",
        "1.10.weight",
        "layer1.0.conv1",
        "decoder1",
        "market1",
        "v1.2",
        "key[0:64]",
        "a + b",
        "",
        "mar",
        "x=1",
    ],
)
def test_ordinary_names_are_left_alone(text: str) -> None:
    assert not needs_guard(text)
