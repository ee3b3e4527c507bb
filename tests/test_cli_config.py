"""Flags beat the environment, the environment beats files, and what is wrong in a file names the file."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_cases import small_report

from spectool.cli import main
from spectool.cli.parsing import parse_inputs, split_list
from spectool.errors import UsageError
from spectool.report import Report

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """Run `spectool inspect net.pt …` in an empty folder; return what the library was asked for."""
    asked: dict[str, Any] = {}

    def inspect(source: Path, **options: Any) -> Report:
        asked.update(options)
        return small_report()

    monkeypatch.setitem(sys.modules, "spectool.api", types.SimpleNamespace(inspect=inspect))
    folder = tmp_path / "project" / "runs"
    folder.mkdir(parents=True)
    (tmp_path / "project" / ".git").mkdir()
    (folder / "net.pt").write_bytes(b"x")
    monkeypatch.chdir(folder)

    def go(*arguments: str) -> dict[str, Any]:
        asked.clear()
        asked["code"] = main(["inspect", "net.pt", *arguments])
        return asked

    return go


def test_precedence(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask()["k"] == 8
    Path("spectool.toml").write_text("top-k = 3\n")
    assert ask()["k"] == 3
    monkeypatch.setenv("SPECTOOL_TOP_K", "4")
    assert ask()["k"] == 4
    assert ask("-k", "5")["k"] == 5


def test_every_sort_of_value_from_the_environment(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "LAYERS": "conv* fc", "CERTIFY": "1", "METHOD": "power", "INPUT": "a=1x3 b=1x4", "TOL": "1e-3", "LIST": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SPECTOOL_{name}", value)
    asked = ask()
    assert asked["layers"] == ("conv*", "fc")
    assert asked["input_shape"] == {"a": (1, 3), "b": (1, 4)}
    assert (asked["certify"], asked["method"], asked["tol"], asked["list_only"]) == (
        True,
        "power",
        1e-3,
        True,
    )


def test_every_sort_of_value_from_a_file(ask: Ask, capfd: pytest.CaptureFixture[str]) -> None:
    Path("spectool.toml").write_text(
        'layers = ["conv*", "fc"]\nexclude = "head"\ncertify = true\nmethod = "power"\ninput = "1x3"\ntol = 1e-3\n'
        'list = true\ncolumns = ["layer", "sigma_1"]\nno_guard = true\n'
    )
    asked = ask()
    assert (asked["layers"], asked["exclude"], asked["input_shape"]) == (("conv*", "fc"), ("head",), (1, 3))
    assert (asked["certify"], asked["method"], asked["tol"], asked["list_only"]) == (
        True,
        "power",
        1e-3,
        True,
    )
    assert capfd.readouterr().out.startswith("layer\tsigma_1\n")


def test_pyproject_is_found_upward_and_a_command_has_its_own_table(ask: Ask) -> None:
    Path("../pyproject.toml").write_text(
        "[tool.spectool]\ntop-k = 3\nseed = 5\n[tool.spectool.inspect]\ntop-k = 2\n[tool.spectool.ls]\nsort = 'shape'\n"
    )
    asked = ask()
    assert (asked["k"], asked["seed"]) == (2, 5)


def test_the_nearest_file_decides(ask: Ask) -> None:
    Path("../pyproject.toml").write_text("[tool.spectool]\ntop-k = 3\n")
    Path("pyproject.toml").write_text("[tool.other]\nx = 1\n")
    assert ask()["k"] == 3
    Path("spectool.toml").write_text("[tool.spectool]\ntop-k = 4\n")
    assert ask()["k"] == 4


def test_the_search_ends_at_the_root_of_the_repository(ask: Ask) -> None:
    Path("../../spectool.toml").write_text("top-k = 3\n")
    assert ask()["k"] == 8


@pytest.mark.parametrize(
    "text, message, hint",
    [
        ("top_kk = 3", "top_kk in {path} is no option", "did you mean top-k?"),
        ("[inspect]\ntidi = true", "tidi in {path} is no option", "did you mean tidy?"),
        ("output = 'x.csv'", "output in {path} cannot be set in a file", "--output"),
        ("trust = true", "trust in {path} cannot be set in a file", "--trust"),
        ("arch = 'nets:make'", "arch in {path} may name a model of torchvision or timm only", "--arch"),
        ("[inspect]\narch = 'os:system'", "arch in {path} may name", "--arch"),
        ("inspect = 3", "inspect in {path} is no table", "[tool.spectool.inspect]"),
        ("tool = { spectool = 3 }", "[tool.spectool] in {path} is no table", "[tool.spectool]"),
        ("top-k = ", "{path} cannot be read", "correct"),
        ("top-k = " + "9" * 5000, "{path} cannot be read", "correct"),
        ("top-k = " + "[" * 5000, "{path} cannot be read", "correct"),
        ("#" * 10**6 + "#", "{path} cannot be read: it is longer than 1000000 bytes", "correct"),
        ("top-k = 'many'", "'-k' / '--top-k'", "it comes from {path}"),
        ("method = 'magic'", "'magic'", "it comes from {path}"),
        ("certify = 'perhaps'", "'--certify'", "it comes from {path}"),
    ],
)
def test_what_is_wrong_in_a_file_names_it(
    ask: Ask, capfd: pytest.CaptureFixture[str], text: str, message: str, hint: str
) -> None:
    path = Path("spectool.toml").absolute()
    path.write_text(text)
    assert ask() == {"code": 2}
    first, second = capfd.readouterr().err.splitlines()
    assert message.format(path=path) in first
    assert hint.format(path=path) in second
    assert main(["inspect", "--help"]) == 0


def test_what_is_wrong_in_the_environment_names_it(
    ask: Ask, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTOOL_TOP_K", "many")
    assert ask() == {"code": 2}
    assert "it comes from the environment: SPECTOOL_TOP_K=many" in capfd.readouterr().err


def test_shapes() -> None:
    assert parse_inputs(()) is None
    assert parse_inputs(["1x3x224x224"]) == (1, 3, 224, 224)
    assert parse_inputs(["1,3,8"]) == (1, 3, 8)
    assert parse_inputs(["x=1", "y=2x3"]) == {"x": (1,), "y": (2, 3)}
    assert parse_inputs(["scope/x=y=1x3"]) == {"scope/x=y": (1, 3)}
    with pytest.raises(UsageError, match="'1x-3' is no shape"):
        parse_inputs(["1x-3"])


def test_lists_take_commas_and_repetition() -> None:
    assert split_list(["a,b", " c ,", ""]) == ("a", "b", "c")
