"""Tensor names made for terminals, spreadsheets, web pages and CI systems, in every format that spectool writes."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from attack import TOKEN, WEIGHT
from attack_values import NAMES, safetensors
from cli_runs import run_terminal

from spectool.cli import main
from spectool.report.text import visible

Run = Callable[..., str]
#: What must not stand in a line for people: control and formatting characters, lone surrogates.
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.fixture
def spectool(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> Run:
    """Run the program on a file in which every name stands; return what it wrote to stdout."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    tensors = dict.fromkeys(NAMES.values(), WEIGHT)
    safetensors(
        tmp_path / "net.safetensors",
        {**tensors, f"{TOKEN}\x1b[0m\n::error::": np.zeros((4, 4, 1, 2, 3, 4), np.float32)},
    )

    def go(command: str, format: str, *more: str) -> str:
        output = tmp_path / f"out.{format}"
        code = main([command, "net.safetensors", "--format", format, "-o", str(output), *more])
        out, err = capfdbinary.readouterr()
        assert code in (0, 1, 4), err.decode()
        assert out == b""
        assert all(harmless(line) for line in err.decode().split("\n"))
        return output.read_bytes().decode() if format != "xlsx" else str(output)

    return go


def harmless(line: str) -> bool:
    return not any(unicodedata.category(char) in HIDDEN for char in line)


COMMANDS = [("ls", ()), ("inspect", ("-k", "1")), ("check", ("--max", "2"))]


@pytest.mark.parametrize(("command", "more"), COMMANDS)
def test_json_is_ascii_and_gives_the_names_back(spectool: Run, command: str, more: tuple[str, ...]) -> None:
    for format in ("json", "jsonl"):
        text = spectool(command, format, *more)
        assert text.isascii()
        assert harmless(text.replace("\n", ""))
        rows = json.loads(text)["rows" if command != "ls" else "tensors"] if format == "json" else [
            json.loads(line) for line in text.splitlines()
        ]  # fmt: skip
        member = "tensor" if command == "ls" else "layer"
        assert {row[member] for row in rows} >= set(NAMES.values())


@pytest.mark.parametrize(("command", "more"), COMMANDS)
def test_tsv_is_one_line_a_row(spectool: Run, command: str, more: tuple[str, ...]) -> None:
    lines = spectool(command, "tsv", *more).split("\n")
    assert len({line.count("\t") for line in lines if line}) == 1
    assert all(harmless(line.replace("\t", "")) for line in lines)
    first = [line.split("\t")[0] for line in lines]
    assert set(first) >= {visible(name.replace("\\", "\\\\")) for name in NAMES.values()}


@pytest.mark.parametrize(("command", "more"), COMMANDS)
def test_no_cell_of_a_csv_is_a_formula(spectool: Run, command: str, more: tuple[str, ...]) -> None:
    text = spectool(command, "csv", *more)
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert len({len(row) for row in rows}) == 1
    texts = [cell for row in rows for cell in row]
    assert not [cell for cell in texts if re.match(r"[=+@\t\r]|-[^0-9.]", cell)]
    assert all(harmless(cell.translate({9: None, 10: None, 13: None})) for cell in texts)
    names = [row[0] for row in rows]
    assert [name for name in ("'1.10", "'2/3", f"'{NAMES['formula']}") if name not in names] == []


@pytest.mark.parametrize(("command", "more"), COMMANDS)
def test_no_cell_of_a_workbook_is_a_formula_or_a_link(
    spectool: Run, command: str, more: tuple[str, ...]
) -> None:
    book = openpyxl.load_workbook(spectool(command, "xlsx", *more))
    cells = [cell for sheet in book for row in sheet.iter_rows() for cell in row if cell.value is not None]
    assert {cell.data_type for cell in cells} <= {"s", "n", "b"}
    assert not [cell for cell in cells if cell.hyperlink]
    shown = {cell.value for cell in cells}
    assert NAMES["formula"] in shown
    assert all(harmless(value) for value in shown if isinstance(value, str))


@pytest.mark.parametrize(("command", "more"), COMMANDS)
def test_markdown_holds_no_markup_of_a_name(spectool: Run, command: str, more: tuple[str, ...]) -> None:
    text = spectool(command, "md", *more)
    lines = text.rstrip("\n").split("\n")
    # A bar that is not escaped would begin a new cell.
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert all(harmless(line) for line in lines)
    for sign in ("<script", "<img", "[x](", "**b**", "`code`", "<!--"):
        assert not re.search(rf"(?<!\\){re.escape(sign)}", text), sign
    assert "&lt;" not in text.replace("&amp;lt;", "")


def test_junit_is_xml_and_gives_the_names_back(spectool: Run) -> None:
    text = spectool("check", "junit", "--max", "2")
    root = ElementTree.fromstring(text)
    names = {case.get("name") for case in root.iter("testcase")}
    assert {visible(name) for name in NAMES.values() if name and "\ufffe" not in name} <= names
    assert not list(root.iter("script"))
    assert all(harmless(line) for line in text.split("\n"))
    # Only what spectool writes is an element: no name has opened one.
    assert {element.tag for element in root.iter()} <= {
        *("testsuites", "testsuite", "testcase", "failure", "error", "skipped", "properties", "property", "system-out"),
    }  # fmt: skip


def test_every_line_for_github_is_one_command(spectool: Run) -> None:
    text = spectool("check", "github", "--max", "2")
    for line in text.rstrip("\n").split("\n"):
        assert harmless(line)
        found = re.fullmatch(r"::(error|warning|notice) ([^:]*)::(.*)", line)
        assert found, line
        assert "\n::" not in found[3]
        # Commas and colons in a property end it; percent signs would be decoded.
        assert all(re.fullmatch(r"(file|title|line)=[^,:]*", entry) for entry in found[2].split(","))
        assert re.fullmatch(r"(?:[^%]|%(25|0D|0A|3A|2C))*", found[0])


def test_sarif_is_ascii_json(spectool: Run) -> None:
    text = spectool("check", "sarif", "--max", "2")
    assert text.isascii()
    document = json.loads(text)
    results = document["runs"][0]["results"]
    assert len(results) >= len(NAMES)
    assert all(harmless(result["message"]["text"]) for result in results)


@pytest.mark.parametrize("width", [40, 120])
def test_nothing_but_spectool_colours_a_terminal(tmp_path: Path, width: int) -> None:
    """On a pseudo-terminal: the only escape sequences are the table's own styles."""
    path = safetensors(tmp_path / "net.safetensors", dict.fromkeys(NAMES.values(), WEIGHT))
    code, shown = run_terminal("ls", str(path), width=width, cwd=tmp_path)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert harmless(re.sub(r"[\r\n]", "", plain))
    assert "nothing]" in plain or width < 100  # markup is shown as it stands
    assert ":bomb:" in plain
    # A link would be an OSC 8 sequence, a title OSC 0.
    assert "\x1b]" not in shown


def test_an_error_that_quotes_a_name_is_one_harmless_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate([*NAMES.values(), "n" * 1_000_000]):
        header = json.dumps({name: {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}).encode()
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        assert main(["ls", path.name]) == 2
        lines = capfd.readouterr().err.split("\n")
        assert len(lines) <= 3
        assert all(harmless(line) and len(line) < 3000 for line in lines)


@pytest.mark.parametrize("name", ["a\nb.pt", "\x1b[31m.pt", "\u202egpj.pt", "-o.pt"])
def test_a_path_is_no_more_trusted_than_a_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    safetensors(tmp_path / name, {"w": WEIGHT})
    assert main(["inspect", f"./{name}", "-k", "1", "--format", "csv"]) == 0
    assert main(["check", f"./{name}", "--max", "1", "--format", "github"]) == 1
    assert main(["ls", f"./{name}x"]) == 2
    out, err = capfd.readouterr()
    assert all(harmless(line) for line in (*out.replace("\r", "").split("\n"), *err.split("\n")))
