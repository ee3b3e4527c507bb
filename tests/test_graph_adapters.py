"""Adapters: every naming, every scale, against products written out in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from graph_tools import checkpoint, regions, run, skips

from spectool.graph.effective import Weights
from spectool.graph.names import survey_names
from spectool.graph.types import Region, Survey


def delta(found: Survey, key: str) -> torch.Tensor:
    """ΔW of a row, by applying its nodes to unit vectors (kernels: the constant that the node reads)."""
    row = regions(found)[key]
    if row.in_shape is None:
        return found.load(row.nodes[0].inputs[1])
    return run(row, found.load, torch.eye(row.in_shape[0])).T


A, B = torch.randn(3, 7, dtype=torch.float64).float(), torch.randn(5, 3, dtype=torch.float64).float()
PEFT = {"peft_type": "LORA", "r": 3, "lora_alpha": 12}
PATTERN = {**PEFT, "alpha_pattern": {"q": 6}}
LOW_RANK: dict[str, tuple[dict[str, torch.Tensor], Mapping[str, Any], float]] = {
    "peft": ({"base_model.q.lora_A.weight": A, "base_model.q.lora_B.weight": B}, {"adapter_config": PEFT}, 4.0),
    "peft, named": ({"q.lora_A.default.weight": A, "q.lora_B.default.weight": B}, {"adapter_config": PEFT}, 4.0),
    "peft, json": ({"q.lora_A.weight": A, "q.lora_B.weight": B}, {"adapter_config": json.dumps(PEFT)}, 4.0),
    "rslora": (
        {"q.lora_A.weight": A, "q.lora_B.weight": B}, {"adapter_config": {**PEFT, "use_rslora": True}}, 12 / 3**0.5
    ),
    "pattern": ({"m.q.lora_A.weight": A, "m.q.lora_B.weight": B}, {"adapter_config": PATTERN}, 2.0),
    "other pattern": ({"m.xq.lora_A.weight": A, "m.xq.lora_B.weight": B}, {"adapter_config": PATTERN}, 4.0),
    "loralib": ({"q.lora_A": A, "q.lora_B": B}, {}, 1.0),
    "kohya": (
        {"lora_q.alpha": torch.tensor(6.0), "lora_q.lora_down.weight": A, "lora_q.lora_up.weight": B}, {}, 2.0
    ),
    "kohya, metadata": (
        {"lora_q.lora_down.weight": A, "lora_q.lora_up.weight": B}, {"ss_network_alpha": "1.5"}, 0.5
    ),
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
    torch.testing.assert_close(
        delta(found, row.key), scale * (B.double() @ A.double()), rtol=1e-12, atol=1e-14
    )
    unknown = scale == 1.0
    assert row.assumed == (("alpha=r",) if unknown else ())


def test_patterns_from_a_file_cannot_take_for_ever() -> None:
    name = "m." + "a" * 60
    hostile = {"peft_type": "LORA", "lora_alpha": 3, "alpha_pattern": {"(a+)+b": 1, "a" * 300: 1, "((": 2}}
    tensors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    (row,) = regions(survey_names(checkpoint(tensors, metadata={"adapter_config": hostile}))).values()
    assert row.assumed == ("alpha_pattern not applied",)


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
        torch.testing.assert_close(conv(x, delta(found, key)), expected[letter], rtol=1e-12, atol=1e-12)
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
        "t.hada_w1_a": rebuilt("t.hada_t1", "t.hada_w1_a", "t.hada_w1_b")
        * rebuilt("t.hada_t2", "t.hada_w2_a", "t.hada_w2_b"),
        "k.lokr_w1": kron(d["k.lokr_w1"], d["k.lokr_w2"]),
        "l.lokr_w1": kron(d["l.lokr_w1"], d["l.lokr_w2_a"] @ d["l.lokr_w2_b"]) / 2,
        "m.lokr_w1_a": kron(d["m.lokr_w1_a"] @ d["m.lokr_w1_b"], d["m.lokr_w2"]) / 2,
        "n.lokr_w1": kron(d["n.lokr_w1"], rebuilt("n.lokr_t2", "n.lokr_w2_a", "n.lokr_w2_b")),
    }  # fmt: skip
    assert set(regions(found)) == set(expected)
    for key, truth in expected.items():
        torch.testing.assert_close(delta(found, key).double(), truth, rtol=1e-12, atol=1e-12)


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
