"""What commands say where a reader could be misled: help, suffixes, hints, cells that mean nothing."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from spectool.cli import main
from spectool.cli.options import ClipMethodName, MethodName

SAMPLES = Path(__file__).parents[1] / "sample_models"
Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Said:
    """Run the program in a folder of its own, with a small net in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    shutil.copy(SAMPLES / "digits_mlp_state.pt", tmp_path / "net.pt")

    def go(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capfd.readouterr()

    return go


@pytest.mark.parametrize(
    "command, own, others",
    [
        ("inspect", MethodName, ClipMethodName),
        ("check", MethodName, ClipMethodName),
        ("clip", ClipMethodName, MethodName),
    ],
)
def test_a_command_lists_its_own_methods(
    said: Said, command: str, own: type[MethodName], others: type[MethodName]
) -> None:
    _, out, _ = said(command, "--help")
    entry = re.split(r"--\w", out.partition("--method")[2])[0]
    words = set(re.findall(r"\w+", entry))
    assert {name.value for name in own} <= words
    assert not ({name.value for name in others} - {name.value for name in own}) & words


@pytest.mark.parametrize(
    "arguments, warned",
    [
        (("ls", "net.pt", "-o", "a.json", "--format", "xlsx"), True),
        (("ls", "net.pt", "-o", "a.csv", "--format", "tsv"), True),
        (("ls", "net.pt", "-o", "a.csv", "--format", "table"), True),
        (("clip", "net.pt", "--max", "9", "-n", "--report", "a.json", "--format", "xlsx"), True),
        (("check", "net.pt", "--max", "9", "-o", "a.xml", "--format", "csv"), True),
        (("ls", "net.pt", "-o", "a.csv", "--format", "tsv", "-q"), False),
        (("ls", "net.pt", "-o", "a.csv", "--format", "csv"), False),
        (("ls", "net.pt", "-o", "a.txt", "--format", "csv"), False),
        (("check", "net.pt", "--max", "9", "-o", "a.json", "--format", "sarif"), False),
        (("check", "net.pt", "--max", "9", "-o", "a.xml", "--format", "junit"), False),
    ],
)
def test_a_suffix_that_says_another_format(said: Said, arguments: tuple[str, ...], warned: bool) -> None:
    code, _, err = said(*arguments)
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("warning: ")]
    name = next(word for word in arguments if word.startswith("a."))
    form = arguments[arguments.index("--format") + 1]
    expected = f"warning: {name} ends in {Path(name).suffix}, but --format says {form}, and that is written"
    assert lines == ([expected] if warned else [])
    assert Path(name).exists()


def test_a_method_that_cannot_says_which_can(said: Said) -> None:
    torch.save(nn.Sequential(nn.Conv2d(2, 3, 3)), "conv.pt")
    arguments = ["clip", "conv.pt", "--input", "1x2x6x6", "--max", "0.1", "-n", "--format", "json"]
    code, out, _ = said(*arguments, "--method", "svd")
    assert code == 4
    (row,) = json.loads(out)["rows"]
    assert row["action"] == "refused"
    named = re.findall(r"--method (\w+)", row["reason"])
    assert named == ["bundle"]
    code, out, _ = said(*arguments, "--method", *named)
    (row,) = json.loads(out)["rows"]
    assert (code, row["action"]) == (0, "clipped")


def test_a_row_of_which_nothing_is_asked_has_no_limit(said: Said) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3)).eval(), "net.pt")
    arguments = ["clip", "net.pt", "--input", "1x4", "--max", "99", "-n", "-v"]
    _, out, _ = said(*arguments, "--format", "csv")
    limits = {row["action"]: row["limit"] for row in csv.DictReader(out.splitlines())}
    assert limits == {"kept": "99.0", "listed": ""}
    _, out, _ = said(*arguments, "--format", "table")
    (line,) = [line for line in out.splitlines() if line.endswith("not gated")]
    assert "99" not in line


def test_sizes_that_are_a_guess_are_called_one(said: Said) -> None:
    _, _, err = said("inspect", str(SAMPLES / "digits_cnn_torchscript.pt"), "--list")
    assert "for example --input 1x1x224x224; give your own sizes" in err
