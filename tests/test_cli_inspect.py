"""`spectool inspect` from outside: streams, formats, exit codes and messages. The library behind it is a stub."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_runs import run, run_shell, run_terminal
from report_cases import any_size_row, conv_row, linear_row, pair_row, skipped_row, small_report

from spectool.checkpoint.limits import Limits
from spectool.cli import main
from spectool.errors import CorruptFile, NothingToAnalyse
from spectool.report import Report

Run = Callable[..., tuple[int, str, str]]
COVERAGE = "4 of 5 linear maps analysed, 1 skipped"


@pytest.fixture
def asked() -> dict[str, Any]:
    """What the command line asked the library for."""
    return {}


@pytest.fixture
def answer() -> list[Report | BaseException]:
    """What the library answers; the last entry counts."""
    return [small_report()]


@pytest.fixture
def spectool(
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    tmp_path: Path,
    asked: dict[str, Any],
    answer: list[Report | BaseException],
) -> Run:
    """Run the program in this process, in an empty folder with a file ``net.pt``."""

    def inspect(source: Path, **options: Any) -> Report:
        asked.update(options, source=source)
        if isinstance(answer[-1], BaseException):
            raise answer[-1]
        return answer[-1]

    monkeypatch.setitem(sys.modules, "spectool.api", types.SimpleNamespace(inspect=inspect))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()  # the search for a configuration ends here
    (tmp_path / "net.pt").write_bytes(b"weights")

    def go(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return go


def test_a_pipe_gets_whole_tsv_and_stderr_the_coverage_line(spectool: Run) -> None:
    code, out, err = spectool("inspect", "net.pt")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split("\t")[:3] == ["layer", "level", "kind"]
    assert len(lines) == 9
    assert lines[1].split("\t")[7] == "15.916402310987653"
    assert err.splitlines()[-1] == COVERAGE
    assert "\x1b" not in out + err


@pytest.mark.parametrize("format", ["csv", "tsv", "json", "jsonl", "md", "table"])
def test_formats_go_to_stdout(spectool: Run, format: str) -> None:
    code, out, err = spectool("inspect", "net.pt", "--format", format.upper(), "-o", "-")
    assert code == 0
    assert "layer1.0.conv1.weight" in out
    assert err.splitlines()[-1] == COVERAGE


def test_a_table_in_a_pipe_is_never_squeezed(spectool: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = spectool("inspect", "net.pt", "--format", "table")
    assert out.splitlines()[0].split() == [
        "layer", "kind", "weight", "input", "σ₁", "bounds", "proof", "σ₁…σ₃", "copies", "stable", "rank", "method",
        "matvecs", "seconds",
    ]  # fmt: skip
    assert "…" not in "".join(out.splitlines()[2:4])


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "md", "xlsx"])
def test_the_suffix_decides(spectool: Run, tmp_path: Path, suffix: str) -> None:
    code, out, err = spectool("inspect", "net.pt", "-o", f"out.{suffix}")
    assert (code, out) == (0, "")
    data = (tmp_path / f"out.{suffix}").read_bytes()
    starts = {
        "json": b'{"schema": 1',
        "jsonl": b'{"layer"',
        "md": b"| layer",
        "xlsx": b"PK",
        "csv": b"layer,",
        "tsv": b"layer\t",
    }
    assert data.startswith(starts[suffix])
    assert f"wrote out.{suffix}" in err


def test_every_option_reaches_the_library(spectool: Run, asked: dict[str, Any]) -> None:
    line = (
        "inspect net.pt -k 3 --input a=1x3x32x32 --input b=1x10 --method power --tol 1e-3 --max-matvecs 50 "
        "--certify --seed 7 --device cpu --dtype float64 --level layer --layers conv* --layers fc "
        "--exclude head --kind conv2d,linear --kind lora --assume-bn --key ema --list --shard 2/4 --hash "
        "--trust --no-recognise --arch torchvision:resnet18 --max-tensor-bytes 2GB --limit depth=9 --arch-args"
    )
    code, _, err = spectool(*line.split(), '{"num_classes": 10}')
    assert code == 0, err
    progress = asked.pop("progress")
    assert callable(progress)
    assert asked == {
        "source": Path("net.pt"), "k": 3, "input_shape": {"a": (1, 3, 32, 32), "b": (1, 10)}, "method": "power",
        "tol": 1e-3, "max_matvecs": 50, "certify": True, "seed": 7, "device": "cpu", "dtype": "float64",
        "level": "layer", "layers": ("conv*", "fc"), "exclude": ("head",), "kinds": ("conv2d", "linear", "lora"),
        "assume_bn": True, "key": "ema", "list_only": True, "shard": (2, 4), "hash": True,
        "trust": True, "recognise": False,
        "arch": "torchvision:resnet18", "arch_args": {"num_classes": 10},
        "limits": Limits(tensor_bytes=2 * 10**9, depth=9),
    }  # fmt: skip


def test_defaults(spectool: Run, asked: dict[str, Any]) -> None:
    spectool("inspect", "net.pt", "--input", "1X3x224x224")
    assert asked["k"] == 8
    assert asked["input_shape"] == (1, 3, 224, 224)
    assert (asked["method"], asked["level"], asked["device"], asked["dtype"]) == (
        "auto",
        "both",
        "auto",
        None,
    )
    assert (asked["layers"], asked["shard"], asked["tol"]) == ((), None, 1e-5)


@pytest.mark.parametrize(
    "arguments, message, hint",
    [
        ("inspect net.pt -k 0", "--top-k 0 asks for no singular value", "-k 1 or more"),
        ("inspect net.pt -k -3", "--top-k -3 asks for no singular value", "-k 1 or more"),
        ("inspect net.pt -k many", "'-k' / '--top-k'", "--help"),
        ("inspect net.pt --tol 0", "--tol 0.0 is no relative tolerance", "between 0 and 1"),
        ("inspect net.pt --tol nan", "--tol nan is no relative tolerance", "between 0 and 1"),
        ("inspect net.pt --max-matvecs 0", "--max-matvecs 0 allows no work", "leave it out"),
        (f"inspect net.pt --input {'9' * 5000}", "999' is no shape", "1x3x224x224"),
        (f"inspect net.pt --input n=-{'9' * 5000}", "999' is no shape", "1x3x224x224"),
        (f"inspect net.pt --shard 1/{'9' * 5000}", "makes no sense", "2/8"),
        ("inspect net.pt --input 3x", "--input '3x' is no shape", "1x3x224x224"),
        ("inspect net.pt --input x=", "--input 'x=' is no shape", "name=1x3x224x224"),
        ("inspect net.pt --input 1x0x3", "has an axis of size 0", "at least one"),
        ("inspect net.pt --input 1x3 --input 1x4", "more than one unnamed shape", "named"),
        ("inspect net.pt --input 1x3 --input a=1x4", "mixes a named and an unnamed", "name all"),
        ("inspect net.pt --input a=1x3 --input a=1x4", "names 'a' twice", "named"),
        ("inspect net.pt --shard 5/4", "--shard '5/4' makes no sense", "i/n"),
        ("inspect net.pt --shard 1", "--shard '1' makes no sense", "i/n"),
        ("inspect net.pt --arch-args [1]", "--arch-args is no JSON object", "num_classes"),
        ("inspect net.pt --arch-args {", "--arch-args is no JSON", "num_classes"),
        ("inspect net.pt --method magic", "'magic'", "--help"),
        ("inspect net.pt --format pdf", "'pdf'", "--help"),
        ("inspect net.pt -o out.pdf", "cannot tell the format of out.pdf from suffix .pdf", ".csv"),
        ("inspect net.pt -o out.xslx", "from suffix .xslx", "did you mean .xlsx?"),
        ("inspect net.pt -o missing/out.csv", "there is no folder", "create it"),
        ("inspect net.pt -o . --format csv", "it is a folder", "name a file"),
        ("inspect net.pt -o net.pt --format csv", "net.pt is the file to read", "another file"),
        ("inspect net.pt --columns layer,sigm_1 -o out.csv", "no column called 'sigm_1'", "sigma_1"),
        ("inspect net.pt --sort sigma_9", "no column called 'sigma_9'", "sigma_8"),
        ("inspect net.pt --columns layer -o out.json", "--columns does not apply to json", "jq"),
        ("inspect net.pt --colums layer", "no such option: --colums", "did you mean --columns?"),
        ("inspect net.tp", "there is no file net.tp", "did you mean net.pt?"),
        ("inspect", "missing argument 'FILE'", "--help"),
        ("inspect net.pt other.pt", "unexpected extra argument", "--help"),
        ("inspct net.pt", "there is no command called 'inspct'", "did you mean inspect?"),
        ("net.pt", "there is no command called 'net.pt'", "did you mean spectool inspect net.pt?"),
        ("--nope", "no such option: --nope", "--help"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_clear_error(
    spectool: Run, asked: dict[str, Any], tmp_path: Path, arguments: str, message: str, hint: str
) -> None:
    code, out, err = spectool(*arguments.split())
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert second.startswith("hint: ")
    assert hint in second
    assert asked == {}, "the library was called"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".git", "net.pt"]


def test_no_arguments_show_the_help_and_fail(spectool: Run) -> None:
    code, out, err = spectool()
    assert (code, out) == (2, "")
    assert "Examples:" in err


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], ["inspect"], ["ls"]])
def test_help_begins_with_examples(spectool: Run, command: list[str], flag: str) -> None:
    code, out, err = spectool(*command, flag)
    assert (code, err) == (0, "")
    assert 0 < out.index("Examples:") < out.index("Options:" if not command else "Arguments:")
    assert max(map(len, out.splitlines())) <= 110


def test_version(spectool: Run) -> None:
    code, out, _ = spectool("--version")
    assert (code, out) == (0, "spectool 0.1.0\n")


def test_errors_of_the_library_are_said_once(spectool: Run, answer: list[Any], tmp_path: Path) -> None:
    answer.append(CorruptFile("net.pt ends after 120 bytes", hint="copy the file again"))
    assert spectool("inspect", "net.pt", "-o", "out.csv") == (
        2, "", "error: net.pt ends after 120 bytes\nhint: copy the file again\n",
    )  # fmt: skip
    assert not (tmp_path / "out.csv").exists()
    answer.append(NothingToAnalyse("net.pt holds no linear operator"))
    assert spectool("inspect", "net.pt") == (2, "", "error: net.pt holds no linear operator\n")


def test_names_in_errors_cannot_steer_the_terminal(spectool: Run, answer: list[Any]) -> None:
    answer.append(CorruptFile("tensor \x1b[2Jx is cut\nerror: fake"))
    _, _, err = spectool("inspect", "net.pt")
    assert err == "error: tensor \\x1b[2Jx is cut\\nerror: fake\n"


def test_a_defect_is_one_line_and_code_3(spectool: Run, answer: list[Any]) -> None:
    answer.append(ZeroDivisionError("division by zero"))
    code, out, err = spectool("inspect", "net.pt")
    assert (code, out) == (3, "")
    assert err.splitlines()[0] == "error: internal: ZeroDivisionError: division by zero"
    assert "Traceback" not in err
    assert "--debug" in err.splitlines()[1]
    code, _, err = spectool("inspect", "net.pt", "--debug")
    assert code == 3
    assert err.startswith("Traceback")


def test_an_interrupt_is_130(spectool: Run, answer: list[Any], tmp_path: Path) -> None:
    answer.append(KeyboardInterrupt())
    code, out, err = spectool("inspect", "net.pt", "-o", "out.csv")
    assert (code, out) == (130, "")
    assert err == "interrupted\n"
    assert not (tmp_path / "out.csv").exists()


def test_strict_is_5_only_where_linear_operators_were_skipped(spectool: Run, answer: list[Any]) -> None:
    assert spectool("inspect", "net.pt")[0] == 0
    assert spectool("inspect", "net.pt", "--strict")[0] == 5
    answer.append(small_report(conv_row(), replace(skipped_row(), status="nonlinear", operators=0)))
    assert spectool("inspect", "net.pt", "--strict")[0] == 0


def test_quiet_leaves_the_coverage_line_alone(spectool: Run) -> None:
    _, _, err = spectool("inspect", "net.pt", "-q", "-o", "out.csv")
    assert err == f"{COVERAGE}\n"


def test_verbose_says_why(spectool: Run) -> None:
    _, _, err = spectool("inspect", "net.pt", "-v")
    assert "layer1.0.conv1.weight: too large for a dense solver" in err.splitlines()


def test_notes_and_the_next_step_stand_before_the_coverage_line(spectool: Run, answer: list[Any]) -> None:
    _, _, err = spectool("inspect", "net.pt")
    assert err.splitlines() == [
        "note: took 'state_dict'",
        "hint: 1 row not converged: raise --max-matvecs",
        COVERAGE,
    ]
    answer.append(small_report(any_size_row()))
    assert "hint: 1 row bounded for every input size" in spectool("inspect", "net.pt")[2]
    answer.append(small_report(linear_row()))
    assert "hint" not in spectool("inspect", "net.pt")[2]


def test_a_list_says_that_it_is_one(spectool: Run, answer: list[Any]) -> None:
    bare = replace(conv_row(), sigma=(), sigma_lower=(), sigma_upper=(), converged=None, method=None)
    answer.append(small_report(bare))
    _, _, err = spectool("inspect", "net.pt", "--list")
    assert err.splitlines()[-1] == "1 of 1 linear maps listed, 0 skipped"


def test_guarded_cells_are_counted_on_stderr(spectool: Run, answer: list[Any]) -> None:
    answer.append(small_report(replace(linear_row(), layer="1.10", weights=("1.10",))))
    _, out, err = spectool("inspect", "net.pt", "--format", "csv", "--columns", "layer,weights")
    assert out == "layer,weights\r\n'1.10,'1.10\r\n"
    assert "2 text cells guarded" in err
    _, out, err = spectool("inspect", "net.pt", "--format", "csv", "--columns", "layer", "--no-guard")
    assert out == "layer\r\n1.10\r\n"
    assert "guarded" not in err


def test_sorting_downward_by_a_flag_that_begins_with_a_dash(spectool: Run) -> None:
    _, out, _ = spectool("inspect", "net.pt", "--sort", "-sigma_1", "--columns", "sigma_1")
    assert out.splitlines()[:3] == ["sigma_1", "15.916402310987653", "9.875"]


def test_a_workbook_can_go_into_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"x")
    assert run("inspect", "net.pt", "--format", "xlsx", cwd=tmp_path).stdout.startswith(b"PK")
    code, shown = run_terminal("inspect", "net.pt", "--format", "xlsx", cwd=tmp_path)
    assert (code, shown) == (2, "")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"x")
    result = run_shell("spectool inspect net.pt -q | true; echo ${PIPESTATUS[0]}", tmp_path)
    assert result.stdout == b"0\n"
    assert result.stderr.decode().splitlines() == [COVERAGE]
    result = run_shell("spectool inspect net.pt --format csv | head -1", tmp_path)
    assert result.stdout.startswith(b"layer,level")
    assert b"Traceback" not in result.stderr
    assert b"Broken" not in result.stderr


def test_streams_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"x")
    result = run("inspect", "net.pt", "--format", "json", cwd=tmp_path)
    assert json.loads(result.stdout)["rows"][2]["layer"] == pair_row().layer
    assert result.stderr.decode().splitlines()[-1] == COVERAGE


def test_a_terminal_gets_the_table_in_its_width(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"x")
    code, wide = run_terminal("inspect", "net.pt", width=200, cwd=tmp_path)
    assert code == 0
    assert "\x1b[" in wide
    assert "matvecs" in wide
    code, plain = run_terminal("inspect", "net.pt", width=80, cwd=tmp_path, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*3\dm", plain), "NO_COLOR asks for none"
    lines = re.sub(r"\x1b\[[\d;]*m", "", plain).replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["layer", "kind", "σ₁", "bounds"]


def test_an_ascii_terminal_is_no_defect(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"x")
    result = run("inspect", "net.pt", "--format", "table", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert b"Traceback" not in result.stderr
