"""The library: what `inspect` and `svds` accept, refuse and report."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import spectool
from spectool.api.job import _cached
from spectool.errors import NothingToAnalyse, UsageError
from spectool.graph.types import Survey
from spectool.progress import Step

MLP = Path(__file__).parent.parent / "sample_models" / "digits_mlp_state.pt"


def truth(matrix: torch.Tensor) -> np.ndarray:
    return np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False)


def test_svds_takes_matrices_modules_and_functions() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)
    expected = truth(layer.weight)
    with torch.no_grad():
        layer.bias.fill_(1e6)  # an offset must not be seen
    weight = layer.weight.detach()
    for operator, shape in ((weight, None), (layer, (7,)), (lambda x: x @ weight.T + 3.0, (7,))):
        result = spectool.svds(operator, shape, k=3)
        np.testing.assert_allclose(result.values, expected[:3], rtol=1e-6)
        for low, value, high in zip(result.lower, expected, result.upper, strict=False):
            assert low <= value * (1 + 1e-6)
            assert value * (1 - 1e-6) <= high
    assert layer.weight.requires_grad


@pytest.mark.parametrize(
    "operator,shape,message",
    [
        (torch.zeros(2, 3, 4), None, "no matrix"),
        (lambda x: x, None, "needs in_shape="),
        ("net.pt", None, "cannot take singular values of a str"),
    ],
)
def test_svds_refuses_what_is_no_operator(operator: object, shape: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spectool.svds(operator, shape)  # type: ignore[arg-type]


def test_a_function_gives_one_row() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    report = spectool.inspect(lambda x: x @ weight, k=2, input_shape=(3,))
    (row,) = report.rows
    np.testing.assert_allclose(row.sigma, [3.0, 2.0], rtol=1e-6)
    assert row.input_shape == row.output_shape == (3,)


def test_a_live_module_gives_layers_pairs_and_shapes() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    )
    nn.init.uniform_(module[1].running_var, 0.5, 2.0)
    module.train()
    report = spectool.inspect(module, k=3, input_shape=(1, 2, 4, 4))
    assert [(row.layer, row.level) for row in report.rows] == [
        ("0.weight", "layer"),
        ("1.weight", "layer"),
        ("0.weight + 1.weight", "composed"),
        ("4.weight", "layer"),
    ]
    assert module.training
    module.eval()
    pair = torch.autograd.functional.jacobian(
        module[:2].double(), torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    )
    np.testing.assert_allclose(report.rows[2].sigma, truth(pair.reshape(48, 32))[:3], rtol=1e-6)
    parts = report.rows[0].sigma[0] * report.rows[1].sigma[0] / report.rows[2].sigma[0]
    assert report.rows[2].note == f"parts multiply to {parts:.3g} times this"
    assert report.coverage == (2, 2, 0)


def test_weights_that_are_not_finite_fail_their_rows_and_no_others(tmp_path: Path) -> None:
    good, bad, worse = torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 2)
    bad[1, 2] = float("nan")
    worse[0] = float("inf")
    torch.save({"a.weight": good, "b.weight": bad, "c.weight": worse}, tmp_path / "net.pt")
    rows = spectool.inspect(tmp_path / "net.pt", k=2).rows
    assert [row.status for row in rows] == ["ok", "failed", "failed"]
    assert rows[1].note == "b.weight holds 1 NaN or infinite values of 12"
    assert rows[2].note == "c.weight holds 2 NaN or infinite values of 4"
    np.testing.assert_allclose(rows[0].sigma, truth(good)[:2], rtol=1e-9)


def test_k_is_clamped_with_a_note(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(3, 4)}, tmp_path / "net.pt")
    (row,) = spectool.inspect(tmp_path / "net.pt", k=100).rows
    assert len(row.sigma) == 3
    assert "k = 100 clamped to 3" in row.note


@pytest.mark.parametrize("k", [0, -1, True, 1.5])
def test_k_must_count(k: object) -> None:
    with pytest.raises(UsageError, match="it counts singular values"):
        spectool.inspect(MLP, k=k)  # type: ignore[arg-type]


def test_filters_choose_rows_and_an_empty_choice_is_an_error() -> None:
    assert [row.layer for row in spectool.inspect(MLP, layers=("fc2*",), list_only=True).rows] == [
        "fc2.weight"
    ]
    everything = [row.layer for row in spectool.inspect(MLP, list_only=True).rows]
    kept = [row.layer for row in spectool.inspect(MLP, exclude=("fc1*",), list_only=True).rows]
    assert kept == everything[1:]
    shards = [spectool.inspect(MLP, shard=(i, 3), list_only=True).rows for i in (1, 2, 3)]
    assert sorted(row.layer for rows in shards for row in rows) == sorted(everything)
    with pytest.raises(NothingToAnalyse, match="the filters leave none"):
        spectool.inspect(MLP, layers=("nothing",))
    with pytest.raises(UsageError, match="no level is called"):
        spectool.inspect(MLP, level="both of them")
    with pytest.raises(UsageError, match="makes no sense"):
        spectool.inspect(MLP, shard=(4, 3))


def test_devices_and_types_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="no device is called 'gpu'"):
        spectool.inspect(MLP, device="gpu")
    with pytest.raises(UsageError, match="not available here"):
        spectool.inspect(MLP, device="cuda:63")
    with pytest.raises(UsageError, match="not computed in float16"):
        spectool.inspect(MLP, dtype="float16")


def test_the_same_seed_gives_the_same_numbers_and_progress_is_told() -> None:
    steps: list[Step] = []
    first = spectool.inspect(MLP, method="lanczos", k=3, seed=5, progress=steps.append)
    again = spectool.inspect(MLP, method="lanczos", k=3, seed=5)
    for one, two in zip(first.rows, again.rows, strict=True):
        assert (one.sigma, one.sigma_lower, one.sigma_upper) == (two.sigma, two.sigma_lower, two.sigma_upper)
        assert (one.matvecs, one.residual) == (two.matvecs, two.residual)
    assert {step.task for step in steps} >= {row.layer for row in first.rows}
    assert max(step.index for step in steps) == len(first.rows) - 1


def test_the_hash_is_the_files(tmp_path: Path) -> None:
    report = spectool.inspect(MLP, list_only=True, hash=True)
    assert report.sha256 == hashlib.sha256(MLP.read_bytes()).hexdigest()
    assert spectool.inspect(MLP, list_only=True).sha256 is None
    assert list(report.to_pandas()["layer"]) == [row.layer for row in report.rows]


@pytest.mark.gpu
def test_devices_agree() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    here = spectool.inspect(MLP, method="lanczos", k=4, device="cpu")
    there = spectool.inspect(MLP, method="lanczos", k=4, device="cuda")
    for one, two in zip(here.rows, there.rows, strict=True):
        np.testing.assert_allclose(one.sigma, two.sigma, rtol=1e-6)


def test_the_cache_of_weights_takes_the_same_time_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding one must not look at all that are held; the oldest go when there are too many."""
    looked: list[str] = []

    class Held:
        def __init__(self, name: str) -> None:
            self.name = name

        @property
        def nbytes(self) -> int:
            looked.append(self.name)
            return 16

    loaded: list[str] = []
    monkeypatch.setattr("spectool.api.job._CACHE_BYTES", 1600)
    cache = _cached(Survey((), lambda name: loaded.append(name) or Held(name), "test"))  # type: ignore[func-returns-value, return-value, arg-type]
    for index in range(1000):
        cache(str(index))
    assert len(looked) <= 4000
    for index in range(900, 1000):
        cache(str(index))
    assert len(loaded) == 1000
    cache("899")
    assert len(loaded) == 1001
