"""The ONNX front-end on models made by hand: control flow, functions, whole regions."""

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


# --- malformed models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (node("Gather", "x", "y"), ""),
        (node("Constant", "", "y", value=3.5), r"Constant '' is malformed \(\w+: .+\)"),
        (node("LSTM", "x", "y"), ""),
        (node("MatMul", "x", "y"), ""),
        (node("Transpose", "x", "y", perm="no"), ""),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else None,
)
def test_malformed_nodes_are_errors_or_boundaries(bad: onnx.NodeProto, message: str, tmp_path: Path) -> None:
    nodes = [bad, node("MatMul", "x w", "z")]
    proto = model(graph(nodes, {"x": (1, 4)}, "z", {"w": weights(4, 4)}))
    if message:
        with pytest.raises(GraphError, match=message):
            survey_of(proto, tmp_path)
    else:
        assert keys(survey_of(proto, tmp_path)) == ["w"]


@pytest.mark.parametrize("attributes", [{"strides": [0]}, {"dilations": [-1]}, {"group": 0}, {"group": 2}])
def test_convolutions_that_make_no_sense_are_skipped(attributes: dict[str, Any], tmp_path: Path) -> None:
    proto = model(
        graph([node("Conv", "x w", "y", **attributes)], {"x": (1, 2, 8)}, "y", {"w": weights(3, 2, 3)})
    )
    assert skips(survey_of(proto, tmp_path))["w"].reason == "its strides, dilations or groups make no sense"


def test_sizes_below_zero_are_unknown(tmp_path: Path) -> None:
    """Pads that crop more than there is: onnx's own inference would abort the process at the slice."""
    nodes = [node("Conv", "x w", "h", pads=[-9, -9]), node("Slice", "h s e a", "y")]
    tensors = {"w": weights(3, 2, 3), "s": np.array([0]), "e": np.array([3]), "a": np.array([2])}
    survey = survey_of(model(graph(nodes, {"x": (1, 2, 8)}, "y", tensors)), tmp_path)
    assert region(survey, "w", "layer").assumed == ("infinite grid",)


# --- whole regions ----------------------------------------------------------------------------------------


def fused_attention() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A gain and a projection to query, key and value, split per head; the query is scaled."""
    tensors = {
        "W": weights(8, 24),
        "gain": weights(8),
        "bias": weights(24),
        "heads": np.array([1, 5, 3, 2, 4]),
        "half": np.array(0.5, np.float32),
        **{f"i{index}": np.array(index) for index in range(3)},
    }
    nodes = [
        node("Mul", "x gain", "g"),
        node("MatMul", "g W", "m"),
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
        ("gain + W[:,0:8]", "scale+linear+scale", True),
        ("gain + W[:,8:16]", "scale+linear", True),
        ("gain + W[:,16:24]", "scale+linear", True),
    ]
    for key, value, factor, columns in (
        ("gain + W[:,0:8]", "q", 0.5, slice(0, 8)),
        ("gain + W[:,8:16]", "k", 1.0, slice(8, 16)),
        ("gain + W[:,16:24]", "v", 1.0, slice(16, 24)),
    ):
        matrix = dense(region(survey, key), survey)
        np.testing.assert_allclose(matrix, factor * tensors["W"][:, columns].T * tensors["gain"], rtol=1e-6)
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


def test_regions_whose_names_repeat_too_much_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value is an output, so the n-th region repeats the names of n operators."""
    names = [f"{index}{'w' * 100}" for index in range(20)]
    nodes = [node("MatMul", f"{f'v{i}' if i else 'x'} {name}", f"v{i + 1}") for i, name in enumerate(names)]
    outputs = " ".join(f"v{i + 1}" for i in range(20))
    made = model(graph(nodes, {"x": (1, 4)}, outputs, {name: weights(4, 4) for name in names}))
    assert len(summary(survey_of(made, tmp_path))) == 39
    monkeypatch.setattr("spectool.graph.regions._TOO_LONG_NAMES", 2000)
    survey = survey_of(made, tmp_path)
    assert [key for key, _, _ in summary(survey) if "+" not in key] == names
    assert 20 < len(summary(survey)) < 30
    assert any("affine regions left out: they overlap too much" in note for note in survey.notes)
