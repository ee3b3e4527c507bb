"""The ONNX front-end on models made by hand: control flow, functions, quantised and recurrent layers, skips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import (
    FLOAT,
    INT64,
    Array,
    dense,
    graph,
    jacobian,
    jacobian_of,
    keys,
    model,
    node,
    region,
    run,
    skips,
    spectrum,
    summary,
    survey_of,
    weights,
)

from spectool.errors import GraphError
from spectool.graph.types import Region

BOOL, INT8, UINT8 = TensorProto.BOOL, TensorProto.INT8, TensorProto.UINT8


def branch(weight: Array, activation: str = "Relu") -> onnx.GraphProto:
    """A body that reads the outer value h and has a weight of its own called w."""
    return graph([node("MatMul", "h w", "g"), node(activation, "g", "out")], {}, "out", {"w": weight})


def conditional(condition: list[onnx.NodeProto], tensors: dict[str, Array]) -> onnx.ModelProto:
    nodes = [
        node("MatMul", "x first", "h"),
        *condition,
        helper.make_node(
            "If",
            ["c"],
            ["y"],
            name="choice",
            then_branch=branch(weights(4, 3)),
            else_branch=branch(weights(4, 2)),
        ),
    ]
    inputs = {"x": (1, 4), "flag": ()}
    return model(graph(nodes, inputs, "y", {"first": weights(4, 4), **tensors}, {"flag": BOOL}))


# --- control flow -----------------------------------------------------------------------------------------


def test_both_branches_of_an_open_condition_are_followed(tmp_path: Path) -> None:
    """The branches hold weights of one name; each continues the region of the outer value that it captures."""
    survey = survey_of(conditional([node("Identity", "flag", "c")], {}), tmp_path)
    assert summary(survey) == [
        ("first", "linear", False),
        ("choice.then.w", "linear", False),
        ("first + choice.then.w", "linear+linear", True),
        ("choice.else.w", "linear", False),
        ("first + choice.else.w", "linear+linear", True),
    ]
    item = region(survey, "first + choice.else.w")
    np.testing.assert_allclose(dense(item, survey), (weights(4, 4) @ weights(4, 2)).T, rtol=1e-5)


def test_a_constant_condition_leaves_one_branch(tmp_path: Path) -> None:
    condition = [node("Shape", "x", "s"), node("Size", "s", "n"), node("Equal", "n two", "c")]
    survey = survey_of(conditional(condition, {"two": np.array(2)}), tmp_path)
    assert keys(survey) == ["first", "choice.then.w", "first + choice.then.w"]
    assert survey.notes == ("choice: its condition is constant, so one branch is left out",)


def test_what_flows_through_a_taken_branch_is_one_region(tmp_path: Path) -> None:
    inner = graph([node("MatMul", "h w", "out")], {}, "out", {"w": weights(4, 3)})
    other = graph([node("Relu", "h", "out")], {}, "out")
    nodes = [
        node("MatMul", "x first", "h"),
        helper.make_node("If", ["yes"], ["g"], name="choice", then_branch=inner, else_branch=other),
        node("MatMul", "g last", "y"),
    ]
    tensors = {"first": weights(4, 4), "last": weights(3, 2), "yes": np.array(True)}
    survey = survey_of(model(graph(nodes, {"x": (1, 4)}, "y", tensors)), tmp_path)
    assert keys(survey)[-1] == "first + w + last"
    assert survey.notes == ()


def test_the_body_of_a_loop_is_followed_once(tmp_path: Path) -> None:
    body = helper.make_graph(
        [node("MatMul", "state w", "g"), node("Tanh", "g", "next"), node("Identity", "going", "still")],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("going", BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, [1, 4]),
        ],
        [
            helper.make_tensor_value_info("still", BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, [1, 4]),
        ],
        [onnx.numpy_helper.from_array(weights(4, 4), "w")],
    )
    nodes = [
        node("MatMul", "x first", "h"),
        helper.make_node("Loop", ["count", "", "h"], ["y"], name="loop", body=body),
    ]
    tensors = {"first": weights(4, 4), "count": np.array(3)}
    survey = survey_of(model(graph(nodes, {"x": (1, 4)}, "y", tensors)), tmp_path)
    assert summary(survey) == [("first", "linear", True), ("w", "linear", True)]


def test_an_if_without_branches_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="If 'broken' has no two branches"):
        survey_of(
            model(
                graph(
                    [helper.make_node("If", ["c"], ["y"], name="broken")],
                    {"c": ()},
                    "y",
                    {"w": weights(2, 2)},
                    {"c": BOOL},
                )
            ),
            tmp_path,
        )


def test_functions_of_the_model_are_inlined(tmp_path: Path) -> None:
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function(
        "mine", "Dense", ["a", "b"], ["c"], [node("MatMul", "a b", "m"), node("Relu", "m", "c")], imports
    )
    nodes = [node("Dense", "x w", "h", domain="mine"), node("Dense", "h v", "y", domain="mine")]
    body = graph(nodes, {"x": (1, 4)}, "y", {"w": weights(4, 5), "v": weights(5, 3)})
    survey = survey_of(model(body, functions=[function], domains=["mine"]), tmp_path)
    assert summary(survey) == [("w", "linear", True), ("v", "linear", True)]
    assert survey.notes == ("inlined 1 functions of the model",)


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


# --- whole regions ----------------------------------------------------------------------------------------


def fused_attention() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A projection to query, key and value, split per head; the query is scaled."""
    tensors = {
        "W": weights(8, 24),
        "bias": weights(24),
        "heads": np.array([1, 5, 3, 2, 4]),
        "half": np.array(0.5, np.float32),
        **{f"i{index}": np.array(index) for index in range(3)},
    }
    nodes = [
        node("MatMul", "x W", "m"),
        node("Add", "bias m", "b"),
        node("Reshape", "b heads", "r"),
        node("Transpose", "r", "t", perm=[2, 0, 3, 1, 4]),
        node("Gather", "t i0", "q0", axis=0),
        node("Mul", "q0 half", "q"),
        node("Gather", "t i1", "k0", axis=0),
        node("Transpose", "k0", "k", perm=[0, 1, 3, 2]),
        node("Gather", "t i2", "v", axis=0),
        node("MatMul", "q k", "scores"),
        node("Softmax", "scores", "p"),
        node("MatMul", "p v", "y"),
    ]
    return model(graph(nodes, {"x": (1, 5, 8)}, "y", tensors)), tensors


def test_a_fused_projection_gives_three_parts(tmp_path: Path) -> None:
    proto, tensors = fused_attention()
    survey = survey_of(proto, tmp_path)
    assert summary(survey) == [
        ("W", "linear", False),
        ("W[:,0:8]", "linear+scale", True),
        ("W[:,8:16]", "linear", True),
        ("W[:,16:24]", "linear", True),
    ]
    for key, value, factor, columns in (
        ("W[:,0:8]", "q", 0.5, slice(0, 8)),
        ("W[:,8:16]", "k", 1.0, slice(8, 16)),
        ("W[:,16:24]", "v", 1.0, slice(16, 24)),
    ):
        matrix = dense(region(survey, key), survey)
        np.testing.assert_allclose(matrix, factor * tensors["W"][:, columns].T, rtol=1e-6)
        # Over five positions ONNX Runtime sees five copies of each value.
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        copy.graph.output.append(helper.make_tensor_value_info(value, FLOAT, None))
        whole = jacobian(lambda x, m=copy, v=value: run(m, {"x": x}, [v])[0], (1, 5, 8))
        np.testing.assert_allclose(spectrum(whole)[::5], spectrum(matrix), rtol=1e-5)


COMPOSITIONS: list[tuple[str, list[onnx.NodeProto], dict[str, Array], tuple[int, ...]]] = [
    (
        "conv2d+avgpool+linear",
        [
            node("Conv", "x k", "h", pads=[1, 1, 1, 1]),
            node("AveragePool", "h", "p", kernel_shape=[2, 2], strides=[2, 2]),
            node("Flatten", "p", "f"),
            node("Gemm", "f w", "y"),
        ],
        {"k": weights(2, 1, 3, 3), "w": weights(8, 3)},
        (1, 1, 4, 4),
    ),
    (
        "upsample+conv2d",
        [node("Resize", "x - s", "u", mode="linear"), node("Conv", "u k", "y")],
        {"k": weights(2, 1, 3, 3), "s": np.array([1, 1, 2, 2], np.float32)},
        (1, 1, 4, 3),
    ),
    (
        "conv2d+conv2d",
        [
            node("Conv", "x k", "a", pads=[1, 1, 1, 1]),
            node("Conv", "x q", "b", pads=[1, 1, 1, 1]),
            node("Sub", "a b", "s"),
            node("Add", "s x", "y"),
        ],
        {"k": weights(1, 1, 3, 3), "q": weights(1, 1, 3, 3, seed=1)},
        (1, 1, 4, 4),
    ),
    (
        "conv1d+scale",
        [node("Conv", "x k", "h"), node("Mul", "h g", "m"), node("Div", "m d", "y")],
        {"k": weights(3, 2, 3), "g": weights(3, 1), "d": np.array(-4, np.float32)},
        (1, 2, 6),
    ),
    (
        "conv_transpose1d+batchnorm",
        [node("ConvTranspose", "x k b", "h", strides=[2]), node("BatchNormalization", "h g b b v", "y")],
        {
            "k": weights(3, 2, 3),
            "g": weights(2),
            "b": weights(2, seed=1),
            "v": np.array([0.5, 2], np.float32),
        },
        (1, 3, 4),
    ),
    (
        "conv2d",
        [
            node("Conv", "x k", "h"),
            node("DepthToSpace", "h", "d", blocksize=2),
            node("Split", "d", "a b", axis=2),
            node("Concat", "b a b", "y", axis=3),
        ],
        {"k": weights(4, 1, 3, 3)},
        (1, 1, 4, 4),
    ),
    (
        "linear",
        [node("MatMul", "x w", "h"), node("Where", "mask h zero", "m"), node("CumSum", "m axis", "y")],
        {"w": weights(4, 4), "mask": np.eye(4) > 0, "zero": np.array(0, np.float32), "axis": np.array(1)},
        (1, 4, 4),
    ),
]


@pytest.mark.parametrize(
    ("kind", "nodes", "tensors", "shape"), COMPOSITIONS, ids=lambda value: str(value)[:30]
)
def test_the_maximal_region_is_the_whole_model(
    kind: str, nodes: list[Any], tensors: dict[str, Array], shape: tuple[int, ...], tmp_path: Path
) -> None:
    proto = model(graph(nodes, {"x": shape}, "y", tensors))
    survey = survey_of(proto, tmp_path)
    (item,) = [item for item in survey.items if isinstance(item, Region) and item.maximal]
    assert item.kind.startswith(kind)
    np.testing.assert_allclose(dense(item, survey), jacobian_of(proto), atol=3e-5)
