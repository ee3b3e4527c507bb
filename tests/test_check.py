"""``spectool.check`` on real files against dense singular values that numpy and the samples' truth give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectool
from spectool.api import settling
from spectool.errors import NothingToAnalyse, UsageError
from spectool.report import CheckReport, CheckRow

SAMPLES = Path(__file__).parents[1] / "sample_models"
EXPECTED = json.loads((SAMPLES / "expected.json").read_text())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def truth(name: str) -> dict[tuple[str, str], float]:
    return {
        (row["layer"], row["level"]): row["sigma"][0]
        for row in EXPECTED["answers"][EXPECTED["files"][name]["answers"]]
    }


def by_key(report: CheckReport) -> dict[tuple[str, str], CheckRow]:
    return {(row.row.layer, row.row.level): row for row in report.rows}


def verdicts(report: CheckReport) -> dict[str, str]:
    return {row.row.layer: row.verdict for row in report.rows}


# --- truth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("digits_cnn.onnx", 2.55),
        ("digits_cnn_torchscript.pt", 2.05),
        ("digits_mlp.onnx", 2.0),
        ("digits_mlp.onnx", 2.7),
        ("digits_mlp.onnx", 20.0),
    ],
)
def test_a_verdict_agrees_with_the_dense_truth(name: str, limit: float) -> None:
    report = spectool.check(SAMPLES / name, limit, **EXPECTED["files"][name]["options"])
    known = truth(name)
    gated = [row for row in report.rows if row.gated]
    assert gated
    for row in gated:
        sigma = known[row.row.layer, row.row.level]
        # Every operator here is small enough to be decided, but for one at the limit itself.
        assert row.verdict == ("proven" if sigma <= limit else "violated"), row
        assert row.row.lower is None or row.row.lower <= sigma * (1 + 1e-9)
        assert row.row.upper is None or row.row.upper >= sigma * (1 - 1e-9)


def test_the_limit_may_lie_anywhere_above_or_below_the_truth() -> None:
    for (layer, level), sigma in truth("digits_cnn.onnx").items():
        if layer not in ("down.conv.weight + down.bn.weight", "up.conv.weight"):
            continue
        for factor, verdict in ((1 + 1e-6, "proven"), (1 - 1e-6, "violated")):
            report = spectool.check(SAMPLES / "digits_cnn.onnx", sigma * factor, layers=[layer], level=level)
            assert by_key(report)[layer, level].verdict == verdict, (layer, factor)


def test_orthogonal_weights_straddle_one_and_a_little_slack_proves_them(tmp_path: Path) -> None:
    matrix = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))[0]
    save_file({"fc.weight": torch.from_numpy(matrix)}, tmp_path / "net.safetensors")
    exact = spectool.check(tmp_path / "net.safetensors", 1.0)
    assert (exact.verdict, exact.exit_code()) == ("undecided", 4)
    assert exact.rows[0].needs is not None
    assert exact.rows[0].needs < 1e-10
    assert spectool.check(tmp_path / "net.safetensors", 1.0, slack=1e-9).ok


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution on 48×48 whose kernel is positive: σ₁ is just below the sum of its entries."""
    layer = torch.nn.Conv2d(1, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 19.0).reshape(2, 1, 3, 3) / 100)
    path = tmp_path_factory.mktemp("large") / "conv.pt2"
    program = torch.export.export(torch.nn.Sequential(layer).eval(), (torch.zeros(1, 1, 48, 48),))
    torch.export.save(program, path)
    return path


def supremum() -> float:
    kernel = np.arange(1.0, 19.0).reshape(2, 9) / 100
    return float(np.linalg.norm(kernel.sum(axis=1)))


def test_a_large_convolution_is_proven_by_its_bound_alone(large: Path) -> None:
    row = spectool.check(large, supremum() * 1.01).rows[0]
    assert row.verdict == "proven"
    assert (row.row.method, row.row.matvecs, row.row.sigma) == ("bound", 0, ())
    assert row.row.upper is not None
    assert row.row.upper == pytest.approx(supremum(), rel=5e-3)
    # What the bound does not prove is solved, and decided as the solve says.
    beyond = spectool.check(large, supremum() * 0.9).rows[0]
    assert beyond.verdict == "violated"
    assert beyond.row.sigma
    assert beyond.row.lower is not None
    assert supremum() * 0.98 < beyond.row.lower < supremum()


def test_what_a_solve_leaves_open_a_dense_factorisation_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "down.conv.weight + down.bn.weight"
    limit = truth("digits_cnn.onnx")[key, "composed"] * 1.0001
    chosen: dict[str, Any] = {"max": limit, "layers": [key]}
    assert spectool.check(SAMPLES / "digits_cnn.onnx", **chosen).rows[0].verdict == "proven"
    monkeypatch.setattr(settling, "_SIDE", 0)
    row = spectool.check(SAMPLES / "digits_cnn.onnx", **chosen).rows[0]
    assert (row.verdict, row.row.upper_kind) == ("undecided", "symbol")
    assert row.needs is not None
    assert row.needs > 0.001


# --- tensors only ----------------------------------------------------------------------------------------


def test_tensors_alone_prove_but_never_violate_a_convolution() -> None:
    report = spectool.check(SAMPLES / "digits_cnn_state.pt", 2.25)
    known = truth("digits_cnn_state.pt")
    found = by_key(report)
    for (layer, level), row in found.items():
        if not row.gated:
            continue
        above = known[layer, level] > 2.25
        if row.row.input_shape is None:
            assert row.verdict == ("undecided" if above else "proven"), layer
        else:
            assert row.verdict == ("violated" if above else "proven"), layer
    assert {row.verdict for row in found.values()} == {"proven", "violated", "undecided", "unlimited"}


def test_a_lone_batch_norm_is_gated_only_by_its_kind() -> None:
    listed = [
        row
        for row in spectool.check(SAMPLES / "digits_cnn_state.pt", 100.0).rows
        if row.row.kind == "batchnorm"
    ]
    assert listed
    assert {(row.verdict, row.row.sigma) for row in listed} == {("unlimited", ())}
    assert all("--kind batchnorm" in row.reason for row in listed)
    named = spectool.check(SAMPLES / "digits_cnn_state.pt", 1e-9, kinds=["batchnorm"])
    # Their eps is not in the file, so that they are known from above only.
    assert {row.verdict for row in named.rows} == {"undecided"}
    assert spectool.check(SAMPLES / "digits_cnn_state.pt", 1e9, kinds=["batchnorm"]).ok


# --- which rows ------------------------------------------------------------------------------------------


def test_maximal_regions_by_default_and_stored_operators_by_level() -> None:
    chosen = ["stem.*", "down.*", "head.*"]
    composed = spectool.check(SAMPLES / "digits_cnn.onnx", 100.0, layers=chosen)
    layers = spectool.check(SAMPLES / "digits_cnn.onnx", 100.0, layers=chosen, level="layer")
    assert {row.row.maximal for row in composed.rows} == {True}
    assert {row.row.level for row in layers.rows} == {"layer"}
    assert verdicts(layers)["stem.conv.weight"] == "proven"
    assert verdicts(layers)["stem.bn.weight"] == "unlimited"
    assert "stem.conv.weight" not in verdicts(composed)


def test_limits_go_by_pattern_and_rows_without_one_are_not_computed() -> None:
    report = spectool.check(SAMPLES / "digits_mlp_state.pt", {"fc1.*": 1.0, "fc2.*": 100.0})
    found = verdicts(report)
    assert (found["fc1.weight"], found["fc2.weight"], found["fc3.weight"]) == (
        "violated",
        "proven",
        "unlimited",
    )
    last = by_key(report)["fc3.weight", "layer"]
    assert (last.row.sigma, last.limit, last.reason) == ((), None, "no limit matches it")
    assert report.coverage == (2, len(report.rows), 0)
    assert report.counts == {"proven": 1, "violated": 1, "undecided": 0, "unlimited": len(report.rows) - 2}


def test_shards_together_are_the_whole() -> None:
    whole = verdicts(spectool.check(SAMPLES / "digits_mlp_state.pt", 2.6))
    parts: dict[str, str] = {}
    for index in (1, 2, 3):
        # A pattern need only match in the file, not in the shard.
        part = spectool.check(SAMPLES / "digits_mlp_state.pt", {"*": 2.6, "fc1.*": 2.6}, shard=(index, 3))
        assert not set(parts) & set(verdicts(part))
        parts |= verdicts(part)
    assert parts == whole


def test_a_live_module_can_be_checked() -> None:
    layer = torch.nn.Linear(5, 4)
    sigma = float(np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)[0])
    module = torch.nn.Sequential(layer, torch.nn.ReLU())
    assert spectool.check(module, sigma * 1.00001, input_shape=(1, 5)).ok
    assert spectool.check(module, sigma * 0.99999, input_shape=(1, 5)).verdict == "fail"


def test_weights_that_are_not_finite_are_undecided(tmp_path: Path) -> None:
    bad = torch.eye(3)
    bad[1, 1] = float("nan")
    save_file({"a.weight": torch.eye(3), "b.weight": bad}, tmp_path / "net.safetensors")
    report = spectool.check(tmp_path / "net.safetensors", 2.0)
    assert verdicts(report) == {"a.weight": "proven", "b.weight": "undecided"}
    assert "NaN" in by_key(report)["b.weight", "layer"].reason
    assert report.exit_code() == 4


# --- errors ----------------------------------------------------------------------------------------------


def test_there_must_be_something_to_check() -> None:
    with pytest.raises(UsageError, match="there is no limit to check"):
        spectool.check(SAMPLES / "digits_mlp_state.pt")
    with pytest.raises(UsageError, match="matches no row"):
        spectool.check(SAMPLES / "digits_mlp_state.pt", {"fc9.*": 1.0})
    with pytest.raises(NothingToAnalyse, match="nothing is asked of any"):
        spectool.check(SAMPLES / "digits_cnn_state.pt", {"stem.bn.*": 1.0})


@pytest.mark.parametrize("name", ["slack", "tolerance"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1%"])
def test_relative_amounts_are_numbers_that_are_not_negative(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name}=.* is no relative amount"):
        spectool.check(SAMPLES / "digits_mlp_state.pt", 1.0, **{name: value})


# --- baselines -------------------------------------------------------------------------------------------


def scaled_copy(path: Path, factors: dict[str, float], renamed: dict[str, str] | None = None) -> Path:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{name}.weight": torch.randn(6, 5, generator=generator) * factors.get(name, 1.0)
        for name in ("a", "b", "c", "d")
    }
    save_file({(renamed or {}).get(key, key): tensor for key, tensor in tensors.items()}, path)
    return path


def test_a_baseline_finds_what_has_grown(tmp_path: Path) -> None:
    old = scaled_copy(tmp_path / "old.safetensors", {})
    new = scaled_copy(
        tmp_path / "new.safetensors", {"a": 1.005, "b": 1.02, "c": 0.5}, {"d.weight": "e.weight"}
    )
    baseline = tmp_path / "old.json"
    baseline.write_text(json.dumps(spectool.inspect(old, certify=True).to_dict()))
    report = spectool.check(new, baseline=baseline)
    compared = {row.row.layer: row.baseline.verdict for row in report.rows if row.baseline is not None}
    assert compared == {"a.weight": "held", "b.weight": "regressed", "c.weight": "held", "e.weight": "new"}
    assert verdicts(report)["e.weight"] == "unlimited"
    assert report.baseline is not None
    assert report.baseline.vanished == ("d.weight",)
    assert (report.verdict, report.exit_code()) == ("fail", 1)
    assert report.summary() == "FAIL: 1 of 3 operators exceeds its bound, 1 new, 1 vanished, 1 not gated"
    assert spectool.check(new, baseline=baseline, tolerance=0.03).ok
    assert spectool.check(new, baseline=baseline, tolerance=0.001).counts["violated"] == 2


@pytest.mark.parametrize("name", ["digits_cnn.onnx", "digits_cnn_state.pt", "digits_mlp_bf16.safetensors"])
def test_an_unchanged_file_is_held_even_without_tolerance(name: str, tmp_path: Path) -> None:
    baseline = tmp_path / "old.json"
    costly = ["mix.*", "dilated.*"]
    first = spectool.check(SAMPLES / name, 1000.0, exclude=costly)
    baseline.write_text(json.dumps(first.to_dict()))
    again = spectool.check(SAMPLES / name, baseline=baseline, tolerance=0.0, exclude=costly)
    assert again.counts["violated"] == again.counts["undecided"] == 0
    assert again.counts["proven"] == first.counts["proven"] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON document"),
        ("[" * 100_000, "is no JSON document"),
        ("[1]", "is no result of spectool"),
        ('{"rows": []}', "is no result of spectool"),
        ('{"schema": 2, "rows": []}', "has schema 2; this version reads 1"),
        ('{"schema": 1, "tensors": []}', "has no rows"),
        ('{"schema": 1, "rows": [3]}', "row 0 of the baseline .* is no object"),
        ('{"schema": 1, "rows": [{"layer": "a"}]}', "row 0 of the baseline .* has no 'level'"),
        (
            '{"schema": 1, "rows": [{"layer": "a", "level": "layer", "lower": "x", "upper": 1, "status": "ok"}]}',
            "'lower' of row 0 of the baseline .* is 'x', no number",
        ),
        ('{"schema": 1, "rows": []}', "has no row in common"),
    ],
)
def test_a_baseline_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        spectool.check(SAMPLES / "digits_mlp_state.pt", baseline=path)


def test_a_missing_baseline_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"old\.json cannot be read: No such file"):
        spectool.check(SAMPLES / "digits_mlp_state.pt", baseline=tmp_path / "old.json")
