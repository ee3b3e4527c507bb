"""Effective weights against torch's own live modules, and against packings written from the published formats."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from graph_tools import checkpoint, regions, run, skips
from torch import nn
from torch.nn.utils import prune

from spectool.errors import OperatorError
from spectool.graph.effective import Weights
from spectool.graph.names import survey_names
from spectool.graph.types import Region, Survey

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
        torch.testing.assert_close(found.load(row.key), module.weight.data, rtol=2e-6, atol=1e-7)
    assert found.load(row.key).dtype == torch.float32


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16, torch.float64])
def test_effective_weights_are_float32_or_better(half: torch.dtype) -> None:
    v, g = torch.randn(4, 5).to(half), torch.rand(4, 1).to(half)
    found = survey_names(checkpoint({"weight_g": g, "weight_v": v}))
    truth = v.double() * g.double() / v.double().norm(dim=1, keepdim=True)
    made = found.load("weight")
    assert made.dtype == (torch.float64 if half == torch.float64 else torch.float32)
    torch.testing.assert_close(made.double(), truth, rtol=1e-7, atol=0)


def test_a_square_spectral_norm_of_a_convolution_finds_its_axis() -> None:
    torch.manual_seed(1)
    for kind in (nn.Conv2d, nn.ConvTranspose2d):
        module = nn.utils.parametrizations.spectral_norm(kind(4, 4, 3), n_power_iterations=20)
        module(torch.randn(1, 4, 6, 6))
        module.eval()
        found = survey_names(checkpoint({k: v.detach() for k, v in module.state_dict().items()}))
        torch.testing.assert_close(found.load("weight"), module.weight.data, rtol=2e-6, atol=1e-7)


def test_recurrent_weights_under_weight_norm_are_cut_into_gates() -> None:
    lstm = old(nn.utils.weight_norm, nn.LSTM(3, 4), "weight_hh_l0")
    tensors = {name: value.detach() for name, value in lstm.state_dict().items()}
    found = survey_names(checkpoint(tensors))
    gates = [row for row in regions(found).values() if row.key.startswith("weight_hh_l0[")]
    assert [row.key for row in gates] == [f"weight_hh_l0[{at}:{at + 4}]" for at in (0, 4, 8, 12)]
    whole = torch._weight_norm(tensors["weight_hh_l0_v"], tensors["weight_hh_l0_g"], 0)
    for at, row in zip((0, 4, 8, 12), gates, strict=True):
        assert row.weights == ("weight_hh_l0_g", "weight_hh_l0_v")
        torch.testing.assert_close(found.load(row.key), whole[at : at + 4])


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
        torch.testing.assert_close(module.weight.data, wanted, rtol=1e-5, atol=1e-6)


def test_edits_of_a_pruned_weight_keep_its_zeros() -> None:
    module = PARAMETRISED["pruned"]()
    state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    weights = survey_names(checkpoint(state)).load
    assert isinstance(weights, Weights)
    edits = weights.edits({"weight": weights("weight") * 0.5})
    keep = state["weight_mask"] != 0
    torch.testing.assert_close(edits["weight_orig"][keep], state["weight_orig"][keep] * 0.5)
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


# --- adapters ---------------------------------------------------------------------------------------------


def delta(found: Survey, key: str) -> torch.Tensor:
    """ΔW of a row, by applying its nodes to unit vectors (kernels: the constant that the node reads)."""
    row = regions(found)[key]
    if row.in_shape is None:
        return found.load(row.nodes[0].inputs[1])
    return run(row, found.load, torch.eye(row.in_shape[0])).T


A, B = torch.randn(3, 7, dtype=torch.float64).float(), torch.randn(5, 3, dtype=torch.float64).float()
PEFT = {"peft_type": "LORA", "r": 3, "lora_alpha": 12}
LOW_RANK: dict[str, tuple[dict[str, torch.Tensor], Mapping[str, Any], float]] = {
    "peft": ({"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}, {"adapter_config": PEFT}, 4.0),
    "peft, named": ({"q.lora_A.default.weight": A, "q.lora_B.default.weight": B}, {"adapter_config": PEFT}, 4.0),
    "peft, json": ({"q.lora_A.weight": A, "q.lora_B.weight": B}, {"adapter_config": json.dumps(PEFT)}, 4.0),
    "rslora": ({"q.lora_A.weight": A, "q.lora_B.weight": B}, {"adapter_config": {**PEFT, "use_rslora": True}}, 12 / 3**0.5),
    "pattern": ({"m.q.lora_A.weight": A, "m.q.lora_B.weight": B}, {"adapter_config": {**PEFT, "alpha_pattern": {"q": 6}}}, 2.0),
    "other pattern": ({"m.xq.lora_A.weight": A, "m.xq.lora_B.weight": B}, {"adapter_config": {**PEFT, "alpha_pattern": {"q": 6}}}, 4.0),
    "loralib": ({"q.lora_A": A, "q.lora_B": B}, {}, 1.0),
    "kohya": ({"lora_unet_q.alpha": torch.tensor(6.0), "lora_unet_q.lora_down.weight": A, "lora_unet_q.lora_up.weight": B}, {}, 2.0),
    "kohya, metadata": ({"lora_unet_q.lora_down.weight": A, "lora_unet_q.lora_up.weight": B}, {"ss_network_alpha": "1.5"}, 0.5),
    "diffusers": ({"unet.attn.to_q.lora.down.weight": A, "unet.attn.to_q.lora.up.weight": B}, {}, 1.0),
    "diffusers, old": ({"attn.processor.to_q_lora.down.weight": A, "attn.processor.to_q_lora.up.weight": B}, {}, 1.0),
    "diffusers, json": (
        {"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B},
        {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "text_encoder.lora_alpha": 60})},
        2.0,
    ),
    "cloneofsimo": ({"text_encoder:0:down": A, "text_encoder:0:up": B}, {"text_encoder:0:rank": "3"}, 1.0),
    "embedding": ({"wte.lora_embedding_A": A, "wte.lora_embedding_B": B}, {"adapter_config": PEFT}, 4.0),
}  # fmt: skip


@pytest.mark.parametrize("case", LOW_RANK)
def test_low_rank_updates(case: str) -> None:
    tensors, metadata, scale = LOW_RANK[case]
    found = survey_names(checkpoint(tensors, metadata=metadata))
    (row,) = found.items
    assert isinstance(row, Region)
    names = list(tensors)
    assert (row.key, row.weights, row.kind) == (names[-1], tuple(names[-2:]), "lora")
    assert (row.in_shape, row.out_shape, row.operators) == ((7,), (5,), 1)
    torch.testing.assert_close(delta(found, row.key), scale * (B.double() @ A.double()), rtol=1e-6, atol=1e-9)
    unknown = scale == 1.0
    assert row.assumed == (("alpha=r",) if unknown else ())


def test_the_product_of_a_low_rank_update_is_never_formed() -> None:
    tensors = {"q.lora_A.weight": torch.randn(2, 40_000), "q.lora_B.weight": torch.randn(30_000, 2)}
    row = regions(survey_names(checkpoint(tensors)))["q.lora_B.weight"]
    assert [node.inputs[1] for node in row.nodes] == ["q.lora_A.weight", "q.lora_B.weight"]


def test_updates_of_convolutions() -> None:
    torch.manual_seed(3)
    down, mid, up = torch.randn(2, 3, 3, 3), torch.randn(2, 2, 3, 3), torch.randn(4, 2, 1, 1)
    one = torch.randn(2, 3, 1, 1)
    tensors = {
        "a.lora_down.weight": down, "a.lora_up.weight": up, "a.alpha": torch.tensor(1.0),
        "b.lora_down.weight": one, "b.lora_mid.weight": mid, "b.lora_up.weight": up.clone(),
        "c.lora_A.weight": one.clone(), "c.lora_B.weight": up.clone(),
    }  # fmt: skip
    found = survey_names(checkpoint(tensors))
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)

    def conv(x: torch.Tensor, *kernels: torch.Tensor) -> torch.Tensor:
        for kernel in kernels:
            x = torch.nn.functional.conv2d(x, kernel.double())
        return x

    expected = {"a": conv(x, down, up) / 2, "b": conv(x, one, mid, up), "c": conv(x, one, up)}
    keys = {"a": "a.lora_up.weight", "b": "b.lora_up.weight", "c": "c.lora_B.weight"}
    for letter, key in keys.items():
        row = regions(found)[key]
        assert row.assumed[:2] == ("infinite grid, stride 1, zero padding", "groups=1")
        torch.testing.assert_close(conv(x, delta(found, key)), expected[letter], rtol=1e-5, atol=1e-5)
    assert regions(found)["b.lora_up.weight"].weights == tuple(
        f"b.lora_{role}.weight" for role in ("down", "mid", "up")
    )


def test_dora_says_what_it_leaves_out() -> None:
    tensors = {
        "q.lora_A.weight": A, "q.lora_B.weight": B, "q.lora_magnitude_vector": torch.ones(5),
        "k.lora_down.weight": A.clone(), "k.lora_up.weight": B.clone(), "k.dora_scale": torch.ones(5, 1),
    }  # fmt: skip
    found = survey_names(checkpoint(tensors))
    assert set(regions(found)) == {"q.lora_B.weight", "k.lora_up.weight"}
    for row in regions(found).values():
        assert "DoRA magnitude not applied" in row.assumed
    assert any(note.startswith("k.dora_scale") for note in found.notes)


def test_hadamard_and_kronecker_updates() -> None:
    torch.manual_seed(4)
    r = torch.randn
    hada = {"h.hada_w1_a": r(6, 2), "h.hada_w1_b": r(2, 4), "h.hada_w2_a": r(6, 2), "h.hada_w2_b": r(2, 4)}
    hada["h.alpha"] = torch.tensor(4.0)
    tucker = {"t.hada_t1": r(2, 2, 3, 3), "t.hada_w1_a": r(2, 6), "t.hada_w1_b": r(2, 4)}
    tucker |= {"t.hada_t2": r(2, 2, 3, 3), "t.hada_w2_a": r(2, 6), "t.hada_w2_b": r(2, 4)}
    whole = {"k.lokr_w1": r(2, 3), "k.lokr_w2": r(3, 4), "k.alpha": torch.tensor(9.0)}
    thin = {
        "l.lokr_w1": r(2, 3),
        "l.lokr_w2_a": r(3, 2),
        "l.lokr_w2_b": r(2, 4),
        "l.alpha": torch.tensor(1.0),
    }
    both = {
        "m.lokr_w1_a": r(2, 2),
        "m.lokr_w1_b": r(2, 3),
        "m.lokr_w2": r(3, 4, 3, 3),
        "m.alpha": torch.tensor(1.0),
    }
    core = {"n.lokr_w1": r(2, 3), "n.lokr_t2": r(2, 2, 3, 3), "n.lokr_w2_a": r(2, 3), "n.lokr_w2_b": r(2, 4)}
    found = survey_names(checkpoint({**hada, **tucker, **whole, **thin, **both, **core}))
    assert all(row.kind == "lora" for row in regions(found).values())
    d = {name: value.double() for name, value in {**hada, **tucker, **whole, **thin, **both, **core}.items()}

    def rebuilt(t: str, a: str, b: str) -> torch.Tensor:
        return torch.einsum("ijkl,ip,jr->prkl", d[t], d[a], d[b])

    def kron(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        grown = torch.einsum("ab,cd...->acbd...", first, second)
        a, c, b, e, *k = grown.shape
        return grown.reshape(a * c, b * e, *k)

    expected = {
        "h.hada_w1_a": 2 * (d["h.hada_w1_a"] @ d["h.hada_w1_b"]) * (d["h.hada_w2_a"] @ d["h.hada_w2_b"]),
        "t.hada_w1_a": rebuilt("t.hada_t1", "t.hada_w1_a", "t.hada_w1_b") * rebuilt("t.hada_t2", "t.hada_w2_a", "t.hada_w2_b"),
        "k.lokr_w1": kron(d["k.lokr_w1"], d["k.lokr_w2"]),
        "l.lokr_w1": kron(d["l.lokr_w1"], d["l.lokr_w2_a"] @ d["l.lokr_w2_b"]) / 2,
        "m.lokr_w1_a": kron(d["m.lokr_w1_a"] @ d["m.lokr_w1_b"], d["m.lokr_w2"]) / 2,
        "n.lokr_w1": kron(d["n.lokr_w1"], rebuilt("n.lokr_t2", "n.lokr_w2_a", "n.lokr_w2_b")),
    }  # fmt: skip
    assert set(regions(found)) == set(expected)
    for key, truth in expected.items():
        torch.testing.assert_close(delta(found, key).double(), truth, rtol=1e-6, atol=1e-6)


def test_factors_that_do_not_fit_are_skipped() -> None:
    tensors = {"q.lora_A.weight": torch.ones(3, 7), "q.lora_B.weight": torch.ones(5, 2)}
    tensors |= {"h.hada_w1_a": torch.ones(6, 2), "h.hada_w1_b": torch.ones(3, 4)}
    tensors |= {"h.hada_w2_a": torch.ones(6, 2), "h.hada_w2_b": torch.ones(2, 4)}
    found = skips(survey_names(checkpoint(tensors)))
    assert set(found) == {"q.lora_B.weight", "h.hada_w1_a"}
    assert all("do not fit each other" in item.reason for item in found.values())


def test_half_an_adapter_goes_by_its_shape() -> None:
    row = regions(survey_names(checkpoint({"q.lora_A.weight": A})))["q.lora_A.weight"]
    assert row.kind == "linear"


def test_a_scaled_factor_can_be_written_back() -> None:
    tensors, metadata, scale = LOW_RANK["peft"]
    found = survey_names(checkpoint(tensors, metadata=metadata))
    assert isinstance(found.load, Weights)
    (row,) = regions(found).values()
    name = row.nodes[1].inputs[1]
    edits = found.load.edits({name: found.load(name) / 2})
    torch.testing.assert_close(edits[row.key].float(), B / 2)
    assert scale == 4.0


# --- quantised weights ------------------------------------------------------------------------------------


def packed_words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack columns into 32-bit words, first column in the lowest bits unless ``order`` says which column is where."""
    per = 32 // bits
    order = order or tuple(range(per))
    words = np.zeros((values.shape[0], values.shape[1] // per), dtype=np.uint32)
    for word in range(words.shape[1]):
        for slot in range(per):
            words[:, word] |= values[:, word * per + order[slot]].astype(np.uint32) << np.uint32(bits * slot)
    return torch.from_numpy(words.view(np.int32).copy())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq(bits: int, version: str | None, act_order: bool) -> None:
    rng = np.random.default_rng(bits)
    inputs, outputs, groups = 64, 32, 4
    q = rng.integers(0, 2**bits, (inputs, outputs))
    zero = rng.integers(0 if version == "gptq_v2" else 1, 2**bits, (groups, outputs))
    scale = rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16)
    group = (
        rng.permutation(np.repeat(np.arange(groups), inputs // groups))
        if act_order
        else np.repeat(np.arange(groups), 16)
    )
    truth = ((q - zero[group]) * scale.astype(np.float64)[group]).T
    stored_zero = zero if version == "gptq_v2" else zero - 1
    tensors = {
        "m.q.qweight": packed_words(q.T, bits).T.contiguous(),
        "m.q.qzeros": packed_words(stored_zero, bits),
        "m.q.scales": torch.from_numpy(scale),
        "m.q.bias": torch.zeros(outputs),
    }
    if act_order:
        tensors["m.q.g_idx"] = torch.from_numpy(group.astype(np.int32))
    config = (
        {"config": {"quantization_config": {"quant_method": "gptq", "checkpoint_format": version}}}
        if version
        else {}
    )
    found = survey_names(checkpoint(tensors, metadata=config))
    (row,) = found.items
    assert isinstance(row, Region)
    assert (row.key, row.in_shape, row.out_shape) == ("m.q.weight", (inputs,), (outputs,))
    assert row.assumed == (() if version else ("GPTQ version 1 zero points",))
    np.testing.assert_allclose(found.load(row.key).numpy(), truth, rtol=1e-7)
    assert isinstance(found.load, Weights)
    with pytest.raises(OperatorError, match="m.q.weight cannot be written back: GPTQ"):
        found.load.edits({row.key: found.load(row.key)})


def test_gptq_zero_points_of_version_1_wrap_around() -> None:
    # A zero point of 0 is stored as -1, all ones.
    tensors = {
        "qweight": packed_words(np.full((8, 8), 5), 4).T.contiguous(),
        "qzeros": torch.full((1, 1), -1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    assert torch.equal(survey_names(checkpoint(tensors)).load("weight"), torch.full((8, 8), 5.0))


def test_awq() -> None:
    rng = np.random.default_rng(0)
    inputs, outputs, groups = 48, 32, 3
    q = rng.integers(0, 16, (inputs, outputs))
    zero = rng.integers(0, 16, (groups, outputs))
    scale = rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16)
    truth = ((q - zero.repeat(16, axis=0)) * scale.astype(np.float64).repeat(16, axis=0)).T
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "q.qweight": packed_words(q, 4, order),
        "q.qzeros": packed_words(zero, 4, order),
        "q.scales": torch.from_numpy(scale),
    }
    found = survey_names(checkpoint(tensors))
    np.testing.assert_allclose(found.load("q.weight").numpy(), truth, rtol=1e-7)
    assert regions(found)["q.weight"].note == "AWQ, 4 bits"


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors(bits: int) -> None:
    rng = np.random.default_rng(bits)
    q = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 32))
    scale = rng.uniform(0.01, 0.1, (6, 4)).astype(np.float32)
    tensors = {
        "q.weight_packed": packed_words(q + 2 ** (bits - 1), bits),
        "q.weight_scale": torch.from_numpy(scale),
        "q.weight_shape": torch.tensor([6, 32]),
    }
    found = survey_names(checkpoint(tensors))
    np.testing.assert_allclose(found.load("q.weight").numpy(), q * scale.repeat(8, axis=1), rtol=1e-6)


def test_bitsandbytes_int8() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 9)
    absmax = weight.abs().amax(dim=1)
    q = torch.round(weight / absmax[:, None] * 127).to(torch.int8)
    tensors = {"q.weight": q, "q.SCB": absmax, "q.weight_format": torch.tensor(0, dtype=torch.uint8)}
    found = survey_names(checkpoint(tensors))
    torch.testing.assert_close(found.load("q.weight"), q.float() * absmax[:, None] / 127)
    assert (found.load("q.weight") - weight).abs().max() <= absmax.max() / 254 * 1.0001
    tensors["q.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    assert "tiled GPU layout" in skips(survey_names(checkpoint(tensors)))["q.weight"].reason


NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(8, 32), (5, 27)])
def test_bitsandbytes_4bit(nested: bool, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    block, count = 64, int(np.prod(shape))
    codes = rng.integers(0, 16, count)
    blocks = -(-count // block)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": list(shape),
    }
    if nested:
        map8 = np.linspace(-1, 1, 256).astype(np.float32)
        inner = rng.integers(0, 256, blocks).astype(np.uint8)
        absmax = map8[inner].astype(np.float64) * 0.25 + 0.5
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
        extra = {
            "q.weight.absmax": torch.from_numpy(inner),
            "q.weight.nested_absmax": torch.tensor([0.25]),
            "q.weight.nested_quant_map": torch.from_numpy(map8),
        }
    else:
        absmax = rng.uniform(0.1, 1, blocks).astype(np.float32).astype(np.float64)
        extra = {"q.weight.absmax": torch.from_numpy(absmax.astype(np.float32))}
    padded = np.append(codes, [0] * (count % 2)).astype(np.uint8)
    tensors = {
        # Two numbers to a byte, the first of them in the high half.
        "q.weight": torch.from_numpy((padded[0::2] << 4) | padded[1::2])[:, None],
        **extra,
        "q.weight.quant_map": torch.tensor(NF4),
        "q.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    truth = (np.array(NF4, dtype=np.float32)[codes] * absmax.repeat(block)[:count]).reshape(shape)
    found = survey_names(checkpoint(tensors))
    (row,) = found.items
    assert isinstance(row, Region)
    assert (row.key, row.out_shape, row.in_shape) == ("q.weight", shape[:1], shape[1:])
    np.testing.assert_allclose(found.load("q.weight").numpy(), truth, rtol=1e-6)


def test_bitsandbytes_4bit_with_a_state_that_lies_is_skipped() -> None:
    for text in (
        "{}",
        "no json",
        json.dumps({"shape": [10**9, 10**9], "blocksize": 64}),
        json.dumps({"shape": "x"}),
    ):
        tensors = {
            "q.weight": torch.zeros(32, 1, dtype=torch.uint8),
            "q.weight.absmax": torch.ones(1),
            "q.weight.quant_map": torch.tensor(NF4),
            "q.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text.encode()), dtype=torch.uint8),
        }
        (item,) = survey_names(checkpoint(tensors)).items
        assert "4-bit without its state" in getattr(item, "reason", "")


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale_weight"])
@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((200, 300), (2, 3)),
        ((64, 96), (4, 3)),
        ((5, 7), ()),
        ((5, 7), (1,)),
        ((5, 7), (5, 1)),
        ((5, 7), (5,)),
        ((3, 4, 5), (3, 4, 1)),
    ],
)
def test_scaled_float8(name: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(scales) + 0.5
    edges = [128 if n == -(-s // 128) != s else s // n for s, n in zip(shape, scales, strict=False)]
    places = [np.arange(s) // edge for s, edge in zip(shape, edges, strict=False)]
    spread = scale.numpy().astype(np.float64)[np.ix_(*places)] if scales else np.float64(scale)
    if scales == (5,):
        spread = spread[:, None]
    truth = torch.from_numpy(q.double().numpy() * spread)
    owner = "experts" if len(shape) == 3 else "q"
    found = survey_names(checkpoint({f"{owner}.weight": q, f"{owner}.{name}": scale}))
    torch.testing.assert_close(found.load(f"{owner}.weight").double(), truth, rtol=1e-7, atol=0)


def test_scaled_int8_with_zero_points() -> None:
    q = torch.randint(-128, 128, (4, 6), dtype=torch.int8)
    scale, zero = torch.rand(4, 1), torch.randint(-8, 8, (4, 1), dtype=torch.int8)
    tensors = {
        "q.weight": q,
        "q.weight_scale": scale,
        "q.weight_zero_point": zero,
        "q.input_scale": torch.ones(1),
    }
    found = survey_names(checkpoint(tensors))
    torch.testing.assert_close(found.load("q.weight"), (q.float() - zero.float()) * scale)
    assert len(found.items) == 1


def test_mxfp4_stacks() -> None:
    rng = np.random.default_rng(0)
    experts, rows, groups = 2, 3, 2
    codes = rng.integers(0, 16, (experts, rows, groups, 32))
    exponents = rng.integers(120, 130, (experts, rows, groups))
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    truth = (e2m1[codes] * 2.0 ** (exponents[..., None] - 127)).reshape(experts, rows, groups * 32)
    tensors = {
        # Two numbers to a byte, the first of them in the low half.
        "mlp.experts.down_proj_blocks": torch.from_numpy(
            (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
        ),
        "mlp.experts.down_proj_scales": torch.from_numpy(exponents.astype(np.uint8)),
        "mlp.experts.down_proj_bias": torch.zeros(experts, rows),
    }
    found = survey_names(checkpoint(tensors))
    assert [item.key for item in found.items] == ["mlp.experts.down_proj[0]", "mlp.experts.down_proj[1]"]
    for index, item in enumerate(found.items):
        np.testing.assert_array_equal(found.load(item.key).numpy(), truth[index])
    np.testing.assert_array_equal(found.load("mlp.experts.down_proj").numpy(), truth)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_quantised_torch_tensors(axis: int | None) -> None:
    weight = torch.randn(4, 6)
    size = 1 if axis is None else weight.shape[axis]
    scale, zero = torch.rand(size, dtype=torch.float64) * 0.1 + 0.01, torch.randint(-3, 4, (size,))
    if axis is None:
        live = torch.quantize_per_tensor(weight, float(scale), int(zero), torch.qint8)
        facts: dict[str, Any] = {
            "scheme": "torch.per_tensor_affine",
            "scale": float(scale),
            "zero_point": int(zero),
        }
        source = checkpoint({"weight": live.int_repr()})
    else:
        live = torch.quantize_per_channel(weight, scale, zero, axis, torch.qint8)
        source = checkpoint({"weight": live.int_repr(), "scale": scale, "zero_point": zero})
        facts = {"axis": axis, "scale": source.tensors["scale"], "zero_point": source.tensors["zero_point"]}
    refs = {"weight": replace(source.tensors["weight"], dtype="qint8")}
    source = replace(source, tensors=refs, metadata={"quantization": {"weight": facts}})
    found = survey_names(source)
    torch.testing.assert_close(found.load("weight"), live.dequantize())
    bare = survey_names(replace(source, metadata={}))
    assert "qint8 without a scale" in skips(bare)["weight"].reason


@pytest.mark.parametrize(
    ("tensors", "scheme"),
    [
        ({"q.W_q": torch.zeros(4, 4, dtype=torch.uint8), "q.scale": torch.ones(4, 1)}, "HQQ"),
        ({"q.q_weight": torch.zeros(4, 4, dtype=torch.int32), "q.q_scale": torch.zeros(1, 1)}, "EXL2"),
        (
            {"q.qweight": torch.zeros(4, 4, dtype=torch.int32), "q.scales": torch.ones(3, 5)},
            "an unknown qweight layout",
        ),
        ({"q.weight": torch.zeros(4, 4, dtype=torch.int8)}, "int8 without a scale"),
        (
            {"q.weight": torch.zeros(4, 4, dtype=torch.int8), "q.weight_scale": torch.ones(3, 3)},
            r"scales of shape \(3, 3\)",
        ),
        (
            {"q.weight_packed": torch.zeros(4, 4, dtype=torch.uint8), "q.weight_scale": torch.ones(4, 1)},
            "compressed-tensors",
        ),
    ],
)
def test_schemes_without_a_rule_are_skipped_by_name(tensors: dict[str, torch.Tensor], scheme: str) -> None:
    (item,) = survey_names(checkpoint(tensors)).items
    assert item.operators == 1
    assert re.search(scheme, getattr(item, "reason", ""))


def test_nothing_is_read_before_it_is_asked_for() -> None:
    tensors = {
        "weight_g": torch.ones(2, 1),
        "weight_v": torch.ones(2, 3),
        "q.lora_A.weight": A,
        "q.lora_B.weight": B,
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
