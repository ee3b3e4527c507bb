"""Every format read back by an independent reader: csv, pandas, openpyxl, json, jsonschema."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import openpyxl
import pytest
from report_cases import conv_row, linear_row, pair_row, skipped_row, small_report

from spectool.errors import UsageError
from spectool.report import FORMATS, Report, Row, WriteOptions, format_of, to_document, to_frame, write
from spectool.report.layout import check_options

ROOT = Path(__file__).parents[1]
CONTRACT = (
    "layer,level,kind,weights,weight_shape,input_shape,output_shape,sigma_1,sigma_1_lower,sigma_1_upper,upper_kind,"
    "residual,multiplicity,converged,fro,stable_rank,method,matvecs,seconds,assumed,status,note"
)
HOSTILE = (
    "=1+1",
    "+x",
    "-x",
    "@x",
    "\tx",
    "\rx",
    "1.10",
    "2/3",
    "a,b",
    'say "x"',
    "two\nlines",
    "\x1b[31mred",
    "pipe|",
)


def written(report: Report, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    write(report, format, stream, options=WriteOptions(**options))
    return stream.getvalue()


def csv_rows(report: Report, **options: Any) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(written(report, "csv", **options).decode(), newline="")))


def named(name: str) -> Row:
    return replace(linear_row(), layer=name, weights=(name,), note="")


def test_csv_header_is_the_contract() -> None:
    data = written(small_report(), "csv")
    assert data.split(b"\r\n")[0].decode() == f"{CONTRACT},sigma_2,sigma_3"
    assert not data.startswith(b"\xef\xbb\xbf")
    assert data.count(b"\r\n") == data.count(b"\n") == len(small_report().rows) + 1


def test_csv_columns_follow_k_and_not_the_longest_row() -> None:
    header = written(replace(small_report(linear_row()), settings={"k": 5}), "csv").split(b"\r\n")[0].decode()
    assert header == f"{CONTRACT},sigma_2,sigma_3,sigma_4,sigma_5"


def test_csv_cells() -> None:
    conv, norm, pair, wide, linear, skipped, *_ = csv_rows(small_report())
    assert conv["sigma_1"] == "15.916402310987653"
    assert conv["sigma_3"] == "0.30000000000000004"
    assert conv["weight_shape"] == "64x3x7x7"
    assert conv["converged"] == "true"
    assert norm["weights"] == "layer1.0.bn1.weight;layer1.0.bn1.running_var"
    assert pair["weight_shape"] == "64x3x7x7;64"
    assert pair["fro"] == ""
    assert wide["input_shape"] == wide["output_shape"] == "any"
    assert wide["assumed"] == "infinite grid, stride 1, zero padding;groups=1"
    assert wide["sigma_2"] == wide["fro"] == ""
    assert linear["input_shape"] == "512"
    assert skipped["input_shape"] == skipped["sigma_1"] == skipped["converged"] == ""
    assert skipped["note"] == "quantised to 4 bits in a layout that is not known"


def test_csv_floats_are_exact() -> None:
    row = conv_row()
    read = csv_rows(small_report(row))[0]
    assert [float(read["sigma_1"]), float(read["sigma_2"]), float(read["sigma_3"])] == list(row.sigma)
    assert float(read["sigma_1_lower"]) == row.lower
    assert float(read["sigma_1_upper"]) == row.upper


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", ["csv", "tsv", "json", "jsonl", "md"])
def test_no_format_holds_nan_or_infinity(format: str, bad: float) -> None:
    row = replace(linear_row(), sigma_upper=(bad, None), fro=bad, seconds=bad, residual=bad, note="")
    report = replace(small_report(row), settings={"k": 2, "tol": bad})
    for tidy in (False, True):
        text = written(report, format, tidy=tidy).decode().lower()
        assert "nan" not in text
        assert "inf" not in text


def test_csv_guards_what_a_spreadsheet_misreads_and_counts_it() -> None:
    report = small_report(*map(named, HOSTILE))
    stream = io.BytesIO()
    # Eight of the names, each in `layer` and in `weights`.
    assert write(report, "csv", stream) == 16
    rows = list(csv.DictReader(io.StringIO(stream.getvalue().decode(), newline="")))
    expected = [f"'{name}" for name in HOSTILE[:8]] + [*HOSTILE[8:11], "\\x1b[31mred", HOSTILE[12]]
    assert [row["layer"] for row in rows] == expected
    assert [row["weights"] for row in rows] == expected
    assert {row["sigma_1"] for row in rows} == {"3.5"}


def test_csv_guard_can_be_turned_off() -> None:
    report = small_report(*map(named, HOSTILE[:8]))
    stream = io.BytesIO()
    assert write(report, "csv", stream, options=WriteOptions(guard=False)) == 0
    rows = list(csv.DictReader(io.StringIO(stream.getvalue().decode(), newline="")))
    assert [row["layer"] for row in rows] == list(HOSTILE[:8])


def test_tsv_has_one_line_per_row_and_one_tab_per_cell_whatever_the_names() -> None:
    report = small_report(*map(named, (*HOSTILE, "back\\slash")))
    lines = written(report, "tsv").decode().split("\n")
    assert lines[-1] == ""
    assert len(lines) == len(HOSTILE) + 3
    assert {line.count("\t") for line in lines[:-1]} == {len(CONTRACT.split(",")) + 1}
    names = [line.split("\t")[0] for line in lines[1:-1]]
    assert [name.encode().decode("unicode_escape") for name in names] == [*HOSTILE, "back\\slash"]


def test_markdown_escapes_markup_and_keeps_the_table_whole() -> None:
    lines = (
        written(small_report(*map(named, HOSTILE)), "md", columns=("layer", "sigma_1")).decode().splitlines()
    )
    assert lines[0] == "| layer | sigma_1 |"
    assert lines[1] == "| --- | ---: |"
    assert len(lines) == len(HOSTILE) + 2
    assert lines[-1] == "| pipe\\| | 3.5 |"
    assert "\x1b" not in "".join(lines)


def test_json_is_the_documented_schema() -> None:
    schema = json.loads((ROOT / "docs/schema/inspect.schema.json").read_text())
    document = json.loads(written(small_report(), "json"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    assert document == to_document(small_report()) == small_report().to_dict()
    assert list(document) == ["schema", "spectool", "file", "settings", "rows"]
    assert list(document["rows"][0]) == schema["$defs"]["row"]["required"]


def test_json_rows_hold_the_numbers() -> None:
    conv, _, pair, wide, *_ = to_document(small_report())["rows"]
    assert conv["sigma"] == list(conv_row().sigma)
    assert conv["sigma_upper"] == [15.91640233, 12.250001, None]
    assert conv["lower"] == conv["sigma_lower"][0]
    assert pair["weight_shape"] == [[64, 3, 7, 7], [64]]
    assert wide["input_shape"] is None
    assert to_document(small_report(skipped_row()))["rows"][0]["upper"] is None


def test_json_says_the_same_twice() -> None:
    assert written(small_report(), "json") == written(small_report(), "json")


def test_json_is_ascii_even_for_hostile_names() -> None:
    data = written(small_report(named("\x1b\x7f\x9b\u202e\udcffσ")), "json")
    assert all(32 <= byte < 127 or byte == 10 for byte in data)
    assert json.loads(data)["rows"][0]["layer"] == "\x1b\x7f\x9b\u202e\udcffσ"


def test_tidy_json_is_the_documented_schema() -> None:
    schema = json.loads((ROOT / "docs/schema/inspect-tidy.schema.json").read_text())
    document = json.loads(written(small_report(), "json", tidy=True))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    assert len(document["spectrum"]) == 3 + 3 + 3 + 1 + 2


def test_json_lines_are_the_rows_of_the_document() -> None:
    lines = written(small_report(), "jsonl").decode().splitlines()
    assert [json.loads(line) for line in lines] == to_document(small_report())["rows"]


@pytest.mark.parametrize("format", ["csv", "tsv"])
def test_tidy_has_one_row_per_value(format: str) -> None:
    text = written(small_report(pair_row(), linear_row()), format, tidy=True).decode()
    rows = list(csv.reader(io.StringIO(text), delimiter="," if format == "csv" else "\t"))
    assert rows[0] == ["layer", "level", "index", "sigma", "lower", "upper", "residual"]
    assert rows[1] == [pair_row().layer, "composed", "1", "9.875", "9.874999", "9.876", "1e-06"]
    assert rows[2] == [pair_row().layer, "composed", "2", "8.5", "8.49", "8.51", ""]
    assert len(rows) == 1 + 3 + 2


def test_columns_are_picked_in_their_order() -> None:
    text = written(small_report(linear_row()), "csv", columns=("sigma_2", "layer")).decode()
    assert text == "sigma_2,layer\r\n1.25,fc.weight\r\n"


def test_sorting_puts_unknown_last_both_ways() -> None:
    for sort, expected in (
        ("sigma_1", [1.5, 2.0, 3.5, 9.875, 15.916402310987653]),
        ("-sigma_1", [15.916402310987653, 9.875, 3.5, 2.0, 1.5]),
    ):
        cells = [row["sigma_1"] for row in csv_rows(small_report(), sort=sort)]
        assert [float(cell) for cell in cells[:5]] == expected
        assert cells[5:] == ["", "", ""]
        document = json.loads(written(small_report(), "json", sort=sort))
        assert [row["sigma"][0] for row in document["rows"][:5]] == expected


def test_unknown_columns_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no column called 'sigma1'") as error:
        check_options(WriteOptions(columns=("sigma1",)), "csv", 3)
    assert "sigma_1" in error.value.hint
    with pytest.raises(UsageError, match="no column called 'sigma_4'"):
        check_options(WriteOptions(sort="-sigma_4"), "csv", 3)
    with pytest.raises(UsageError, match="no column called 'kind'"):
        check_options(WriteOptions(columns=("kind",), tidy=True), "csv", 3)
    with pytest.raises(UsageError, match="does not apply to json"):
        check_options(WriteOptions(columns=("kind",)), "json", 3)


def test_workbook_cells_are_typed(tmp_path: Path) -> None:
    place = tmp_path / "net.xlsx"
    write(small_report(*map(named, HOSTILE), conv_row()), "xlsx", place)
    book = openpyxl.load_workbook(place)
    assert book.sheetnames == ["layers", "spectrum", "run"]
    sheet = book["layers"]
    header = [cell.value for cell in sheet[1]]
    assert ",".join(map(str, header)) == f"{CONTRACT},sigma_2,sigma_3"
    for line, name in enumerate(HOSTILE, start=2):
        cell = sheet.cell(line, 1)
        shown = name.replace("\t", "\\t").replace("\r", "\\r").replace("\n", "\\n").replace("\x1b", "\\x1b")
        assert (cell.value, cell.data_type, cell.hyperlink) == (shown, "s", None)
    last = dict(zip(header, sheet[len(HOSTILE) + 2], strict=True))
    assert last["sigma_1"].value == 15.916402310987653
    assert last["sigma_3"].value == 0.1 + 0.2
    assert last["matvecs"].value == 412
    assert last["converged"].value is True
    assert last["note"].value is None
    assert sheet.freeze_panes == "B2"
    assert sheet.auto_filter.ref == f"A1:{sheet.cell(1, len(header)).column_letter}{len(HOSTILE) + 2}"
    ((cells, rules),) = [(entry.sqref, entry.rules) for entry in sheet.conditional_formatting]
    assert str(cells) == f"H2:H{len(HOSTILE) + 2}"
    assert rules[0].type == "colorScale"
    assert book["spectrum"].max_row == 1 + 2 * len(HOSTILE) + 3
    run = dict(book["run"].iter_rows(min_row=2, max_col=2, values_only=True))
    assert run["file"] == "net.pt"
    assert run["settings.k"] == 3
    assert run["settings.input_shape"] == "x=1;3;224;224"


def test_workbook_opens_at_the_tidy_sheet(tmp_path: Path) -> None:
    write(small_report(), "xlsx", tmp_path / "a.xlsx", options=WriteOptions(tidy=True))
    assert openpyxl.load_workbook(tmp_path / "a.xlsx").active.title == "spectrum"


def test_frame_has_the_columns_of_the_csv_typed() -> None:
    frame = to_frame(small_report())
    assert list(frame.columns) == f"{CONTRACT},sigma_2,sigma_3".split(",")
    assert frame["sigma_1"].dtype == "float64"
    assert frame["matvecs"].dtype == "Int64"
    assert frame["converged"].dtype == "boolean"
    assert frame["sigma_1"][0] == conv_row().sigma[0]
    assert frame["fro"].isna().tolist() == [False, False, True, True, False, True, True, True]
    assert "<table" in small_report()._repr_html_()
    assert list(to_frame(small_report(skipped_row())).columns)[-1] == "sigma_3"


def test_a_format_is_told_by_its_suffix() -> None:
    assert {format_of(f"net.{name}") for name in FORMATS} == set(FORMATS)
    assert format_of("NET.CSV") == "csv"
    with pytest.raises(UsageError, match=r"from suffix \.xls") as error:
        format_of("net.xls")
    assert error.value.hint == (
        "did you mean .xlsx? known: .csv, .tsv, .json, .jsonl, .md, .xlsx; or give --format"
    )
    with pytest.raises(UsageError, match="from a name without a suffix"):
        format_of("net")
    with pytest.raises(UsageError, match="no format called 'xml'"):
        write(small_report(), "xml", io.BytesIO())


def test_coverage_counts_every_operator_once() -> None:
    assert small_report().coverage == (4, 5, 1)
    # Only compositions have rows (`--level composed`): their operators count, those they share count once.
    pair = pair_row()
    assert small_report(pair).coverage == (1, 1, 0)
    chain = replace(pair, layer="a.weight + b.weight", operators=2)
    longer = replace(pair, layer="b.weight + c.weight", operators=2)
    assert small_report(chain, longer).coverage == (3, 3, 0)
