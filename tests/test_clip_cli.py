"""`spectool clip` from outside: streams, exit codes, files and messages. The library is the real one.

The truth is numpy's SVD of the tensors as another library reads them from the file written.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectool as library
from spectool.cli import main

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "sample_models"
MLP = SAMPLES / "digits_mlp_state.pt"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def spectool(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> Run:
    """Run the program in a folder with a net of three Linear with σ₁ = 1, 2, 3."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()  # the search for a configuration ends here
    tensors = {f"fc{size}.weight": torch.diag(torch.tensor([float(size), 0.5])) for size in (1, 2, 3)}
    tensors["fc1.bias"] = torch.tensor([1.0, 2.0])
    save_file(tensors, tmp_path / "net.safetensors", metadata={"made": "by hand"})

    def go(*arguments: str, command: str = "clip") -> tuple[int, str, str]:
        code = main([command, *arguments])
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return go


def sigma(tensor: torch.Tensor) -> float:
    return float(np.linalg.svd(tensor.double().numpy(), compute_uv=False)[0])


def nearest(tensor: torch.Tensor, limit: float) -> np.ndarray:
    """Return the projection, by the theorem: singular values above the limit become the limit."""
    left, values, right = np.linalg.svd(tensor.double().numpy(), full_matrices=False)
    return left @ np.diag(np.minimum(values, limit)) @ right


def test_the_checkpoint_is_written_and_the_result_goes_to_stdout(spectool: Run, tmp_path: Path) -> None:
    code, out, err = spectool("net.safetensors", "--max", "1.3", "-o", "out.safetensors")
    assert code == 0
    before, after = load_file("net.safetensors"), load_file("out.safetensors")
    assert list(after) == list(before)
    for name in ("fc1.weight", "fc1.bias"):
        assert torch.equal(before[name], after[name])
    for name in ("fc2.weight", "fc3.weight"):
        assert 1.3 * (1 - 3e-4) <= sigma(after[name]) <= 1.3 * (1 + 1e-9)
        np.testing.assert_allclose(after[name].numpy(), nearest(before[name], 1.3), atol=1e-6)
    old, new = ((tmp_path / name).read_bytes() for name in ("net.safetensors", "out.safetensors"))
    assert len(old) == len(new)
    assert sum(a != b for a, b in zip(old, new, strict=True)) <= 8
    header, *lines = [line.split("\t") for line in out.splitlines()]
    place = header.index("action")
    assert [(line[0], line[place]) for line in lines] == [
        ("fc1.weight", "kept"),
        ("fc2.weight", "clipped"),
        ("fc3.weight", "clipped"),
    ]
    said = err.splitlines()
    assert said[0] == "2 clipped, 1 within their limits already"
    assert said[1].startswith("wrote out.safetensors: 2 ")
    assert said[1].endswith("changed, all other bytes are identical")
    assert said[2] == "hint: spectool check out.safetensors --max 1.3 proves it"
    assert said[3:] == ["3 of 3 linear maps analysed, 0 skipped"]
    assert spectool("out.safetensors", "--max", "1.3", command="check")[0] == 0


def test_numbers_are_those_of_the_projection(spectool: Run) -> None:
    code, _, _ = spectool(str(MLP), "--max", "1.0", "-o", "out.pt", "--report", "r.csv")
    assert code == 0
    before = torch.load(MLP, weights_only=True)
    after = torch.load("out.pt", weights_only=True)
    frame = pd.read_csv("r.csv").set_index("layer")
    rows = {row["layer"]: row for row in csv.DictReader(io.StringIO(Path("r.csv").read_text()))}
    assert set(rows) == set(frame.index) == {name for name in before if name.endswith("weight")}
    for name, row in rows.items():
        old, new = before[name].double().numpy(), after[name].double().numpy()
        least = np.linalg.norm(nearest(before[name], 1.0) - old) / np.linalg.norm(old)
        made = np.linalg.norm(new - old) / np.linalg.norm(old)
        top = np.linalg.svd(old, compute_uv=False)[0]
        assert float(row["change_lower_bound"]) <= least * (1 + 1e-9)
        assert float(row["change_lower_bound"]) == pytest.approx(least, rel=1e-3)
        assert [float(row["change"]), float(row["raw_change"])] == pytest.approx([made, made], rel=1e-9)
        assert float(row["change_scaling"]) == pytest.approx(1 - 1 / top, rel=1e-6)
        assert float(row["sigma_1_before"]) == pytest.approx(top, rel=1e-9)
        assert float(row["sigma_1_before_lower"]) <= top <= float(row["sigma_1_before_upper"])
        assert float(row["sigma_1"]) == pytest.approx(sigma(after[name]), rel=1e-9)
        assert sigma(after[name]) <= float(row["proven"]) <= 1.0
        assert frame.loc[name, "metric"] == "weights"
        assert frame.loc[name, "change"] == float(row["change"])
    for name in before:
        if not name.endswith("weight"):
            assert torch.equal(before[name], after[name])


def test_a_composition_in_onnx(spectool: Run) -> None:
    code, out, _ = spectool(
        str(SAMPLES / "digits_cnn.onnx"),
        *("--max", "3.5", "--layers", "up.*", "-o", "out.onnx", "--format", "json", "-k", "2"),
    )
    assert code == 0
    (row,) = json.loads(out)["rows"]
    assert (row["action"], row["metric"], row["kind"]) == ("clipped", "folded", "conv_transpose2d+batchnorm")
    old, new = (
        {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
        for model in (onnx.load(SAMPLES / "digits_cnn.onnx"), onnx.load("out.onnx"))
    )
    onnx.checker.check_model("out.onnx")
    changed = [name for name in old if not np.array_equal(old[name], new[name])]
    assert changed == ["up.conv.weight"] == json.loads(out)["changed"]
    weight, norm = torch.from_numpy(new["up.conv.weight"].copy()).double(), torch.nn.BatchNorm2d(12).double()
    for name in ("weight", "running_var"):
        getattr(norm, name).data = torch.from_numpy(new[f"up.bn.{name}"].copy()).double()
    (node,) = (
        node
        for node in onnx.load("out.onnx").graph.node
        if node.op_type == "ConvTranspose" and "up" in node.input[1]
    )
    settings = {item.name: list(item.ints) for item in node.attribute}
    columns = torch.eye(24 * 16, dtype=torch.float64).reshape(-1, 24, 4, 4)
    made = torch.nn.functional.conv_transpose2d(
        columns, weight, stride=settings["strides"], padding=settings["pads"][:2]
    )
    matrix = norm.eval()(made) - norm(torch.zeros_like(made))
    truth = sigma(matrix.detach().reshape(24 * 16, -1))
    assert 3.5 * (1 - 3e-4) <= truth <= 3.5 * (1 + 1e-9)
    assert row["after"]["lower"] <= truth * (1 + 1e-9)
    assert truth <= row["after"]["proven"] * (1 + 1e-9)


def test_the_running_mean_follows_unless_told_not_to(spectool: Run) -> None:
    source = str(SAMPLES / "digits_cnn.onnx")
    arguments = (source, "--max", "1.95", "--layers", "down.*", "--format", "json", "-k", "1")
    code, out, err = spectool(*arguments, "-o", "out.onnx")
    assert code == 0
    assert json.loads(out)["rows"][0]["recentered"] == ["down.bn.running_mean"]
    old, new = (
        {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
        for path in (source, "out.onnx")
    )
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    # Batch norms further on follow where the narrower output moves what is behind their ReLU.
    assert {name for name in changed if not name.endswith("running_mean")} == {"down.conv.weight"}
    assert "down.bn.running_mean" in changed
    assert "stem.bn.running_mean" not in changed
    # All that moved are told, with how far.
    moved = {name: np.abs(new[name] - old[name]) for name in changed if name.endswith("running_mean")}
    adjusted = json.loads(out)["adjusted"]
    assert adjusted.keys() == moved.keys()
    for name, shift in moved.items():
        deviation = np.sqrt(old[name.replace("mean", "var")] + 1e-5)
        assert adjusted[name] == pytest.approx((shift / deviation).max(), rel=1e-3)
    assert f"note: {len(moved)} running means or biases follow the weights, by at most" in err
    _, out, err = spectool(*arguments, "-n", "--no-recenter")
    assert json.loads(out)["changed"] == ["down.conv.weight"]
    assert json.loads(out)["settings"]["recenter"] == "none"
    assert "follow" not in err


def test_json_obeys_the_schema(spectool: Run) -> None:
    schema = json.loads((ROOT / "docs/schema/clip.schema.json").read_text())
    for arguments in (
        [str(MLP), "--max", "fc1.*=1.0", "-n"],
        [str(SAMPLES / "quantised_conv.onnx"), "--max", "0.1", "-n"],
        [str(SAMPLES / "digits_mlp_bf16.safetensors"), "--max", "1", "--prove", "-o", "b.safetensors"],
    ):
        code, out, _ = spectool(*arguments, "--format", "json")
        document = json.loads(out, parse_constant=pytest.fail)
        jsonschema.validate(document, schema)
        assert code == (4 if document["counts"]["refused"] else 0)
        assert all(row["reason"] for row in document["rows"] if row["action"] in ("refused", "listed"))
        assert document["output"] == (None if "-n" in arguments else "b.safetensors")


def test_half_types_stay_below_the_limit(spectool: Run) -> None:
    assert spectool(str(SAMPLES / "digits_mlp_bf16.safetensors"), "--max", "1", "-o", "b.safetensors")[0] == 0
    for name, tensor in load_file("b.safetensors").items():
        if name.endswith("weight"):
            assert tensor.dtype == torch.bfloat16
            assert sigma(tensor) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.safetensors"], "there is no limit to clip to"),
        (["net.safetensors", "--max", "1"], "there is nowhere to write"),
        (["net.safetensors", "--max", "1", "-o", "-"], "a checkpoint is not written to stdout"),
        (["net.safetensors", "--max", "1", "-o", "net.safetensors"], "net.safetensors is the file to read"),
        (["net.safetensors", "--max", "1", "-o", ".git"], ".git exists already"),
        (["net.safetensors", "--max", "1", "-o", "no/out.safetensors"], "there is no folder"),
        (["net.safetensors", "--max", "1", "--in-place"], "--in-place replaces net.safetensors"),
        (["net.safetensors", "--max", "1", "--in-place", "-o", "x"], "-o and --in-place name two files"),
        (["net.safetensors", "--max", "1", "-n", "--report", "net.safetensors"], "cannot tell the format"),
        (
            ["net.safetensors", "--max", "1", "-o", "x.csv", "--report", "x.csv"],
            "x.csv cannot be both the checkpoint and the report",
        ),
        (
            ["net.safetensors", "--max", "1", "-n", "--format", "csv", "--report", "net.safetensors"],
            "net.safetensors is the file to read",
        ),
        (
            ["net.safetensors", "--max", "1", "-n", "--no-recenter", "--recenter", "bias"],
            "contradict each other",
        ),
        (["net.safetensors", "--max", "1", "-n", "--calibrate", "no.npz"], "there is no file no.npz"),
        (
            ["net.safetensors", "--max", "1", "-n", "--method", "lanczos"],
            "'lanczos' is not one of 'auto', 'svd'",
        ),
        (["net.safetensors", "--max", "1", "-n", "--columns", "changes"], "no column called 'changes'"),
        (["net.safetensors", "--max", "0", "-n"], "no positive finite number"),
        (["net.safetensors", "--max", "fc9*=1", "-n"], "matches no row"),
        (["net.safetensors", "--max", "1", "-n", "-k", "0"], "asks for no singular value"),
        (["gone.safetensors", "--max", "1", "-n"], "there is no file gone.safetensors"),
    ],
)
def test_what_cannot_be_clipped_exits_with_2(
    spectool: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    there, data = sorted(tmp_path.iterdir()), (tmp_path / "net.safetensors").read_bytes()
    code, out, err = spectool(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "error: " in err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == there
    assert (tmp_path / "net.safetensors").read_bytes() == data


def test_a_dry_run_writes_nothing(spectool: Run, tmp_path: Path) -> None:
    data = (tmp_path / "net.safetensors").read_bytes()
    code, out, err = spectool(
        "net.safetensors", "--max", "1.5", "-n", "-o", "out.safetensors", "--format", "csv"
    )
    assert code == 0
    assert out.count("clipped") == 2
    assert "nothing written (--dry-run): 2 " in err
    assert "hint: -o OUT instead of --dry-run writes it" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "net.safetensors"]
    assert (tmp_path / "net.safetensors").read_bytes() == data


def test_what_is_there_is_replaced_only_when_forced(spectool: Run, tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").write_text("precious")
    assert spectool("net.safetensors", "--max", "1.5", "-o", "out.safetensors")[0] == 2
    assert (tmp_path / "out.safetensors").read_text() == "precious"
    assert spectool("net.safetensors", "--max", "1.5", "-o", "out.safetensors", "--force")[0] == 0
    assert sigma(load_file("out.safetensors")["fc3.weight"]) <= 1.5
    code, _, err = spectool("net.safetensors", "--max", "1.5", "--in-place", "--force")
    assert code == 0
    assert "wrote net.safetensors: 2 " in err
    assert (tmp_path / "net.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    code, _, err = spectool("net.safetensors", "--max", "1.5", "-o", "same.safetensors")
    assert "wrote same.safetensors: nothing changed, it is a copy" in err
    assert (tmp_path / "net.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()


def test_the_file_itself_is_replaced_by_its_name_when_forced(spectool: Run, tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to("net.safetensors")
    assert spectool("net.safetensors", "--max", "1.5", "-o", "link.safetensors", "--force")[0] == 0
    assert (tmp_path / "link.safetensors").is_symlink()
    assert sigma(load_file("net.safetensors")["fc3.weight"]) <= 1.5


def test_reports_by_suffix_and_a_suffix_that_misleads(spectool: Run, tmp_path: Path) -> None:
    for name in ("r.csv", "r.tsv", "r.json", "r.jsonl", "r.md", "r.xlsx"):
        code, out, err = spectool("net.safetensors", "--max", "1.5", "-n", "--report", name)
        assert (code, out) == (0, "")
        assert f"wrote {name}\n" in err
        assert (tmp_path / name).stat().st_size > 100
    _, _, err = spectool("net.safetensors", "--max", "1.5", "-o", "out.pt")
    assert "warning: out.pt ends in .pt, but what is written has the format of net.safetensors" in err
    assert set(load_file("out.pt")) == set(load_file("net.safetensors"))
    code, _, err = spectool("net.safetensors", "--max", "1.5", "-o", "quiet", "-q")
    assert (code, err) == (
        0,
        "2 clipped, 1 within their limits already\n3 of 3 linear maps analysed, 0 skipped\n",
    )


def test_the_table_shows_what_was_clipped_and_v_all(spectool: Run) -> None:
    _, out, _ = spectool("net.safetensors", "--max", "1.5", "-n", "--format", "table")
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["fc2.weight", "fc3.weight"]
    assert "2.0000 → 1.5000" in out
    _, out, err = spectool("net.safetensors", "--max", "1.5", "-n", "--format", "table", "-v")
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert "fc3.weight: svd" in err
    _, out, _ = spectool("net.safetensors", "--max", "9", "-n", "--format", "table")
    assert out == ""


def test_limits_levels_and_methods(spectool: Run) -> None:
    def result(*arguments: str) -> Mapping[str, tuple[str, float]]:
        _, out, _ = spectool("net.safetensors", "-n", "--format", "json", *arguments)
        return {
            row["layer"]: (row["action"], row["sigma"][0] if row["sigma"] else 0.0)
            for row in json.loads(out)["rows"]
        }

    found = result("--max", "1.5", "--max", "fc3*=2.5", "--exclude", "fc1*")
    assert found == {
        "fc2.weight": ("clipped", pytest.approx(1.5)),
        "fc3.weight": ("clipped", pytest.approx(2.5)),
    }
    found = result("--max", "fc3*=2.5", "--level", "layer")
    assert [action for action, _ in found.values()] == ["listed", "listed", "clipped"]
    _, _, err = spectool("net.safetensors", "-n", "--max", "fc3*=2.5")
    assert err.splitlines()[0] == "1 clipped, 0 within their limits already, 2 not gated"
    assert err.splitlines()[-1] == "1 of 3 linear maps analysed, 0 skipped"
    for method in ("svd", "scale"):
        assert result("--max", "2.5", "--method", method)["fc3.weight"] == (
            "clipped",
            pytest.approx(2.5, rel=3e-4),
        )


def test_a_folder_of_shards(spectool: Run, tmp_path: Path) -> None:
    code, _, err = spectool(str(SAMPLES / "digits_mlp_sharded"), "--max", "1.0", "-o", "shards")
    assert code == 0
    assert "warning" not in err
    tensors = {
        name: tensor
        for path in (tmp_path / "shards").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert max(sigma(tensor) for tensor in tensors.values() if tensor.ndim == 2) <= 1 + 1e-9


def test_the_library_twin(spectool: Run, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "net.safetensors", "again.safetensors")
    report = library.clip("again.safetensors", max=1.5, out="made.safetensors")
    assert isinstance(report, library.ClipReport)
    assert isinstance(report.rows[0], library.ClipRow)
    import_module("spectool.clip.svd")  # the package of that name must not come in between
    assert library.clip("again.safetensors", max=1.5, dry_run=True).summary() == report.summary()
    spectool("net.safetensors", "--max", "1.5", "-o", "out.safetensors")
    assert (tmp_path / "made.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
