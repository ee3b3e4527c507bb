"""Effective weights against torch's own live modules, and against packings written from the published formats."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_tools import checkpoint, regions, skips
from torch import nn
from torch.nn.utils import prune

from spectool.errors import OperatorError
from spectool.graph.effective import Weights
from spectool.graph.names import survey_names
from spectool.graph.types import Region

# --- weights that a module recomputes ---------------------------------------------------------------------


def old(function: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(*args, **options)


def spun(module: nn.Module) -> nn.Module:
    """A module whose power iteration has run a few times, left in evaluation mode."""
    for _ in range(3):
        module(example(module))
    return module.eval()


def example(module: nn.Module) -> torch.Tensor:
    return torch.randn(
        (2, module.in_features) if isinstance(module, nn.Linear) else (2, module.in_channels, 6, 6)
    )


PARAMETRISED: dict[str, Callable[[], nn.Module]] = {
    "weight norm, old": lambda: old(nn.utils.weight_norm, nn.Linear(5, 4)),
    "weight norm, old, axis 1": lambda: old(nn.utils.weight_norm, nn.Conv2d(3, 4, 2), dim=1),
    "weight norm, old, whole": lambda: old(nn.utils.weight_norm, nn.Conv2d(3, 4, 2), dim=None),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, (2, 3))),
    "weight norm, axis 1": lambda: nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 2), dim=1),
    "weight norm, last axis": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 4), dim=1),
    "weight norm, one output": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 1)),
    "spectral norm, old": lambda: old(nn.utils.spectral_norm, nn.Linear(5, 4)),
    "spectral norm, old, convolution": lambda: old(nn.utils.spectral_norm, nn.Conv2d(3, 4, 3)),
    "spectral norm, old, transposed": lambda: old(nn.utils.spectral_norm, nn.ConvTranspose2d(3, 4, 3)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)),
    "spectral norm, square": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "spectral norm, convolution": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
    "spectral norm, transposed": lambda: nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(3, 4, 3)),
    "pruned": lambda: prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.4),
}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.a.b."])
@pytest.mark.parametrize("case", PARAMETRISED)
def test_effective_weight_is_what_evaluation_uses(case: str, prefix: str) -> None:
    torch.manual_seed(0)
    module = spun(PARAMETRISED[case]())
    found = survey_names(checkpoint({f"{prefix}{k}": v.detach() for k, v in module.state_dict().items()}))
    (row,) = found.items
    assert isinstance(row, Region)
    assert row.key == f"{prefix}weight"
    assert row.note.startswith((case.split(",")[0], f"{prefix}weight_orig pruned"))
    assert {name for name in module.state_dict() if name != "bias"} == {
        n.removeprefix(prefix) for n in row.weights
    }
    with torch.no_grad():
        module(example(module))
        torch.testing.assert_close(found.load(row.key).float(), module.weight.data, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_effective_weights_are_rounded_to_float64_only(stored: torch.dtype) -> None:
    torch.manual_seed(0)
    v, g = torch.randn(4, 5).to(stored), torch.rand(4, 1).to(stored)
    found = survey_names(checkpoint({"weight_g": g, "weight_v": v}))
    truth = v.double() * g.double() / v.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.load("weight"), truth, rtol=1e-15, atol=0)


def test_a_square_spectral_norm_of_a_convolution_finds_its_axis() -> None:
    torch.manual_seed(1)
    for kind in (nn.Conv2d, nn.ConvTranspose2d):
        module = nn.utils.parametrizations.spectral_norm(kind(4, 4, 3), n_power_iterations=20)
        module(torch.randn(1, 4, 6, 6))
        module.eval()
        found = survey_names(checkpoint({k: v.detach() for k, v in module.state_dict().items()}))
        torch.testing.assert_close(found.load("weight").float(), module.weight.data, rtol=2e-6, atol=1e-7)


def test_recurrent_weights_under_weight_norm_are_cut_into_gates() -> None:
    lstm = old(nn.utils.weight_norm, nn.LSTM(3, 4), "weight_hh_l0")
    tensors = {name: value.detach() for name, value in lstm.state_dict().items()}
    found = survey_names(checkpoint(tensors))
    gates = [row for row in regions(found).values() if row.key.startswith("weight_hh_l0[")]
    assert [row.key for row in gates] == [f"weight_hh_l0[{at}:{at + 4}]" for at in (0, 4, 8, 12)]
    whole = torch._weight_norm(tensors["weight_hh_l0_v"], tensors["weight_hh_l0_g"], 0)
    for at, row in zip((0, 4, 8, 12), gates, strict=True):
        assert row.weights == ("weight_hh_l0_g", "weight_hh_l0_v")
        torch.testing.assert_close(found.load(row.key).float(), whole[at : at + 4])


def test_what_a_file_does_not_hold_is_skipped_with_its_reason() -> None:
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    twice = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    twice = nn.utils.parametrizations.spectral_norm(twice)
    tensors = {
        **{f"a.{k}": v.detach() for k, v in orthogonal.state_dict().items()},
        **{f"b.{k}": v.detach() for k, v in twice.state_dict().items()},
        "c.weight_orig": torch.randn(3, 2, 3, 3),
        "c.weight_u": torch.randn(3),
    }
    found = skips(survey_names(checkpoint(tensors)))
    assert set(found) == {"a.weight", "b.weight", "c.weight"}
    assert "a function the file does not hold" in found["a.weight"].reason
    assert "a function the file does not hold" in found["b.weight"].reason
    assert "right vector is not in the file" in found["c.weight"].reason
    assert {item.status for item in found.values()} == {"skipped"}
    assert found["c.weight"].kind == "conv2d"


def test_names_that_only_look_like_weight_norm() -> None:
    tensors = {"head.weight_g": torch.randn(3, 5), "head.weight_v": torch.randn(3, 5)}
    assert [item.key for item in survey_names(checkpoint(tensors)).items] == [
        "head.weight_g",
        "head.weight_v",
    ]


# --- and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name in PARAMETRISED if name != "pruned"])
def test_edits_of_an_effective_weight_come_back_from_the_module(case: str) -> None:
    torch.manual_seed(2)
    module = spun(PARAMETRISED[case]())
    state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    weights = survey_names(checkpoint(state)).load
    assert isinstance(weights, Weights)
    wanted = weights("weight") * 0.7 + 0.01 * torch.randn_like(weights("weight"))
    edits = weights.edits({"weight": wanted})
    assert set(edits) <= set(state)
    module.load_state_dict(
        {k: edits[k].to(v.dtype).reshape(v.shape) if k in edits else v for k, v in state.items()}
    )
    with torch.no_grad():
        module(example(module))
        torch.testing.assert_close(module.weight.data, wanted.float(), rtol=1e-5, atol=1e-6)


def test_edits_of_a_pruned_weight_keep_its_zeros() -> None:
    module = PARAMETRISED["pruned"]()
    state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    weights = survey_names(checkpoint(state)).load
    assert isinstance(weights, Weights)
    edits = weights.edits({"weight": weights("weight") * 0.5})
    keep = state["weight_mask"] != 0
    torch.testing.assert_close(edits["weight_orig"][keep].float(), state["weight_orig"][keep] * 0.5)
    assert torch.equal(edits["weight_orig"][~keep], state["weight_orig"][~keep])
    with pytest.raises(OperatorError, match="would fill entries that its pruning mask sets to zero"):
        weights.edits({"weight": torch.ones_like(state["weight_orig"])})


def test_edits_of_parts_gather_into_one_tensor() -> None:
    whole = torch.arange(24.0).reshape(12, 2)
    weights = Weights(checkpoint({"w": whole}))
    first, last = weights.part("w", 0, 4), weights.part("w", 8, 12)
    edits = weights.edits({first: torch.zeros(4, 2), last: torch.ones(4, 2)})
    assert list(edits) == ["w"]
    assert torch.equal(edits["w"], torch.cat([torch.zeros(4, 2), whole[4:8], torch.ones(4, 2)]))
    stack = Weights(checkpoint({"w": torch.zeros(2, 3, 4)}))
    edited = stack.edits({stack.part("w", 1): torch.ones(3, 4)})["w"]
    assert (edited[0].sum(), edited[1].sum()) == (0, 12)


def test_edits_of_a_row_of_zeros_keep_a_direction() -> None:
    state = {"weight_g": torch.ones(2, 1), "weight_v": torch.randn(2, 3)}
    weights = survey_names(checkpoint(state)).load
    assert isinstance(weights, Weights)
    edits = weights.edits({"weight": torch.zeros(2, 3)})
    assert torch.equal(edits["weight_v"].float(), state["weight_v"])
    assert torch.count_nonzero(edits["weight_g"]) == 0


# --- lazily ----------------------------------------------------------------------------------------------


def test_nothing_is_read_before_it_is_asked_for() -> None:
    tensors = {
        "weight_g": torch.ones(2, 1),
        "weight_v": torch.ones(2, 3),
        "q.lora_A.weight": torch.ones(3, 7),
        "q.lora_B.weight": torch.ones(5, 3),
        "q.alpha": torch.ones(()),
    }
    source = checkpoint(tensors)
    read: list[str] = []

    def reader(ref: Any) -> torch.Tensor:
        read.append(ref.name)
        return tensors[ref.name]

    found = survey_names(replace(source, reader=reader))
    assert read == []
    found.load("weight")
    assert sorted(read) == ["weight_g", "weight_v"]


def test_parts_of_one_tensor_are_read_once() -> None:
    tensors = {"weight_ih_l0": torch.randn(16, 3), "weight_hh_l0": torch.randn(16, 4)}
    read: list[str] = []

    def reader(ref: Any) -> torch.Tensor:
        read.append(ref.name)
        return tensors[ref.name]

    found = survey_names(replace(checkpoint(tensors), reader=reader))
    for item in found.items:
        found.load(item.key)
    assert read == ["weight_ih_l0", "weight_hh_l0"]
