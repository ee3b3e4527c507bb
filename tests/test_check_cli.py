"""`spectool check` from outside: streams, exit codes, formats and messages. The library is the real one."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from spectool.cli import main
from spectool.cli.verdicts import draw_check
from spectool.report import CheckReport, CheckRow, Report, Row, WriteOptions

SAMPLES = Path(__file__).parents[1] / "sample_models"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def spectool(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> Run:
    """Run the program in a folder with a net of three Linear with σ₁ = 1, 2, 3 and a convolution of any size."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()  # the search for a configuration ends here
    tensors = {f"fc{size}.weight": torch.diag(torch.tensor([float(size), 0.5])) for size in (1, 2, 3)}
    save_file(tensors, tmp_path / "net.safetensors")
    save_file({**tensors, "conv.weight": torch.ones(2, 2, 3, 3)}, tmp_path / "any.safetensors")

    def go(*arguments: str) -> tuple[int, str, str]:
        code = main(["check", *arguments])
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return go


@pytest.mark.parametrize(
    ("arguments", "code", "verdict"),
    [
        (["net.safetensors", "--max", "3.01"], 0, "PASS: 3 of 3 operators are proven to obey their bounds"),
        (["net.safetensors", "--max", "2.5"], 1, "FAIL: 1 of 3 operators exceeds its bound"),
        (["net.safetensors", "--max", "2.5", "--max", "fc3*=4"], 0, "PASS: 3 of 3 operators"),
        (["net.safetensors", "--max", "2.98", "--slack", "1%"], 0, "PASS: 3 of 3 operators"),
        (["any.safetensors", "--max", "4", "--strict"], 4, "UNDECIDED: 1 of 4 operators"),
        (["any.safetensors", "--max", "2.5"], 1, "FAIL: 1 of 4 operators exceeds its bound, 1 undecided"),
        (
            ["net.safetensors", "--max", "fc1.*=1.1"],
            0,
            "PASS: 1 of 1 operator is proven to obey its bound, 2 not gated",
        ),
    ],
)
def test_the_exit_code_is_the_verdict(spectool: Run, arguments: list[str], code: int, verdict: str) -> None:
    found, _, err = spectool(*arguments)
    assert found == code
    *_, said, coverage = err.splitlines()
    assert said.startswith(verdict)
    total = 4 if "any" in arguments[0] else 3
    analysed = 1 if arguments[-1].startswith("fc1") else total
    assert coverage == f"{analysed} of {total} linear maps analysed, 0 skipped"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.safetensors"], "there is no limit to check"),
        (["net.safetensors", "--max", "0"], "no positive finite number"),
        (["net.safetensors", "--max", "nan"], "no positive finite number"),
        (["net.safetensors", "--max", "fc9*=1"], "matches no row"),
        (["net.safetensors", "--max", "1", "--slack", "much"], "--slack 'much' is no relative amount"),
        (["net.safetensors", "--max", "1", "--tolerance", "-1"], "--tolerance '-1' is no relative amount"),
        (["net.safetensors", "--baseline", "no.json"], "no.json cannot be read"),
        (["net.safetensors", "--max", "1", "--columns", "verdikt"], "there is no column called 'verdikt'"),
        (
            ["net.safetensors", "--max", "1", "--columns", "layer", "--format", "json"],
            "--columns does not apply",
        ),
        (["gone.safetensors", "--max", "1"], "there is no file gone.safetensors"),
        (["net.safetensors", "--max", "1", "-o", "net.safetensors"], "cannot tell the format"),
    ],
)
def test_what_cannot_be_checked_exits_with_2(spectool: Run, arguments: list[str], message: str) -> None:
    code, out, err = spectool(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_the_table_shows_what_is_not_proven_and_v_all(spectool: Run) -> None:
    _, out, _ = spectool("any.safetensors", "--max", "2.5", "--format", "table")
    shown = [line.split()[0] for line in out.splitlines()[2:4]]
    assert shown == ["conv.weight", "fc3.weight"]
    assert "fc1.weight" not in out
    assert "violated" in out
    _, out, _ = spectool("any.safetensors", "--max", "2.5", "--format", "table", "-v")
    assert "fc1.weight" in out
    assert "proven" in out
    code, out, _ = spectool("net.safetensors", "--max", "9", "--format", "table")
    assert (code, out) == (0, "")


def test_a_pipe_gets_all_rows(spectool: Run) -> None:
    _, out, _ = spectool("net.safetensors", "--max", "2.5")
    header, *lines = [line.split("\t") for line in out.splitlines()]
    place = header.index("verdict")
    assert [(line[0], line[place]) for line in lines] == [
        ("fc1.weight", "proven"),
        ("fc2.weight", "proven"),
        ("fc3.weight", "violated"),
    ]


def test_formats_by_name_and_by_suffix(spectool: Run, tmp_path: Path) -> None:
    for name, check in (
        ("r.xml", lambda text: ElementTree.fromstring(text).get("failures") == "1"),
        ("r.sarif", lambda text: len(json.loads(text)["runs"][0]["results"]) == 1),
        ("r.json", lambda text: json.loads(text)["verdict"] == "fail"),
        ("r.csv", lambda text: text.count("\n") == 4),
        ("r.md", lambda text: "violated" in text),
    ):
        code, out, err = spectool("net.safetensors", "--max", "2.5", "-o", name)
        assert (code, out) == (1, "")
        assert f"wrote {name}" in err
        assert check((tmp_path / name).read_text())
    _, out, _ = spectool("net.safetensors", "--max", "2.5", "--format", "github")
    assert out.splitlines()[0].startswith("::error file=net.safetensors,title=fc3.weight::")
    _, out, _ = spectool("net.safetensors", "--max", "2.5", "--format", "JUnit", "-o", "-")
    assert ElementTree.fromstring(out)[0].get("tests") == "3"


def test_hints_say_what_would_decide(spectool: Run) -> None:
    assert "--arch with --input" in spectool("any.safetensors", "--max", "4")[2]
    _, _, err = spectool("net.safetensors", "--max", "3")
    # An exact σ₁ of 3 has an interval around it that no rounding can close.
    assert "hint: --slack " in err
    share = err.split("--slack ")[1].split(" ")[0]
    assert spectool("net.safetensors", "--max", "3", "--slack", share)[0] == 0
    assert "hint" not in spectool("any.safetensors", "--max", "4", "-q")[2]


def test_a_baseline_from_the_command_line(spectool: Run) -> None:
    assert spectool("net.safetensors", "--max", "9", "-o", "old.json")[0] == 0
    assert spectool("net.safetensors", "--baseline", "old.json", "--tolerance", "0")[0] == 0
    save_file({"fc1.weight": torch.eye(2) * 1.5, "new.weight": torch.eye(2)}, "net.safetensors")
    code, out, err = spectool("net.safetensors", "--baseline", "old.json", "--format", "table")
    assert code == 1
    assert "1.5000" in out
    assert "exceeds the baseline 1" in out
    assert "note: in the baseline, not in the file: fc2.weight, fc3.weight" in err
    assert "FAIL: 1 of 1 operator exceeds its bound, 1 new, 2 vanished, 1 not gated" in err
    code, _, err = spectool("net.safetensors", "--baseline", "old.json", "-o", "old.json")
    assert code == 2
    assert "old.json is the baseline; it is not overwritten" in err
    code, _, err = spectool("net.safetensors", "--baseline", str(SAMPLES / "expected.json"))
    assert code == 2
    assert "is no result of spectool" in err


def test_several_limits_come_from_a_file(spectool: Run, tmp_path: Path) -> None:
    (tmp_path / "spectool.toml").write_text('[check]\nmax = ["2.5", "fc3.*=4"]\nslack = "1%"\n')
    assert spectool("net.safetensors")[0] == 0
    assert spectool("net.safetensors", "--max", "2.5")[0] == 1


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_table_fits_and_never_loses_the_verdict(width: int) -> None:
    rows = tuple(
        CheckRow(
            Row(
                f"a.very.long.module.path.layer{place}.\x1b[31m.weight",
                "layer",
                "conv2d",
                ("w",),
                (3, 3),
                (3, 32, 32),
                (3, 32, 32),
                sigma=(2.0,),
                sigma_lower=(1.99,),
                sigma_upper=(2.01,),
                upper_kind="symbol",
                converged=True,
            ),
            "violated",
            1.0,
            0.01,
            reason="σ₁ is at least 1.99 and exceeds the limit 1",
        )
        for place in range(2)
    )
    report = CheckReport(rows, Report(tuple(row.row for row in rows), "n", "onnx", None, {"k": 1}, "0"))
    drawing, _ = draw_check(report, WriteOptions(), width, False)
    stream = io.StringIO()
    Console(width=width, file=stream, color_system=None).print(drawing)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum("violated" in line for line in lines) == 2
    assert all("[1.9900, 2.0100]" in line for line in lines if "violated" in line)
    assert "\x1b" not in stream.getvalue()
