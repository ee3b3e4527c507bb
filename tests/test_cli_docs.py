"""The documentation says what the program does, and help costs little."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_runs import environment

from spectool.cli import app
from spectool.cli.reference import reference
from spectool.report import FORMATS
from spectool.report.layers import LAYER_COLUMNS

DOCS = Path(__file__).parents[1] / "docs"


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def test_the_reference_is_up_to_date() -> None:
    assert (DOCS / "cli.md").read_text() == reference(), "run python -m spectool.cli.reference > docs/cli.md"


@pytest.mark.parametrize("name", commands())
def test_every_option_of_a_command_is_documented(name: str) -> None:
    section = (DOCS / "cli.md").read_text().split(f"## `spectool {name}`")[1].split("\n## ")[0]
    for param in commands()[name].params:
        assert param.help, param.name
        for flag in param.opts if param.param_type_name == "option" else [param.metavar]:
            assert f"`{flag}`" in section, flag


def test_environment_names_are_the_long_options() -> None:
    for command in commands().values():
        for param in command.params:
            if param.param_type_name == "option":
                longest = max(param.opts, key=len).lstrip("-")
                assert param.envvar == f"SPECTOOL_{longest.replace('-', '_').upper()}"


def test_one_option_means_the_same_everywhere() -> None:
    meanings: dict[str, set[str]] = {}
    for command in commands().values():
        for param in command.params:
            for flag in param.opts if param.param_type_name == "option" else []:
                # The methods of a command are its own; that the default chooses among them is the same everywhere.
                text = param.help.partition(". ")[0] if flag == "--method" else param.help
                meanings.setdefault(flag, set()).add(text)
    assert {flag: texts for flag, texts in meanings.items() if len(texts) > 1} == {}


def test_every_column_and_format_is_documented() -> None:
    text = (DOCS / "formats.md").read_text()
    for column in LAYER_COLUMNS:
        assert f"`{column.name}`" in text
    for name in FORMATS:
        assert re.search(rf"\.{name}\b", text), name


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; from spectool.cli import main; code = main(['--help']); "
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=60,
            check=True,
        )
        best = min(best, time.perf_counter() - start)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert loaded & {"torch", "onnx", "pandas", "numpy", "xlsxwriter", "rich", "pydantic"} == set()
    # Bound for a loaded machine; it takes about a quarter of a second on a quiet one.
    assert best < 2.0
