"""Inputs of programs that are numbers: on the command line, from Python, for live modules, TorchScript and ONNX."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoint_files import REAL
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import spectool
from spectool.checkpoint import open_checkpoint
from spectool.cli import main
from spectool.cli.parsing import parse_inputs
from spectool.errors import GraphError, UsageError
from spectool.graph.inputs import example_inputs, wanted_inputs
from spectool.graph.program import survey_live
from spectool.graph.script.front import build_module
from spectool.graph.types import Region, Survey
from spectool.report.row import Row

IMAGE = (1, 3, 5, 5)


class Scaled(nn.Module):
    """A net whose region depends on a number, and whose path on a truth value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, rate: int, scale: float = 2.0, short: bool = False) -> torch.Tensor:
        y = self.conv(x) * scale
        if rate == 16000:
            y = y.flip(2)
        elif rate != 8000:
            raise ValueError(f"no rate {rate}")
        return y if short else self.head(torch.relu(y).mean((2, 3)))


def layers(found: Survey) -> list[str]:
    return [item.key for item in found.items if isinstance(item, Region) and item.level == "layer"]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("script") / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Scaled().eval()).save(path)
    return path


def test_numbers_on_the_command_line() -> None:
    texts = ["x=1x3", "a=16000", "b=0", "c=-3", "d=0.5", "e=1e-3", "f=true", "g=False", "h=-.5", "i=2."]
    assert parse_inputs(texts) == {
        "x": (1, 3), "a": (16000,), "b": 0, "c": -3, "d": 0.5, "e": 1e-3, "f": True, "g": False, "h": -0.5, "i": 2.0,
    }  # fmt: skip
    for wrong in ("0.5", "x=1.5x3", "x=nan", "x=inf", "x=1e999", "x=yes", "x=--1", "x=."):
        with pytest.raises(UsageError, match=re.escape(f"--input {wrong!r} is no shape")):
            parse_inputs([wrong])
    with pytest.raises(UsageError, match="mixes a named and an unnamed shape"):
        parse_inputs(["1x3", "a=0.5"])


def test_declared_types(script: Path) -> None:
    checkpoint = open_checkpoint(script)
    for module in (Scaled(), build_module(checkpoint, checkpoint.program)):
        wanted = wanted_inputs(module)
        assert wanted is not None
        assert [(w.name, w.kind, w.required) for w in wanted if w.name != "self"] == [
            ("x", "Tensor", True), ("rate", "int", True), ("scale", "float", False), ("short", "bool", False),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"x": IMAGE, "rate": 8000}, {"rate": 8000}),
        # From a command line every whole number arrives as the length of an axis.
        ({"x": IMAGE, "rate": (16000,), "scale": (3,)}, {"rate": 16000, "scale": 3.0}),
        ({"x": IMAGE, "rate": 16000.0, "short": (1,)}, {"rate": 16000, "short": True}),
    ],
)
def test_numbers_take_the_type_the_program_says(given: dict[str, Any], expected: dict[str, Any]) -> None:
    for positional, named in example_inputs(Scaled(), given):
        tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        rest = {name: value for name, value in named.items() if name not in tensors}
        assert positional == []
        assert rest == expected
        assert {name: type(value) for name, value in rest.items()} == {
            n: type(v) for n, v in expected.items()
        }
        assert {name: tuple(value.shape) for name, value in tensors.items()} == {"x": IMAGE}


def test_a_module_takes_the_path_its_numbers_say() -> None:
    assert layers(survey_live(Scaled(), {"x": IMAGE, "rate": 8000})) == ["conv.weight", "head.weight"]
    assert layers(survey_live(Scaled(), {"x": IMAGE, "rate": 8000, "short": True})) == ["conv.weight"]
    with pytest.raises(GraphError, match="no rate 44100"):
        survey_live(Scaled(), {"x": IMAGE, "rate": 44100})


class Untyped(nn.Module):
    """Says nothing about its inputs; ``count`` is used as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x, count):  # type: ignore[no-untyped-def]
        for _ in range(count):
            x = self.body(x)
        return x


def test_what_says_nothing_is_tried_as_a_number_last() -> None:
    found = survey_live(Untyped(), {"x": (1, 3), "count": (2,)})
    assert [item.key for item in found.items if isinstance(item, Region)][-1] == "body.weight + body.weight"


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        (
            None,
            r"Scaled needs the shape of its inputs \(x: Tensor, rate: int\)",
            "--input x=1x3x224x224 --input rate=",
        ),
        ({"": IMAGE}, "Scaled also needs rate: int", "--input x=1x3x5x5 --input rate="),
        ({"x": IMAGE, "rate": 0.5}, "input rate is an int, not 0.5", "--input rate=1"),
        ({"x": IMAGE, "rate": (2, 3)}, "input rate is no tensor but an int", "--input rate=1"),
        ({"x": 3.5, "rate": 8000}, "input x is a tensor, not the number 3.5", "--input x=1x3x224x224"),
        ({"x": IMAGE, "rate": 1, "y": (3,)}, "Scaled has no input 'y'", "x, rate, scale, short"),
    ],
)
def test_what_does_not_fit_says_what_would(
    given: dict[str, Any] | None, message: str, hint: str, script: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        survey_live(Scaled(), given)
    assert hint in caught.value.hint
    if given is not None:
        with pytest.raises(UsageError, match=message):
            spectool.inspect(script, input_shape=given.get("", given))


def rows(report: spectool.Report) -> dict[tuple[str, str], Row]:
    return {(row.layer, row.level): row for row in report.rows}


def test_torchscript_gives_the_rows_of_its_module(script: Path) -> None:
    torch.manual_seed(0)
    given = {"x": IMAGE, "rate": np.int64(16000), "scale": 0.5}
    expected = rows(spectool.inspect(Scaled().eval(), k=2, input_shape=given))
    got = rows(spectool.inspect(script, k=2, input_shape=given))
    assert list(got) == list(expected)
    for key, row in expected.items():
        np.testing.assert_allclose(got[key].sigma, row.sigma, rtol=1e-6)
    assert got["conv.weight", "composed"].sigma[0] == pytest.approx(
        got["conv.weight", "layer"].sigma[0] / 2, rel=1e-6
    )


def test_a_missing_number_of_a_file_is_named_with_an_example(
    script: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(script), "--list"]) == 0  # what needs no program is still there
    said = capfd.readouterr().err
    assert "Scaled needs the shape of its inputs (x: Tensor, rate: int)" in said
    assert "--input x=1x3x224x224 --input rate=16000" in said  # the code compares it with that
    assert main(["inspect", str(script), "--list", "--input", "1x3x5x5"]) == 2
    said = capfd.readouterr().err
    assert "error: Scaled also needs rate: int" in said
    assert main(["inspect", str(script), "--list", "--input", "x=1x3x5x5", "--input", "rate=8000"]) == 0
    assert "2 of 2 linear maps" in capfd.readouterr().err


def test_numbers_where_no_program_takes_one(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt")
    torch.save(nn.Sequential(nn.Conv2d(3, 2, 3)), tmp_path / "module.pt")
    with pytest.raises(UsageError, match=r"--input rate=0\.5 is a number, and the file holds no program"):
        spectool.inspect(tmp_path / "module.pt", input_shape={"rate": 0.5})
    with pytest.raises(UsageError, match="'wide' is neither a shape nor a number"):
        spectool.inspect(tmp_path / "net.pt", input_shape={"x": "wide"})


def test_onnx_inputs_that_are_a_number_need_none(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Mul", ["y", "rate"], ["z"])],
        "net",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3]),
            helper.make_tensor_value_info("rate", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((3, 2), np.float32), "w")],
    )
    onnx.save(helper.make_model(body, ir_version=8), tmp_path / "net.onnx")
    for rate in (16000, 0.5, (16000,)):
        report = spectool.inspect(tmp_path / "net.onnx", input_shape={"x": (1, 3), "rate": rate})
        assert [row.layer for row in report.rows] == ["w"]
    with pytest.raises(UsageError, match=r"--input x=2\.5 is a number"):
        spectool.inspect(tmp_path / "net.onnx", input_shape={"x": 2.5})


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="the real checkpoints are not beside the project")
@pytest.mark.parametrize(("rate", "samples", "branch"), [(16000, 512, "then"), (8000, 256, "else")])
def test_silero_has_the_rows_of_its_onnx_file(rate: int, samples: int, branch: str) -> None:
    """The archive puts 64 (or 32) samples of context before its input, which the ONNX file takes as input."""
    archive = spectool.inspect(REAL / "silero_vad.jit", k=2, input_shape={"x": (1, samples), "sr": rate})
    context = {16000: 64, 8000: 32}[rate]
    model = spectool.inspect(
        REAL / "silero_vad.onnx",
        k=2,
        input_shape={"input": (1, samples + context), "state": (2, 1, 128), "sr": rate},
        layers=[f"If_0_{branch}*"],
    )
    assert archive.coverage[2] == 0

    def plain(report: spectool.Report) -> dict[str, Row]:
        prefix = r"^(_model\.|_model_8k\.|If_0_(then|else)_branch__Inline_0__)"
        return {re.sub(prefix, "", row.layer): row for row in report.rows if row.level == "layer"}

    got, expected = plain(archive), plain(model)
    assert set(got) == set(expected)
    assert len(got) == 14
    for name, row in expected.items():
        assert (got[name].kind, got[name].input_shape, got[name].output_shape) == (
            row.kind, row.input_shape, row.output_shape,
        )  # fmt: skip
        np.testing.assert_allclose(got[name].sigma, row.sigma, rtol=1e-6)
