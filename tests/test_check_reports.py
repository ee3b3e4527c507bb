"""The verdicts in every format, hostile names included; nothing computed."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import openpyxl
import pytest
from report_cases import any_size_row, conv_row, linear_row, pair_row, skipped_row

from spectool.errors import UsageError
from spectool.report import CheckReport, CheckRow, Report, write_check
from spectool.report.check import BaselineEntry, BaselineFile
from spectool.report.layers import LAYER_COLUMNS
from spectool.report.layout import WriteOptions

ROOT = Path(__file__).parents[1]
HOSTILE = (
    "two\nlines\r\nand a tab\t",
    "\x1b[31mred\x07\x00\x9b",
    "::error::%0A%25,title=x:y",
    "\"quoted\" & <tag attr='1'>]]>",
    "=cmd|'/c calc'!A1",
    "\u202eright\u2028to left\ufffe\uffff",
    "\udcff surrogate",
    "σ 层 🎉",
)


def checked(*names: str, verdict: str = "violated") -> CheckReport:
    """Return a report of one row per name, or one of every verdict."""
    if names:
        rows = tuple(
            CheckRow(
                replace(linear_row(), layer=name), verdict, 1.0, 0.0, None, f"{name} exceeds the limit 1"
            )  # type: ignore[arg-type]
            for name in names
        )
    else:
        rows = (
            CheckRow(
                replace(conv_row(), sigma=conv_row().sigma[:1]), "violated", 1.0, 0.01, None, "too large"
            ),
            CheckRow(any_size_row(), "undecided", 1.0, 0.01, None, "known from above only"),
            CheckRow(
                replace(linear_row(), sigma=(), sigma_lower=(), sigma_upper=(3.5,)),
                "proven",
                9.0,
                0.01,
                BaselineEntry(3.4, 3.5, "held"),
            ),
            CheckRow(
                pair_row(),
                "unlimited",
                baseline=BaselineEntry(None, None, "new"),
                reason="not in the baseline",
            ),
            CheckRow(skipped_row(), "undecided", 1.0, 0.01, None, "skipped: not understood"),
        )
    report = Report(
        tuple(row.row for row in rows),
        "models/my net.onnx",
        "onnx",
        None,
        {"k": 1, "max": {"*": 1.0}},
        "0.1.0",
    )
    return CheckReport(rows, report, None if names else BaselineFile("old.json", 0.01, ("gone.weight",)))


def written(report: CheckReport, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    write_check(report, format, stream, options=WriteOptions(**options))
    return stream.getvalue()


# --- tables and JSON --------------------------------------------------------------------------------------


def test_json_is_the_documented_schema() -> None:
    schema = json.loads((ROOT / "docs/schema/check.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for report in (checked(), checked(*HOSTILE)):
        document = json.loads(written(report, "json"))
        jsonschema.validate(document, schema)
        assert document == report.to_dict()
        assert list(document) == schema["required"]
        assert list(document["rows"][0]) == schema["$defs"]["row"]["required"]


def test_json_rows_are_those_of_inspect_and_a_verdict() -> None:
    inspect, check = (
        json.loads((ROOT / f"docs/schema/{name}.schema.json").read_text())["$defs"]["row"]
        for name in ("inspect", "check")
    )
    more = ["limit", "slack", "verdict", "baseline", "reason"]
    assert check["required"] == inspect["required"] + more
    same = {name: value for name, value in check["properties"].items() if name not in (*more, "sigma")}
    assert same == {name: value for name, value in inspect["properties"].items() if name != "sigma"}


def test_json_says_how_rows_compare() -> None:
    document = checked().to_dict()
    assert document["counts"] == {"proven": 1, "violated": 1, "undecided": 2, "unlimited": 1}
    assert document["verdict"] == "fail"
    assert document["baseline"] == {"path": "old.json", "tolerance": 0.01, "vanished": ["gone.weight"]}
    assert [row["baseline"] for row in document["rows"]] == [
        None,
        None,
        {"lower": 3.4, "upper": 3.5, "verdict": "held"},
        {"lower": None, "upper": None, "verdict": "new"},
        None,
    ]


def test_csv_has_the_columns_of_inspect_and_more_at_the_end() -> None:
    rows = list(csv.reader(io.StringIO(written(replace(checked(), rows=checked().rows[:3]), "csv").decode())))
    more = ["limit", "slack", "verdict", "reason", "baseline_lower", "baseline_upper", "baseline_verdict"]
    assert rows[0] == [column.name for column in LAYER_COLUMNS] + more
    assert rows[1][-7:] == ["1.0", "0.01", "violated", "too large", "", "", ""]
    assert rows[3][-7:] == ["9.0", "0.01", "proven", "", "3.4", "3.5", "held"]
    assert dict(zip(rows[0], rows[3], strict=True))["sigma_1"] == ""
    assert dict(zip(rows[0], rows[3], strict=True))["sigma_1_upper"] == "3.5"


def test_every_format_holds_all_rows() -> None:
    report = checked()
    assert len(written(report, "tsv").decode().splitlines()) == 6
    assert len(written(report, "jsonl").decode().splitlines()) == 5
    assert len(written(report, "md").decode().splitlines()) == 7
    book = openpyxl.load_workbook(io.BytesIO(written(report, "xlsx")))
    assert book.sheetnames == ["check", "run"]
    assert book["check"].max_row == 6
    assert [cell.value for cell in book["run"][2]] == ["verdict", "fail"]
    frame = report.to_pandas()
    assert list(frame["verdict"]) == ["violated", "undecided", "proven", "unlimited", "undecided"]
    assert frame["limit"].tolist()[:3] == [1.0, 1.0, 9.0]


def test_columns_and_order_can_be_asked_for() -> None:
    text = written(checked(), "csv", columns=("verdict", "limit"), sort="-limit").decode()
    assert text.splitlines()[:3] == ["verdict,limit", "proven,9.0", "violated,1.0"]
    with pytest.raises(UsageError, match="there is no column called 'verdicts'"):
        written(checked(), "csv", columns=("verdicts",))
    with pytest.raises(UsageError, match="there is no format called 'jnuit'"):
        written(checked(), "jnuit")


# --- continuous integration -------------------------------------------------------------------------------


def test_junit_has_a_case_per_gated_row() -> None:
    root = ElementTree.fromstring(written(checked(), "junit"))
    (suite,) = root
    assert (root.tag, suite.tag, suite.get("name")) == ("testsuites", "testsuite", "models/my net.onnx")
    for element in (root, suite):
        counts = {name: element.get(name) for name in ("tests", "failures", "errors", "skipped")}
        assert counts == {"tests": "4", "failures": "1", "errors": "2", "skipped": "0"}
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [row.row.layer for row in checked().rows if row.gated]
    assert [[child.tag for child in case] for case in cases] == [["failure"], ["error"], [], ["error"]]
    failure = cases[0][0]
    assert (failure.get("type"), failure.get("message")) == ("violated", "too large")
    assert "limit: 1.0" in (failure.text or "")
    assert float(cases[0].get("time") or "nan") == pytest.approx(1.734)


def test_junit_keeps_hostile_names_apart() -> None:
    data = written(checked(*HOSTILE), "junit")
    names = [case.get("name") or "" for case in ElementTree.fromstring(data).iter("testcase")]
    assert len(names) == len(set(names)) == len(HOSTILE)
    assert names[3] == HOSTILE[3]
    assert names[0] == r"two\nlines\r\nand a tab\t"
    assert names[-1] == HOSTILE[-1]
    # What XML 1.0 does not allow at all, not even as a reference.
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", data.decode())


def test_github_commands_cannot_be_broken_out_of() -> None:
    lines = written(checked(*HOSTILE), "github").decode().split("\n")
    assert lines.pop() == ""
    assert len(lines) == len(HOSTILE) + 1
    assert all(
        re.fullmatch(r"::(error|notice) file=[^,:]+,title=[^,:]+::[^\r\n\x1b]+", line) for line in lines
    )
    assert "title=%3A%3Aerror%3A%3A%250A%2525%2Ctitle=x%3Ay::" in lines[2]
    assert lines[-1].startswith("::notice ")
    assert lines[-1].endswith("FAIL: 8 of 8 operators exceed their bounds")


def test_github_says_violated_undecided_new_and_vanished() -> None:
    lines = written(checked(), "github").decode().splitlines()
    levels = [line.split("::")[1].split(" ")[0] for line in lines]
    assert levels == ["error", "warning", "warning", "notice", "notice", "notice"]
    assert "gone.weight: vanished" in lines[3]
    assert "new: not in the baseline" in lines[4]


def test_sarif_is_whole() -> None:
    document = json.loads(written(checked(), "sarif"))
    assert document["version"] == "2.1.0"
    assert document["$schema"].endswith("sarif-2.1.0.json")
    (run,) = document["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["name"] == "spectool"
    assert [rule["id"] for rule in rules] == ["violated", "undecided"]
    assert [result["ruleId"] for result in run["results"]] == ["violated", "undecided", "undecided"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] == {"violated": "error", "undecided": "warning"}[result["ruleId"]]
        assert result["message"]["text"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"]["uri"] == "models/my%20net.onnx"
        assert location["logicalLocations"][0]["fullyQualifiedName"]
    assert run["invocations"] == [{"executionSuccessful": True, "exitCode": 1}]
    prints = {json.dumps(result["partialFingerprints"]) for result in run["results"]}
    assert len(prints) == 3


def test_sarif_is_ascii_and_keeps_hostile_names_apart() -> None:
    data = written(checked(*HOSTILE), "sarif")
    assert all(32 <= byte < 127 or byte == 10 for byte in data)
    results = json.loads(data)["runs"][0]["results"]
    assert len({result["partialFingerprints"]["spectool/row/v1"] for result in results}) == len(HOSTILE)
    assert all(
        result["message"]["text"].isprintable() or "\ufffe" in result["message"]["text"] for result in results
    )


def test_a_model_without_a_file_has_no_place() -> None:
    report = replace(checked(), report=replace(checked().report, path=None))
    assert b"file=" not in written(report, "github")
    location = json.loads(written(report, "sarif"))["runs"][0]["results"][0]["locations"][0]
    assert list(location) == ["logicalLocations"]
    assert ElementTree.fromstring(written(report, "junit"))[0].get("name") == "model"


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    for format in ("junit", "json"):
        write_check(checked(), format, tmp_path / "result")
        assert (tmp_path / "result").read_bytes() == written(checked(), format)
