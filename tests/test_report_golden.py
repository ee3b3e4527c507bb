"""Whole rendered files and tables, compared byte for byte with what a person once looked at."""

from __future__ import annotations

import io

import pytest
from goldens import check_golden
from report_cases import small_report
from rich.console import Console

from spectool.cli.conclusion import draw_report
from spectool.report import WriteOptions, write


@pytest.mark.parametrize("tidy", [False, True], ids=["rows", "tidy"])
@pytest.mark.parametrize("format", ["csv", "tsv", "json", "jsonl", "md"])
def test_files(format: str, tidy: bool) -> None:
    stream = io.BytesIO()
    write(small_report(), format, stream, options=WriteOptions(tidy=tidy))
    check_golden(f"{'tidy' if tidy else 'report'}.{format}", stream.getvalue())


def drawn(options: WriteOptions, width: int | None) -> str:
    stream = io.StringIO()
    drawing, hidden = draw_report(small_report(), options, width)
    Console(file=stream, width=width or 1000, color_system=None).print(drawing, crop=False)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return "\n".join([*lines, "", f"hidden: {', '.join(hidden)}", ""])


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200, None])
def test_terminal_table(width: int | None) -> None:
    check_golden(f"table_{width or 'full'}.txt", drawn(WriteOptions(), width))


@pytest.mark.parametrize(
    "name, options",
    [
        ("sorted", WriteOptions(sort="-sigma_1")),
        ("columns", WriteOptions(columns=("layer", "sigma_1_lower", "sigma_1", "sigma_1_upper", "note"))),
        ("tidy", WriteOptions(tidy=True)),
    ],
)
def test_terminal_table_as_asked_for(name: str, options: WriteOptions) -> None:
    check_golden(f"table_{name}.txt", drawn(options, 100))


@pytest.mark.parametrize("width", range(30, 220, 7))
def test_no_line_is_wider_than_the_terminal_and_no_number_loses_its_interval(width: int) -> None:
    text = drawn(WriteOptions(), width)
    table = text.split("\n\n")[0].splitlines()
    assert max(len(line) for line in table) <= max(width, 40)
    assert "15.916  [15.916, 15.917]" in table[2]
    assert "9.8750  [9.8749, 9.8760]" in table[4]
