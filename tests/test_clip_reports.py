"""What ``clip`` did in every format, hostile names included; nothing computed."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import openpyxl
import pandas as pd
import pytest
from report_cases import any_size_row, conv_row, failed_row, linear_row, nonlinear_row, pair_row, skipped_row
from rich.console import Console

from spectool.cli.clip_table import draw_clip, percent
from spectool.cli.clipped import next_steps, written_line
from spectool.errors import UsageError
from spectool.report import ClipReport, ClipRow, Report, WriteOptions, write_clip
from spectool.report.clip import Enclosed
from spectool.report.clip_tables import CLIP_COLUMNS, clip_columns
from spectool.report.layers import layer_columns

ROOT = Path(__file__).parents[1]
HOSTILE = (
    "two\nlines\r\nand a tab\t",
    "\x1b[31mred\x07\x00\x9b",
    "\"quoted\" & <tag attr='1'>]]>",
    "=cmd|'/c calc'!A1",
    "\u202eright\u2028to left",
    "\udcff surrogate",
    "a|b;c,d",
    "σ 层 🎉",
)
SETTINGS = {"k": 3, "max": {"*": 2.0, "head.*": 1.5}, "level": "composed", "input_shape": {"x": [1, 3, 8, 8]}}


def one_row(name: str = "fc.weight", **more: Any) -> ClipRow:
    """Return a clipped Linear."""
    row = replace(
        linear_row(),
        layer=name,
        sigma=(2.0, 1.25),
        sigma_lower=(1.9999, 1.2),
        sigma_upper=(2.0, 1.3),
        note="",
    )
    made = ClipRow(
        row,
        "clipped",
        2.0,
        Enclosed(3.5, 3.4999, 3.5001),
        Enclosed(2.0, 1.9999, 2.0, 2.0),
        "weights",
        0.0180412,
        0.0180153,
        0.42857,
        0.0180412,
        3e-5,
        (),
        4,
        "svd",
    )
    return replace(made, **more)


def every_sort() -> ClipReport:
    """Return a report with a row of every sort."""
    rows = (
        ClipRow(
            conv_row(),
            "clipped",
            15.92,
            Enclosed(20.0, 19.9, None),
            Enclosed(15.9164, 15.9163, 16.0, 16.0),
            "folded",
            0.05,
            None,
            None,
            float("nan"),
            recentered=("bn1.running_mean", "bn2.running_mean"),
            iterations=7,
            solver="bundle",
            reason="not convex",
        ),
        one_row(),
        ClipRow(any_size_row(), "kept", 3.0, Enclosed(2.0, 1.9, 2.1), Enclosed(2.0, 1.9, 2.1, 2.1)),
        ClipRow(
            pair_row(), "refused", 2.0, Enclosed(9.875, 9.8, 9.9), Enclosed(9.875, 9.8, 9.9), reason="tied"
        ),
        ClipRow(skipped_row(), "refused", 2.0, reason="skipped"),
        ClipRow(failed_row(), "refused", 2.0, reason="NaN"),
        ClipRow(nonlinear_row(), "listed", None, reason="not linear"),
    )
    report = Report(tuple(row.row for row in rows), "out.onnx", "onnx", None, SETTINGS, "0.1.0")
    return ClipReport(
        rows, report, "out.onnx", ("w", "bn1.running_mean"), False, {"bn1.running_mean": 0.25}, 120, "in.onnx"
    )


def only(*rows: ClipRow, **more: Any) -> ClipReport:
    report = Report(tuple(row.row for row in rows), "out.pt", "torch-zip", None, SETTINGS, "0.1.0")
    return replace(ClipReport(rows, report, "out.pt", ("w",), tensors=120), **more)


def written(report: ClipReport, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    write_clip(report, format, stream, options=WriteOptions(**options))
    return stream.getvalue()


def drawn(report: ClipReport, width: int | None = None, every: bool = False) -> str:
    drawing, _ = draw_clip(report, WriteOptions(), width, every)
    stream = io.StringIO()
    Console(width=width or 1000, file=stream, color_system=None).print(drawing)
    return stream.getvalue()


# --- data -------------------------------------------------------------------------------------------------


def test_json_is_the_documented_schema() -> None:
    schema = json.loads((ROOT / "docs/schema/clip.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for report in (every_sort(), only(*map(one_row, HOSTILE))):
        document = json.loads(written(report, "json"), parse_constant=pytest.fail)
        jsonschema.validate(document, schema)
        assert document == report.to_dict()
        assert list(document) == schema["required"] == list(schema["properties"])
        for row in document["rows"]:
            assert (
                list(row) == schema["$defs"]["row"]["required"] == list(schema["$defs"]["row"]["properties"])
            )


def test_json_rows_are_those_of_inspect_and_what_became_of_them() -> None:
    inspect, clip = (
        json.loads((ROOT / f"docs/schema/{name}.schema.json").read_text())["$defs"]["row"]
        for name in ("inspect", "clip")
    )
    count = len(inspect["required"])
    assert clip["required"][:count] == inspect["required"]
    assert {name: clip["properties"][name] for name in inspect["properties"]} == inspect["properties"]
    assert clip["required"][count:] == [
        *("limit", "action", "before", "after", "metric", "change", "change_lower_bound", "change_scaling"),
        *("raw_change", "below_limit_disturbed", "recentered", "iterations", "solver", "reason"),
    ]


def test_json_says_what_changed() -> None:
    document = every_sort().to_dict()
    assert document["counts"] == {"clipped": 2, "kept": 1, "listed": 1, "refused": 3}
    assert (document["source"], document["output"], document["tensors"]) == ("in.onnx", "out.onnx", 120)
    assert document["changed"] == ["w", "bn1.running_mean"]
    assert document["adjusted"] == {"bn1.running_mean": 0.25}
    conv, linear, *_, listed = document["rows"]
    assert conv["before"] == {"sigma": 20.0, "lower": 19.9, "upper": None}
    assert conv["after"] == {"sigma": 15.9164, "lower": 15.9163, "upper": 16.0, "proven": 16.0}
    assert conv["raw_change"] is None
    assert conv["recentered"] == ["bn1.running_mean", "bn2.running_mean"]
    assert (linear["change"], linear["change_lower_bound"]) == (0.0180412, 0.0180153)
    assert (listed["before"], listed["after"], listed["limit"]) == (None, None, None)


def test_csv_has_the_columns_of_inspect_and_more_at_the_end() -> None:
    rows = list(csv.reader(io.StringIO(written(every_sort(), "csv").decode())))
    assert rows[0] == [column.name for column in clip_columns(3)]
    assert rows[0] == [column.name for column in (*layer_columns(3), *CLIP_COLUMNS)]
    assert rows[0][-16:] == [
        *(
            "limit",
            "action",
            "sigma_1_before",
            "sigma_1_before_lower",
            "sigma_1_before_upper",
            "proven",
            "metric",
        ),
        *(
            "change",
            "change_lower_bound",
            "change_scaling",
            "raw_change",
            "below_limit_disturbed",
            "recentered",
        ),
        *("iterations", "solver", "reason"),
    ]
    first = dict(zip(rows[0], rows[1], strict=True))
    assert (first["sigma_1"], first["sigma_1_before"], first["proven"]) == (
        "15.916402310987653",
        "20.0",
        "16.0",
    )
    assert (first["change"], first["change_lower_bound"], first["raw_change"]) == ("0.05", "", "")
    assert first["recentered"] == "bn1.running_mean;bn2.running_mean"
    assert rows[-1][-16:] == ["", "listed", *[""] * 13, "not linear"]
    frame = pd.read_csv(io.BytesIO(written(every_sort(), "csv")))
    assert frame["change"].tolist()[:2] == [0.05, 0.0180412]
    assert frame["iterations"].tolist()[:2] == [7, 4]
    assert frame["action"].tolist() == [row.action for row in every_sort().rows]


def test_csv_keeps_hostile_names_apart_and_guards_them() -> None:
    report = only(*(one_row(name, reason=name) for name in HOSTILE))
    rows = list(csv.DictReader(io.StringIO(written(report, "csv").decode())))
    assert len({row["layer"] for row in rows}) == len(HOSTILE)
    assert rows[3]["layer"] == rows[3]["reason"] == f"'{HOSTILE[3]}"
    assert rows[-1]["reason"] == HOSTILE[-1]
    assert "\x1b" not in written(report, "csv").decode()


def test_every_format_holds_all_rows() -> None:
    report = every_sort()
    assert len(written(report, "tsv").decode().splitlines()) == 8
    assert len(written(report, "jsonl").decode().splitlines()) == 7
    assert len(written(report, "md").decode().splitlines()) == 9
    book = openpyxl.load_workbook(io.BytesIO(written(report, "xlsx")))
    assert book.sheetnames == ["clip", "run"]
    assert book["clip"].max_row == 8
    facts = {row[0].value: row[1].value for row in book["run"].iter_rows(min_row=2)}
    assert (facts["output"], facts["tensors"], facts["action.refused"]) == ("out.onnx", 120, 3)
    frame = report.to_pandas()
    assert str(frame["iterations"].dtype) == "Int64"
    assert frame["proven"].tolist()[:3] == [16.0, 2.0, 2.1]
    assert report._repr_html_().startswith("<")


def test_columns_and_order_can_be_asked_for() -> None:
    text = written(every_sort(), "csv", columns=("action", "change"), sort="-change").decode()
    assert text.splitlines()[:3] == ["action,change", "clipped,0.05", "clipped,0.0180412"]
    with pytest.raises(UsageError, match="there is no column called 'changes'"):
        written(every_sort(), "csv", columns=("changes",))
    with pytest.raises(UsageError, match="there is no format called 'junit'"):
        written(every_sort(), "junit")


def test_exit_codes() -> None:
    assert only(one_row()).exit_code() == 0
    assert only(one_row(), replace(one_row(), action="refused")).exit_code() == 4
    loose = replace(one_row(), after=Enclosed(1.9999, 1.9, 2.1, 2.1))
    assert only(loose).exit_code() == 0
    assert only(loose, prove=True).exit_code() == 4
    assert only(replace(one_row(), after=Enclosed(2.001, 2.0, 2.1, 2.1))).exit_code() == 4


# --- the table and what is said ---------------------------------------------------------------------------


def test_the_table_shows_what_was_done_and_every_reason() -> None:
    text = drawn(every_sort())
    lines = text.splitlines()
    assert "3.5000 → 2.0000" in text
    assert "1.804%" in text
    assert "1.801%" in text
    assert sum("clipped" in line.split()[-1:] for line in lines) == 2
    assert "head.weight" not in text.split("not clipped  ")[0].splitlines()[2:5]
    for reason in ("tied", "NaN", "skipped", "not convex", "running means or biases follow"):
        assert reason in text
    assert "not linear" not in text
    assert "not linear" in drawn(every_sort(), every=True)
    assert "within" in drawn(every_sort(), every=True)


def test_the_table_never_hides_that_a_limit_is_exceeded() -> None:
    above = one_row(after=Enclosed(2.0000001, 2.0, 2.1, 2.1))
    assert "3.5000 → 2.0000001" in drawn(only(above))
    assert "above limit" in drawn(only(above))
    barely = one_row(before=Enclosed(2.00000002, 2.0, 2.1))
    assert "2.00000002 → 2.0000" in drawn(only(barely))
    unproven = one_row(after=Enclosed(1.9999, 1.9, 2.0001, 2.0001))
    assert "not proven" not in drawn(only(unproven))
    assert "not proven" in drawn(only(unproven, prove=True))
    kept = ClipRow(linear_row(), "kept", 3.51, Enclosed(3.5, 3.4, 3.6), Enclosed(3.5, 3.4, 3.6, 3.6))
    assert drawn(only(kept)).strip() == ""
    assert "not proven" in drawn(only(kept, prove=True))


@pytest.mark.parametrize("width", [50, 80, 120, 200])
def test_the_table_fits_and_keeps_what_it_is_for(width: int) -> None:
    rows = [one_row(f"a.very.long.module.path.layer{place}.\x1b[31m.weight") for place in range(3)]
    report = only(*rows)
    text = drawn(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("3.5000 → 2.0000") == text.count("1.804%") == text.count("clipped") == 3
    assert "\x1b" not in text
    _, hidden = draw_clip(report, WriteOptions(), width, False)
    order = ["metric", "by scaling", "kind", "at least", "proven", "limit"]
    assert hidden == order[: len(hidden)]
    assert len(hidden) == (6 if width == 50 else len(hidden))
    assert (hidden == []) == (width == 200)


def test_percent_has_four_digits_and_bounds_round_down() -> None:
    assert [percent(value) for value in (0.0999999, 0.5, 1.0, 1.5, 2.94e-8)] == [
        *("10.00%", "50.00%", "100.0%", "150.0%", "2.940e-6%"),
    ]
    assert percent(0.19999, down=True) == "19.99%"
    assert percent(None) == ""


def test_what_was_written_is_said() -> None:
    assert (
        written_line(only(one_row()))
        == "wrote out.pt: 1 of 120 tensors changed, all other bytes are identical"
    )
    assert written_line(only(one_row(), tensors=None)).startswith("wrote out.pt: 1 tensor changed")
    assert written_line(only(one_row(), changed=())) == "wrote out.pt: nothing changed, it is a copy"
    dry = only(one_row(), output=None)
    assert written_line(dry) == "nothing written (--dry-run): 1 of 120 tensors would change"


def test_hints_say_what_to_do_next() -> None:
    command = "spectool check out.pt --max 2 --max 'head.*=1.5' --input x=1x3x8x8"
    assert list(next_steps(only(one_row()))) == [f"{command} proves it"]
    loose = one_row(after=Enclosed(1.99, 1.9, 2.01, 2.01))
    (hint,) = next_steps(only(loose, one_row()))
    assert hint.startswith(f"1 row not proven within: {command} --slack 0.51%")
    assert float(hint.split("--slack ")[1].split("%")[0]) >= 0.5
    assert hint.endswith("clip --prove goes on until the bound itself is within")
    assert "--prove" not in next(next_steps(only(loose, prove=True)))
    far = one_row(after=Enclosed(1.99, 1.9, 4.0, 4.0))
    assert "--slack" not in next(next_steps(only(far)))
    assert list(next_steps(only(one_row(), output=None))) == ["-o OUT instead of --dry-run writes it"]
    assert list(next_steps(only(one_row(), replace(one_row(), action="refused")))) == []
    assert "raise --max-matvecs" in next(
        next_steps(only(one_row(row=replace(linear_row(), converged=False))))
    )
    anywhere = one_row(row=any_size_row())
    assert "--arch with --input" in next(next_steps(only(anywhere)))
