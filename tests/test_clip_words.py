"""What `spectool clip` says besides its table: hints that hold, counts that add up, files that are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import spectool
from spectool.cli import main
from spectool.errors import UsageError

SAMPLES = Path(__file__).parents[1] / "sample_models"


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()


def test_a_product_of_unknown_scale_is_never_called_proven(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    factors = {"net.0.lora_A.weight": torch.randn(2, 6), "net.0.lora_B.weight": torch.randn(5, 2)}
    torch.save(factors, tmp_path / "lora.pt")
    arguments = ["lora.pt", "--max", "0.5", "--format", "json"]
    assert main(["clip", *arguments, "-o", "a.pt"]) == 0
    out, err = capfd.readouterr()
    (row,) = json.loads(out)["rows"]
    assert row["after"]["sigma"] <= 0.5
    assert row["after"]["proven"] is None
    assert "proves it" not in err
    assert "no limit on their product can be proven" in err
    assert main(["clip", *arguments, "--prove", "-o", "b.pt"]) == 4
    assert main(["check", "b.pt", "--max", "0.5"]) == 4


def test_every_operator_counts_once_at_both_levels(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--level", "both", "--layers", "head*", "--layers", "up.*", "--max", "1", "-n", "-k", "1"]
    assert main(["clip", str(SAMPLES / "digits_cnn.onnx"), *arguments]) == 0
    assert "2 of 2 linear maps analysed" in capfd.readouterr().err


def test_a_data_file_is_named_and_a_suffix_warned_of_when_there_is_a_file(
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = str(SAMPLES / "digits_cnn_external.onnx")
    arguments = ["--max", "2", "--level", "layer", "--layers", "head*", "-k", "1", "-o", "o.net"]
    assert main(["clip", source, *arguments]) == 0
    err = capfd.readouterr().err
    assert "wrote o.net and digits_cnn_external.onnx.data: 1 " in err
    assert Path("digits_cnn_external.onnx.data").exists()
    assert "o.net ends in .net" in err
    Path("empty.pt").touch()
    assert main(["clip", "empty.pt", "--max", "1", "-o", "other.net"]) == 2
    assert "other.net" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "command", [["ls"], ["inspect"], ["check", "--max", "1"], ["clip", "--max", "1", "-n"]]
)
def test_an_empty_name_is_not_this_folder(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*command, ""]) == 2
    assert "'FILE': its name is empty" in capfd.readouterr().err


def test_calibration_says_what_it_cannot_use_or_do() -> None:
    source = SAMPLES / "digits_mlp_state.pt"
    images = torch.rand(8, 64)
    with pytest.raises(UsageError, match="biases are not matched on inputs"):
        spectool.clip(source, max=2, dry_run=True, calibrate=images, recenter="bias")
    np.savez("x.npz", x=np.where(images.numpy() > 0.5, np.nan, 1.0))
    with pytest.raises(UsageError, match="numbers are NaN or infinite"):
        spectool.clip(source, max=2, dry_run=True, calibrate="x.npz")
