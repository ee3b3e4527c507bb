"""Quantised weights against packings written here from the published formats."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from graph_tools import checkpoint, regions, skips

from spectool.errors import OperatorError
from spectool.graph.effective import Weights
from spectool.graph.names import survey_names
from spectool.graph.types import Region


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
    np.testing.assert_array_equal(found.load(row.key).double().numpy(), truth)
    assert isinstance(found.load, Weights)
    with pytest.raises(OperatorError, match=r"m\.q\.weight cannot be written back: GPTQ"):
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
    np.testing.assert_array_equal(found.load("q.weight").double().numpy(), truth)
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
    np.testing.assert_array_equal(
        found.load("q.weight").numpy(), q * scale.astype(np.float64).repeat(8, axis=1)
    )


def test_bitsandbytes_int8() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 9)
    absmax = weight.abs().amax(dim=1)
    q = torch.round(weight / absmax[:, None] * 127).to(torch.int8)
    tensors = {"q.weight": q, "q.SCB": absmax, "q.weight_format": torch.tensor(0, dtype=torch.uint8)}
    found = survey_names(checkpoint(tensors))
    truth = q.double() * absmax.double()[:, None] / 127
    torch.testing.assert_close(found.load("q.weight"), truth, rtol=1e-15, atol=0)
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
    truth = (
        np.array(NF4, dtype=np.float32).astype(np.float64)[codes] * absmax.repeat(block)[:count]
    ).reshape(shape)
    found = survey_names(checkpoint(tensors))
    (row,) = found.items
    assert isinstance(row, Region)
    assert (row.key, row.out_shape, row.in_shape) == ("q.weight", shape[:1], shape[1:])
    np.testing.assert_allclose(found.load("q.weight").numpy(), truth, rtol=1e-15)


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
    if len(scales) == 1:
        spread = spread[:, None] if scales == (5,) else spread[0]
    truth = torch.from_numpy(q.double().numpy() * spread)
    owner = "experts" if len(shape) == 3 else "q"
    found = survey_names(checkpoint({f"{owner}.weight": q, f"{owner}.{name}": scale}))
    torch.testing.assert_close(found.load(f"{owner}.weight").double(), truth, rtol=0, atol=0)


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
    assert torch.equal(found.load("q.weight"), (q.double() - zero.double()) * scale.double())
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
    torch.testing.assert_close(found.load("weight").float(), live.dequantize())
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
