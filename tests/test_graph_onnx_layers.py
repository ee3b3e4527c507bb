"""The ONNX front-end on models made by hand: quantised and recurrent layers, and what has no spectrum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx_models import (
    FLOAT,
    INT64,
    Array,
    dense,
    graph,
    jacobian_of,
    keys,
    model,
    node,
    region,
    skips,
    summary,
    survey_of,
    weights,
)

from spectool.graph.types import Region

BOOL, INT8, UINT8 = TensorProto.BOOL, TensorProto.INT8, TensorProto.UINT8


# --- quantised --------------------------------------------------------------------------------------------


def quantised(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).integers(-90, 90, shape).astype(np.int8)


def test_dequantised_weights_are_the_effective_ones(tmp_path: Path) -> None:
    tensors = {
        "w": quantised(3, 2, 3),
        "s": np.array([0.1, 0.2, 0.3], np.float32),
        "z": np.array([1, 2, 3], np.int8),
        "v": quantised(8, 6),
        "block": np.arange(1, 13, dtype=np.float32).reshape(2, 6) / 50,
    }
    nodes = [
        node("DequantizeLinear", "w s z", "wd", axis=0),
        node("Conv", "x wd", "h"),
        node("Relu", "h", "r"),
        node("Flatten", "r", "f"),
        node("DequantizeLinear", "v block", "vd", axis=0, block_size=4),
        node("MatMul", "f vd", "y"),
    ]
    tensors["v"] = quantised(12, 6)
    tensors["block"] = np.arange(1, 19, dtype=np.float32).reshape(3, 6) / 50
    proto = model(graph(nodes, {"x": (1, 2, 6)}, "y", tensors), opset=21)
    survey = survey_of(proto, tmp_path)
    assert summary(survey) == [("w", "conv1d", True), ("v", "linear", True)]
    expected = (tensors["w"].astype(np.float64) - [[[1]], [[2]], [[3]]]) * np.array([0.1, 0.2, 0.3])[
        :, None, None
    ]
    item = region(survey, "w")
    np.testing.assert_allclose(survey.load(item.nodes[0].inputs[1]).numpy(), expected, rtol=1e-6)
    assert item.weights == ("w", "s", "z")
    full = tensors["v"] * np.repeat(tensors["block"], 4, axis=0)
    np.testing.assert_allclose(dense(region(survey, "v"), survey), full.T, rtol=1e-6)


def test_quantised_activations_are_boundaries(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "h"),
        node("QuantizeLinear", "h s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("MatMul", "d v", "y"),
    ]
    tensors = {"w": weights(4, 4), "v": weights(4, 4, seed=1), "s": np.float32(0.1), "z": np.int8(0)}
    survey = survey_of(
        model(graph(nodes, {"x": (1, 4)}, "y", {name: np.asarray(value) for name, value in tensors.items()})),
        tmp_path,
    )
    assert summary(survey) == [("w", "linear", True), ("v", "linear", True)]


SCALARS = {
    "xs": np.array(0.05, np.float32),
    "xz": np.array(3, np.uint8),
    "ys": np.array(0.2, np.float32),
    "yz": np.array(0, np.uint8),
}


def test_quantised_convolutions_and_products_stand_for_float_ones(tmp_path: Path) -> None:
    tensors = {
        **SCALARS,
        "w": quantised(4, 2, 3),
        "ws": np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        "wz": np.zeros(4, np.int8),
        "v": quantised(16, 5),
        "vs": np.array(0.01, np.float32),
        "vz": np.array(7, np.int8),
    }
    nodes = [
        node("QuantizeLinear", "x xs xz", "xq"),
        node("QLinearConv", "xq xs xz w ws wz ys yz", "hq", pads=[1, 0], strides=[2]),
        node("Flatten", "hq", "fq"),
        node("QLinearMatMul", "fq ys yz v vs vz ys yz", "yq"),
        node("DequantizeLinear", "yq ys yz", "y"),
    ]
    survey = survey_of(model(graph(nodes, {"x": (1, 2, 8)}, "y", tensors)), tmp_path)
    conv, product = survey.items
    assert isinstance(conv, Region)
    assert isinstance(product, Region)
    assert (conv.key, conv.kind, conv.assumed) == ("w", "conv1d", ("dequantised weights",))
    assert (conv.in_shape, conv.out_shape) == ((2, 8), (4, 4))
    effective = tensors["w"] * tensors["ws"][:, None, None]
    plain = model(
        graph([node("Conv", "x w", "y", pads=[1, 0], strides=[2])], {"x": (1, 2, 8)}, "y", {"w": effective})
    )
    np.testing.assert_allclose(dense(conv, survey), jacobian_of(plain), atol=1e-5)
    assert (product.key, product.kind, product.assumed) == ("v", "linear", ("dequantised weights",))
    np.testing.assert_allclose(dense(product, survey), (0.01 * (tensors["v"].astype(float) - 7)).T, rtol=1e-5)


def test_integer_products_find_their_scale_or_are_skipped(tmp_path: Path) -> None:
    """Dynamic quantisation as it is exported: the integer product, a cast, and the product of both scales."""
    nodes = [
        node("DynamicQuantizeLinear", "x", "xq xs xz"),
        node("MatMulInteger", "xq w xz wz", "hi"),
        node("Cast", "hi", "hf", to=FLOAT),
        node("Mul", "xs ws", "scale"),
        node("Mul", "hf scale", "y"),
        node("MatMulInteger", "xq v xz", "z"),
    ]
    tensors = {
        "w": quantised(4, 3),
        "wz": np.array(2, np.int8),
        "ws": np.array(0.05, np.float32),
        "v": quantised(4, 2),
    }
    survey = survey_of(model(graph(nodes, {"x": (1, 4)}, "y z", tensors, {"z": TensorProto.INT32})), tmp_path)
    assert keys(survey) == ["w", "v"]
    item = region(survey, "w")
    assert item.assumed == ("dequantised weights",)
    np.testing.assert_allclose(dense(item, survey), (0.05 * (tensors["w"].astype(float) - 2)).T, rtol=1e-5)
    skipped = skips(survey)["v"]
    assert (skipped.reason, skipped.operators) == ("the scale of its integer weights is not in the file", 1)


def test_integer_convolutions_find_their_scale(tmp_path: Path) -> None:
    nodes = [
        node("DynamicQuantizeLinear", "x", "xq xs xz"),
        node("ConvInteger", "xq w xz wz", "hi", pads=[1, 1]),
        node("Cast", "hi", "hf", to=FLOAT),
        node("Mul", "xs ws", "scale"),
        node("Mul", "hf scale", "y"),
    ]
    tensors = {"w": quantised(3, 2, 3), "wz": np.array(0, np.int8), "ws": np.array(0.5, np.float32)}
    survey = survey_of(model(graph(nodes, {"x": (1, 2, 5)}, "y", tensors)), tmp_path)
    assert keys(survey) == ["w"]
    item = region(survey, "w")
    plain = model(
        graph(
            [node("Conv", "x w", "y", pads=[1, 1])],
            {"x": (1, 2, 5)},
            "y",
            {"w": tensors["w"] * np.float32(0.5)},
        )
    )
    np.testing.assert_allclose(dense(item, survey), jacobian_of(plain), atol=1e-4)


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("columns", [32, 40])
def test_weights_packed_in_four_bits(columns: int, with_zeros: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(columns)
    blocks = -(-columns // 16)
    tensors = {
        "B": generator.integers(0, 256, (3, blocks, 8)).astype(np.uint8),
        "scales": generator.uniform(0.1, 1, 3 * blocks).astype(np.float32),
    }
    if with_zeros:
        tensors["zeros"] = generator.integers(0, 256, 3 * -(-blocks // 2)).astype(np.uint8)
    product = node(
        "MatMulNBits",
        "x B scales" + " zeros" * with_zeros,
        "h",
        domain="com.microsoft",
        K=columns,
        N=3,
        bits=4,
        block_size=16,
    )
    body = graph(
        [product, node("MatMul", "h v", "y")], {"x": (1, columns)}, "y", {**tensors, "v": weights(3, 3)}
    )
    proto = model(body)
    survey = survey_of(proto, tmp_path)
    assert summary(survey) == [
        ("B", "linear", False),
        ("v", "linear", False),
        ("B + v", "linear+linear", True),
    ]
    assert region(survey, "B").assumed == ("dequantised weights",)
    np.testing.assert_allclose(
        dense(region(survey, "B + v"), survey), jacobian_of(proto), rtol=1e-3, atol=1e-3
    )


# --- recurrent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers_have_a_row_per_gate(op: str, gates: int, directions: int, tmp_path: Path) -> None:
    hidden, width = 3, 5
    tensors = {
        "W": weights(directions, gates * hidden, width),
        "R": weights(directions, gates * hidden, hidden),
    }
    direction = "bidirectional" if directions == 2 else "forward"
    layer = node(op, "x W R", "Y", hidden_size=hidden, direction=direction)
    survey = survey_of(model(graph([layer], {"x": (7, 1, width)}, "Y", tensors)), tmp_path)
    expected = {}
    for name, tensor in tensors.items():
        for d in range(directions):
            for gate in range(gates):
                rows = slice(gate * hidden, (gate + 1) * hidden)
                place = f"{rows.start}:{rows.stop}" if gates > 1 else ":"
                label = f"{d},{place}" if directions == 2 else place
                key = f"{name}[{label}]".replace(",:]", "]") if gates > 1 or directions == 2 else name
                expected[key] = tensor[d, rows]
    if gates == 1 and directions == 2:
        expected = {f"{name}[{d}:{d + 1}]": tensor[d] for name, tensor in tensors.items() for d in range(2)}
    assert keys(survey) == list(expected)
    for key, matrix in expected.items():
        item = region(survey, key)
        assert (item.kind, item.level, item.maximal, item.operators) == (op.lower(), "layer", True, 1)
        np.testing.assert_array_equal(dense(item, survey), matrix.astype(np.float64))


def test_gates_reordered_by_an_exporter_keep_their_stored_names(tmp_path: Path) -> None:
    """PyTorch stores i, f, g, o; ONNX wants i, o, f, c: the exporter slices and concatenates."""
    cuts = {f"c{index}": np.array([3 * index]) for index in range(5)}
    nodes = [
        node("Slice", "w c0 c1", "i"),
        node("Slice", "w c3 c4", "o"),
        node("Slice", "w c1 c3", "fg"),
        node("Concat", "i o fg", "gates", axis=0),
        node("Unsqueeze", "gates zero", "W"),
        node("LSTM", "x W R", "Y", hidden_size=3),
    ]
    tensors = {"w": weights(12, 5), "R": weights(1, 12, 3), "zero": np.array([0]), **cuts}
    survey = survey_of(model(graph(nodes, {"x": (7, 1, 5)}, "Y", tensors)), tmp_path)
    assert keys(survey)[:4] == ["w[0:3]", "w[9:12]", "w[3:6]", "w[6:9]"]
    np.testing.assert_array_equal(dense(region(survey, "w[9:12]"), survey), weights(12, 5)[9:].astype(float))


def test_gates_from_several_tensors_go_by_what_they_were_joined_to(tmp_path: Path) -> None:
    nodes = [node("Concat", "a b", "W", axis=1), node("GRU", "x W R", "Y", hidden_size=2)]
    tensors = {"a": weights(1, 4, 5), "b": weights(1, 2, 5, seed=1), "R": weights(1, 6, 2)}
    survey = survey_of(model(graph(nodes, {"x": (7, 1, 5)}, "Y", tensors)), tmp_path)
    assert keys(survey)[:3] == ["W[0:2]", "W[2:4]", "W[4:6]"]
    assert region(survey, "W[4:6]").weights == ("a", "b")
    np.testing.assert_array_equal(dense(region(survey, "W[4:6]"), survey), tensors["b"][0].astype(float))


# --- what has no spectrum ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (node("LayerNormalization", "x scale", "y"), "layernorm"),
        (node("InstanceNormalization", "x scale shift", "y"), "instancenorm"),
        (node("GroupNormalization", "x scale shift", "y", num_groups=2), "groupnorm"),
        (node("BatchNormalization", "x scale shift shift scale", "y - -", training_mode=1), "batchnorm"),
        (node("SkipLayerNormalization", "x x scale", "y", domain="com.microsoft"), "layernorm"),
        (node("SimplifiedLayerNormalization", "x scale", "y"), "rmsnorm"),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else value,
)
def test_normalisations_by_their_input_explain_themselves(
    layer: onnx.NodeProto, kind: str, tmp_path: Path
) -> None:
    tensors = {"scale": weights(4), "shift": weights(4)}
    survey = survey_of(model(graph([layer], {"x": (1, 4, 4)}, "y", tensors), opset=21), tmp_path)
    item = skips(survey)["scale"]
    assert (item.kind, item.status, item.operators) == (kind, "nonlinear", 0)
    assert "statistic" in item.reason


@pytest.mark.parametrize(
    ("layer", "kind", "reason"),
    [
        (node("Secret", "x w", "y", domain="mine"), "linear", "no rule for the operation mine.Secret"),
        (
            node("DeformConv", "x w o", "y"),
            "linear",
            "no rule for the operation onnx.DeformConv",
        ),
        (
            node("Attention", "x w b", "y", domain="com.microsoft", num_heads=1),
            "linear",
            "its query, key and value weights are packed into one operation",
        ),
        (
            node("GatherElements", "w i", "y"),
            "",
            "",
        ),
        (
            node("Gather", "w i", "y", axis=1),
            "embedding",
            "a look-up in a table of shape 4x4x1x1 is not analysed",
        ),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else None,
)
def test_operations_with_matrices_and_no_rule_are_skipped_with_a_reason(
    layer: onnx.NodeProto, kind: str, reason: str, tmp_path: Path
) -> None:
    inputs = {"x": (1, 4, 4, 4), "o": (1, 2, 4, 4), "i": (1, 1, 1, 1)}
    body = graph([layer], inputs, "y", {"w": weights(4, 4, 1, 1), "b": weights(4)}, {"i": INT64})
    survey = survey_of(model(body, opset=19, domains=["mine"]), tmp_path)
    if not reason:
        assert survey.items == ()
        return
    (item,) = survey.items
    assert item == skips(survey)["w"]
    assert (item.kind, item.reason, item.weights) == (kind, reason, ("w",))
    assert item.operators == 1


def test_activations_with_tables_are_no_operators(tmp_path: Path) -> None:
    nodes = [node("PRelu", "x slope", "h"), node("Max", "h floor", "g"), node("Pow", "g power", "y")]
    tensors = {
        "slope": weights(4, 1, 1),
        "floor": weights(4, 4, 4),
        "power": np.float32(2) * np.ones((4, 1, 1), "f"),
    }
    assert survey_of(model(graph(nodes, {"x": (1, 4, 4, 4)}, "y", tensors)), tmp_path).items == ()


def test_dropout_in_training_is_a_boundary(tmp_path: Path) -> None:
    tensors = {
        "w": weights(4, 4),
        "v": weights(4, 4),
        "ratio": np.array(0.5, np.float32),
        "on": np.array(True),
    }
    for inputs, regions in (("h ratio on", 2), ("h ratio", 3)):
        nodes = [node("MatMul", "x w", "h"), node("Dropout", inputs, "d"), node("MatMul", "d v", "y")]
        survey = survey_of(model(graph(nodes, {"x": (1, 4)}, "y", tensors)), tmp_path)
        assert len(survey.items) == regions


def test_tied_tensors_go_by_the_first_name(tmp_path: Path) -> None:
    """Two initializers that are the same bytes of a data file."""
    matrix = weights(4, 4)
    (tmp_path / "net.data").write_bytes(matrix.tobytes())
    body = graph(
        [node("MatMul", "x a", "h"), node("Tanh", "h", "t"), node("MatMul", "t b", "y")], {"x": (1, 4)}, "y"
    )
    for name in ("a", "b"):
        tensor = TensorProto(name=name, data_type=FLOAT, dims=(4, 4), data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "net.data"), ("offset", "0"), ("length", str(matrix.nbytes))):
            tensor.external_data.add(key=key, value=value)
        body.initializer.append(tensor)
    survey = survey_of(model(body), tmp_path)
    assert summary(survey) == [("a", "linear", True), ("a#2", "linear", True)]
    assert {item.note for item in survey.items if isinstance(item, Region)} == {"tied with b"}
    np.testing.assert_array_equal(dense(region(survey, "a#2"), survey), matrix.T.astype(float))
