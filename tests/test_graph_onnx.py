"""The ONNX front-end on models made by hand: geometry, products, constants, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_models import (
    FLOAT,
    INT64,
    dense,
    graph,
    jacobian_of,
    keys,
    model,
    node,
    region,
    skips,
    spectrum,
    summary,
    survey_of,
    weights,
)

from spectool.checkpoint.types import Checkpoint
from spectool.errors import GraphError, UsageError
from spectool.graph.onnx import survey_onnx
from spectool.graph.types import Conv, Linear, Region, Skipped

# --- geometry of convolutions -----------------------------------------------------------------------------

CONVOLUTIONS: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("Conv", (1, 2, 7), (3, 2, 3), {"pads": [2, 0], "strides": [2]}),
    ("Conv", (1, 4, 5, 6), (6, 2, 3, 2), {"group": 2, "dilations": [1, 2], "pads": [1, 0, 0, 2]}),
    ("Conv", (1, 1, 7, 6), (2, 1, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", (1, 1, 7, 6), (2, 1, 4, 2), {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    ("Conv", (1, 1, 7, 6), (2, 1, 2, 4), {"auto_pad": "SAME_UPPER"}),
    ("Conv", (1, 1, 7, 6), (2, 1, 2, 4), {"auto_pad": "VALID"}),
    ("Conv", (1, 1, 4, 4, 3), (2, 1, 2, 3, 2), {"pads": [0, 1, 0, 1, 1, 1]}),
    ("ConvTranspose", (1, 2, 4), (2, 3, 3), {"strides": [2], "pads": [1, 0], "output_padding": [1]}),
    ("ConvTranspose", (1, 4, 3, 4), (4, 2, 3, 2), {"group": 2, "dilations": [2, 1], "pads": [1, 0, 2, 1]}),
    ("ConvTranspose", (1, 1, 4), (1, 2, 5), {"strides": [2], "output_shape": [8]}),
    ("ConvTranspose", (1, 1, 4), (1, 2, 5), {"strides": [2], "output_shape": [8], "auto_pad": "SAME_UPPER"}),
    ("ConvTranspose", (1, 1, 4), (1, 2, 5), {"strides": [2], "output_shape": [12]}),
    ("ConvTranspose", (1, 1, 4, 3), (1, 2, 5, 4), {"strides": [2, 3], "auto_pad": "SAME_UPPER"}),
    ("ConvTranspose", (1, 1, 4, 3), (1, 2, 5, 4), {"strides": [2, 3], "auto_pad": "SAME_LOWER"}),
    ("ConvTranspose", (1, 1, 4), (1, 2, 3), {"strides": [2], "auto_pad": "VALID"}),
]


@pytest.mark.parametrize(("op", "x", "w", "attributes"), CONVOLUTIONS, ids=str)
def test_convolutions_of_every_geometry(
    op: str, x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any], tmp_path: Path
) -> None:
    tensors = {"w": weights(*w), "b": weights(w[0] if op == "Conv" else w[1] * attributes.get("group", 1))}
    proto = model(graph([node(op, "x w b", "y", **attributes)], {"x": x}, "y", tensors))
    survey = survey_of(proto, tmp_path)
    (item,) = survey.items
    assert isinstance(item, Region)
    assert isinstance(item.nodes[0].op, Conv)
    assert (item.key, item.in_shape, item.maximal) == ("w", x[1:], True)
    assert item.kind == f"{'conv' if op == 'Conv' else 'conv_transpose'}{len(x) - 2}d"
    expected = jacobian_of(proto)
    got = dense(item, survey)
    assert np.prod(item.out_shape or ()) == expected.shape[0]
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_convolutions_with_a_weight_from_data_or_of_too_many_axes(tmp_path: Path) -> None:
    proto = model(
        graph([node("Conv", "x w", "y")], {"x": (1, 2, 5), "w": (3, 2, 3)}, "y", {"t": weights(2, 2)})
    )
    survey = survey_of(proto, tmp_path)
    assert survey.items == ()
    assert survey.notes == ("1 stored matrices are used by nothing that depends on the inputs: t",)
    proto = model(graph([node("Conv", "x w", "y")], {"x": (1,) * 6}, "y", {"w": weights(*(1,) * 6)}))
    (item,) = skips(survey_of(proto, tmp_path)).values()
    assert (item.key, item.kind, item.reason) == ("w", "conv4d", "a convolution over 4 axes is not supported")


# --- products ---------------------------------------------------------------------------------------------

PRODUCTS: list[tuple[str, str, tuple[int, ...], tuple[int, ...], dict[str, Any], int]] = [
    ("MatMul", "x w", (1, 4), (4, 5), {}, -1),
    ("MatMul", "x w", (1, 3, 4), (4, 5), {}, -1),
    ("MatMul", "w x", (4, 3), (5, 4), {}, -2),
    ("MatMul", "w x", (1, 4, 3), (5, 4), {}, -2),
    ("MatMul", "x w", (1, 3, 4), (1, 4, 5), {}, -1),
    ("MatMul", "w x", (4,), (5, 4), {}, -1),
    ("Gemm", "x w b", (1, 4), (4, 5), {"alpha": 0.5, "beta": 3.0}, -1),
    ("Gemm", "x w", (1, 4), (5, 4), {"transB": 1}, -1),
    ("Gemm", "x w", (4, 3), (4, 5), {"transA": 1}, -1),
    ("Gemm", "w x", (4, 3), (5, 4), {}, -2),
    ("Gemm", "w x", (3, 4), (4, 5), {"transA": 1, "transB": 1, "alpha": -2.0}, -2),
    ("Einsum", "x w", (1, 3, 4), (4, 5), {"equation": "bti,io->bto"}, -1),
    ("Einsum", "w x", (1, 3, 4), (5, 4), {"equation": "oi,bti->bto"}, -1),
]


@pytest.mark.parametrize(("op", "order", "x", "w", "attributes", "axis"), PRODUCTS, ids=str)
def test_products_with_a_constant_matrix_on_either_side(
    op: str,
    order: str,
    x: tuple[int, ...],
    w: tuple[int, ...],
    attributes: dict[str, Any],
    axis: int,
    tmp_path: Path,
) -> None:
    proto = model(
        graph([node(op, order, "y", **attributes)], {"x": x}, "y", {"w": weights(*w), "b": weights(5)})
    )
    survey = survey_of(proto, tmp_path)
    assert summary(survey) == [("w", "linear", True)]
    item = region(survey, "w")
    (linear,) = item.nodes
    assert isinstance(linear.op, Linear)
    assert (linear.op.axis, item.in_shape, item.out_shape) == (axis, (4,), (5,))
    # The whole product is the matrix once per row of x, so every value comes as often.
    expected = spectrum(jacobian_of(proto))
    copies = len(expected) // min(4, 5)
    np.testing.assert_allclose(spectrum(dense(item, survey)), expected[: 4 * copies : copies], rtol=1e-5)


@pytest.mark.parametrize(
    ("op", "x", "w", "attributes"),
    [
        ("MatMul", (2, 3, 4), (2, 4, 5), {}),
        ("Einsum", (1, 3, 4), (3, 4, 5), {"equation": "bti,tio->bto"}),
        ("Einsum", (1, 3, 4), (4, 3), {"equation": "bti,it->bi"}),
    ],
)
def test_products_that_are_no_single_matrix_are_replayed(
    op: str, x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any], tmp_path: Path
) -> None:
    proto = model(graph([node(op, "x w", "y", **attributes)], {"x": x}, "y", {"w": weights(*w)}))
    survey = survey_of(proto, tmp_path)
    assert summary(survey) == [("w", "linear", True)]
    item = region(survey, "w")
    assert item.operators == 1
    np.testing.assert_allclose(dense(item, survey), jacobian_of(proto), atol=2e-5)


def test_a_product_with_a_vector_is_a_matrix_of_one_column(tmp_path: Path) -> None:
    proto = model(graph([node("MatMul", "x w", "y")], {"x": (1, 3, 4)}, "y", {"w": weights(4)}))
    survey = survey_of(proto, tmp_path)
    item = region(survey, "w")
    assert (item.kind, item.in_shape, item.out_shape) == ("linear", (4,), (1,))
    np.testing.assert_allclose(dense(item, survey), weights(4)[None], rtol=1e-6)


@pytest.mark.parametrize(("beta", "kind"), [(1.0, "linear"), (-0.5, "linear+scale")])
def test_a_bias_that_is_data_joins_the_product(tmp_path: Path, beta: float, kind: str) -> None:
    body = graph([node("Gemm", "x w x", "y", beta=beta)], {"x": (1, 4)}, "y", {"w": weights(4, 4)})
    proto = model(body)
    survey = survey_of(proto, tmp_path)
    assert summary(survey) == [("w", "linear", False), ("w", kind, True)]
    np.testing.assert_allclose(dense(region(survey, "w", "composed"), survey), jacobian_of(proto), atol=1e-5)


# --- constants --------------------------------------------------------------------------------------------


def test_weights_that_were_computed_go_by_what_is_stored(tmp_path: Path) -> None:
    """W stored as (6, 2, 2), scaled, flattened, transposed: the row is called W and its matrix is the result."""
    scale = helper.make_tensor("half", FLOAT, [], [0.5])
    nodes = [
        node("Constant", "", "half", value=scale),
        node("Mul", "W half", "scaled"),
        node("Flatten", "scaled", "flat", axis=1),
        node("Transpose", "flat", "w", perm=[1, 0]),
        node("MatMul", "x w", "y"),
    ]
    survey = survey_of(model(graph(nodes, {"x": (1, 4)}, "y", {"W": weights(6, 2, 2)})), tmp_path)
    item = region(survey, "W")
    assert (item.weights, item.weight_shapes) == (("W",), ((6, 2, 2),))
    np.testing.assert_allclose(dense(item, survey), 0.5 * weights(6, 2, 2).reshape(6, 4), rtol=1e-6)


def test_large_weights_are_computed_when_asked_for(tmp_path: Path) -> None:
    """200 × 100 entries are no small constant: the chain is run by ``load`` alone."""
    nodes = [node("Transpose", "W", "w"), node("Neg", "w", "v"), node("MatMul", "x v", "y")]
    survey = survey_of(model(graph(nodes, {"x": (1, 200)}, "y", {"W": weights(100, 200)})), tmp_path)
    item = region(survey, "W")
    np.testing.assert_array_equal(survey.load(item.nodes[0].inputs[1]).numpy(), -weights(100, 200).T)


def test_parts_of_a_stored_weight_are_named(tmp_path: Path) -> None:
    tensors = {"W": weights(12, 4), "s": np.array([4]), "e": np.array([8]), "one": np.array([1])}
    nodes = [
        node("Slice", "W s e", "rows"),
        node("Transpose", "rows", "part"),
        node("MatMul", "x part", "h"),
        node("Relu", "h", "r"),
        node("Slice", "W s e", "again"),
        node("Gemm", "r again", "y", transB=1),
    ]
    survey = survey_of(model(graph(nodes, {"x": (1, 4)}, "y", tensors)), tmp_path)
    assert keys(survey) == ["W", "W#2"]  # parts made at export are the stored tensor's uses


def test_unnamed_constants_go_by_their_output(tmp_path: Path) -> None:
    value = numpy_helper.from_array(weights(3, 2, 3))
    shape = numpy_helper.from_array(np.array([3, 3, 1]))
    filled = helper.make_tensor("v", FLOAT, [1], [0.25])
    nodes = [
        node("Constant", "", "w0", value=value),
        node("Conv", "x w0", "h"),
        node("Relu", "h", "r"),
        node("Constant", "", "s0", value=shape),
        node("ConstantOfShape", "s0", "w1", value=filled),
        node("Conv", "r w1", "g"),
        node("Relu", "g", "q"),
        node("Constant", "", "w2", value_floats=[1.0, 2.0, 3.0]),
        node("Mul", "q w2", "y"),
    ]
    survey = survey_of(model(graph(nodes, {"x": (1, 2, 5)}, "y")), tmp_path, computed=["w1"])
    assert summary(survey) == [("w0", "conv1d", True), ("w1", "conv1d", True), ("w2", "scale", True)]
    np.testing.assert_array_equal(survey.load("w1").numpy(), np.full((3, 3, 1), 0.25, np.float32))


def test_sizes_computed_from_shapes_are_constants(tmp_path: Path) -> None:
    """A flatten as exporters write it: Shape, Gather, Unsqueeze, Concat, Reshape."""
    nodes = [
        node("Conv", "x k", "h"),
        node("Shape", "h", "s"),
        node("Gather", "s zero", "n", axis=0),
        node("Unsqueeze", "n axis", "n1"),
        node("Concat", "n1 rest", "target", axis=0),
        node("Reshape", "h target", "flat"),
        node("MatMul", "flat w", "y"),
    ]
    tensors = {
        "k": weights(2, 1, 3, 3),
        "zero": np.array(0),
        "axis": np.array([0]),
        "rest": np.array([-1]),
        "w": weights(18, 4),
    }
    proto = model(graph(nodes, {"x": (1, 1, 5, 5)}, "y", tensors))
    survey = survey_of(proto, tmp_path)
    assert summary(survey) == [
        ("k", "conv2d", False),
        ("w", "linear", False),
        ("k + w", "conv2d+linear", True),
    ]
    item = region(survey, "k + w")
    assert (item.in_shape, item.out_shape) == ((1, 5, 5), (4,))
    np.testing.assert_allclose(dense(item, survey), jacobian_of(proto), atol=2e-5)


def test_parts_of_shapes_are_constants(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "inner", start=1, end=-1),
        node("Concat", "inner rest", "target", axis=0),
        node("Reshape", "x target", "h"),
        node("Mul", "h gain", "y"),
    ]
    tensors = {"rest": np.array([-1]), "gain": weights(3, 1)}
    item = region(survey_of(model(graph(nodes, {"x": (2, 3, 6)}, "y", tensors)), tmp_path), "gain")
    assert (item.kind, item.in_shape, item.batched) == ("scale", (3, 12), False)


def test_a_sparse_initializer_is_a_weight(tmp_path: Path) -> None:
    values = helper.make_tensor("w", FLOAT, [2], [3.0, -4.0])
    indices = helper.make_tensor("i", INT64, [2, 2], [0, 1, 3, 0])
    body = graph([node("MatMul", "x w", "y")], {"x": (1, 4)}, "y", {"unused": weights(2, 2)})
    body.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 2]))
    path = tmp_path / "net.onnx"
    survey = survey_onnx(Checkpoint(path, "onnx", {}, program=model(body)))
    np.testing.assert_allclose(spectrum(dense(region(survey, "w"), survey)), [4, 3])


def test_initializers_that_are_also_inputs_are_constants(tmp_path: Path) -> None:
    body = graph([node("MatMul", "x w", "y")], {"x": (1, 4), "w": (4, 2)}, "y", {"w": weights(4, 2)})
    assert keys(survey_of(model(body), tmp_path)) == ["w"]


def test_tied_embedding_and_output_projection(tmp_path: Path) -> None:
    nodes = [
        node("Gather", "E tokens", "h"),
        node("Tanh", "h", "t"),
        node("Transpose", "E", "Et", perm=[1, 0]),
        node("MatMul", "t Et", "y"),
    ]
    body = graph(nodes, {"tokens": (1, "length")}, "y", {"E": weights(11, 5)}, {"tokens": INT64})
    survey = survey_of(model(body), tmp_path)
    assert summary(survey) == [("E", "embedding", True), ("E#2", "linear", True)]
    assert (region(survey, "E").in_shape, region(survey, "E#2").in_shape) == ((11,), (5,))
    np.testing.assert_allclose(
        spectrum(dense(region(survey, "E"), survey)), spectrum(weights(11, 5)), rtol=1e-5
    )


# --- sizes ------------------------------------------------------------------------------------------------


def convolution_of_open_size(*shape: int | str | None) -> onnx.ModelProto:
    nodes = [node("Conv", "x w", "h"), node("GlobalAveragePool", "h", "y")]
    return model(graph(nodes, {"x": shape}, "y", {"w": weights(3, 2, 3, 3)}))


def test_an_open_batch_axis_is_one(tmp_path: Path) -> None:
    survey = survey_of(convolution_of_open_size("batch", 2, 6, 5), tmp_path)
    assert [(item.in_shape, item.batched) for item in survey.items if isinstance(item, Region)] == [
        ((2, 6, 5), True),
        ((2, 6, 5), True),
    ]


def test_a_convolution_of_open_size_holds_for_any_and_says_how_to_fix_it(tmp_path: Path) -> None:
    proto = convolution_of_open_size("batch", 2, "height", None)
    loose = survey_of(proto, tmp_path)
    assert region(loose, "w", "layer").in_shape is None
    assert "infinite grid" in region(loose, "w", "layer").assumed
    (note,) = [note for note in loose.notes if "not fixed by the file" in note]
    assert note == (
        "the size of w is not fixed by the file: open input x (batchx2xheightx?): "
        "say what size it has, e.g. --input x=1x2x224x224"
    )
    survey = survey_of(proto, tmp_path, {"": (1, 2, 6, 5)})
    assert region(survey, "w", "layer").in_shape == (2, 6, 5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"y": (1, 2, 6, 5)}, r"the model has no input 'y'; its inputs are x \(batchx2xheightx\?\)"),
        ({"x": (1, 2, 6)}, r"input x has the shape batchx2xheightx\? in the file, not 1x2x6"),
        ({"x": (1, 3, 6, 5)}, r"input x has the shape batchx2xheightx\? in the file, not 1x3x6x5"),
        ({"x": (1, 2, 0, 5)}, "input x cannot have the shape 1x2x0x5"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    inputs: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        survey_of(convolution_of_open_size("batch", 2, "height", None), tmp_path, inputs)


def test_sizes_from_integer_inputs_are_those_of_a_run_on_zeros(tmp_path: Path) -> None:
    """x is cut to n + 4 entries; the convolution behind it has the size that n = 0 gives."""
    nodes = [
        node("Add", "n four", "end"),
        node("Slice", "x zero end axis", "cut"),
        node("Conv", "cut w", "y"),
    ]
    tensors = {"four": np.array([4]), "zero": np.array([0]), "axis": np.array([2]), "w": weights(3, 2, 3)}
    body = graph(nodes, {"x": (1, 2, 9), "n": (1,)}, "y", tensors, {"n": INT64})
    item = region(survey_of(model(body), tmp_path), "w")
    assert (item.in_shape, item.out_shape) == ((2, 4), (3, 2))


def test_inputs_of_several_names(tmp_path: Path) -> None:
    nodes = [node("MatMul", "a w", "h"), node("MatMul", "b w", "g"), node("Mul", "h g", "y")]
    proto = model(graph(nodes, {"a": ("n", "t", 4), "b": ("n", "t", 4)}, "y", {"w": weights(4, 4)}))
    with pytest.raises(UsageError, match=r"the model has 2 inputs: a \(nxtx4\), b \(nxtx4\)"):
        survey_of(proto, tmp_path, {"": (1, 3, 4)})
    with pytest.raises(UsageError, match="the dimension t cannot be 3 and 5 at once"):
        survey_of(proto, tmp_path, {"a": (1, 3, 4), "b": (1, 5, 4)})
    # A matrix over positions needs no number of positions.
    assert summary(survey_of(proto, tmp_path)) == [("w", "linear", True), ("w#2", "linear", True)]


def test_a_size_that_depends_on_data_is_an_infinite_grid(tmp_path: Path) -> None:
    nodes = [
        node("NonZero", "x", "places"),
        node("Cast", "places", "p", to=FLOAT),
        node("Unsqueeze", "p axis", "q"),
        node("Conv", "q w", "h", strides=[2]),
        node("AveragePool", "h", "y", kernel_shape=[2]),
        node("Conv", "q w", "z", strides=[2], auto_pad="SAME_UPPER"),
    ]
    tensors = {"axis": np.array([0]), "w": weights(3, 2, 3)}
    survey = survey_of(model(graph(nodes, {"x": (4, 4)}, "y z", tensors)), tmp_path)
    conv, pool, padded = survey.items
    assert isinstance(conv, Region)
    assert isinstance(conv.nodes[0].op, Conv)
    assert (conv.in_shape, conv.assumed, conv.nodes[0].op.geometry.stride) == (None, ("infinite grid",), (2,))
    assert [(item.reason, item.operators) for item in (pool, padded) if isinstance(item, Skipped)] == [
        ("its input size is not known", 0),
        ("its padding depends on an input size that is not known", 1),
    ]


def test_graphs_that_cannot_be_followed_are_errors(tmp_path: Path) -> None:
    body = graph([node("Relu", "nowhere", "y")], {"x": (1, 4)}, "y", {"w": weights(2, 2)})
    with pytest.raises(GraphError, match="Relu '' reads 'nowhere', which nothing before it writes"):
        survey_of(model(body), tmp_path)
    with pytest.raises(GraphError, match="holds no ONNX graph"):
        survey_onnx(Checkpoint(tmp_path / "net.onnx", "onnx", {}))
