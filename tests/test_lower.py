"""Regions become maps whose dense matrix is that of the plain torch code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spectool.errors import OperatorError
from spectool.graph.types import BatchNorm, Call, Conv, Embedding, Linear, Node, Opaque, Region
from spectool.linear import ConvMap, DiagonalMap, FunctionMap, InfiniteConv, MatrixMap, SeparableMap, to_dense
from spectool.linear.geometry import ConvGeometry
from spectool.lower import lower, without_epsilon

torch.manual_seed(0)
Function = Callable[[torch.Tensor], torch.Tensor]


def region(nodes: list[Node], in_shape, out_shape, batched: bool = True) -> Region:
    return Region(
        "key",
        "layer",
        "region",
        "x",
        nodes[-1].outputs[0],
        tuple(nodes),
        (),
        (),
        in_shape,
        out_shape,
        batched,
    )


def dense(function: Function, in_shape: tuple[int, ...]) -> np.ndarray:
    """The matrix of the linear part of a function on a batch of one, column by column."""
    offset = function(torch.zeros(1, *in_shape, dtype=torch.float64))
    columns = []
    for index in range(int(np.prod(in_shape))):
        basis = torch.zeros(int(np.prod(in_shape)), dtype=torch.float64)
        basis[index] = 1.0
        columns.append((function(basis.reshape(1, *in_shape)) - offset).reshape(-1))
    return torch.stack(columns, dim=1).numpy()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


TENSORS = {
    "w": random(6, 3, 3, 3),
    "wg": random(6, 2, 3, 3),
    "wt": random(4, 3, 2, 2),
    "b": random(6) * 1e3,
    "gamma": torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, -0.1], dtype=torch.float64),
    "beta": random(6),
    "mean": random(6),
    "var": random(6).abs() + 0.01,
    "m1": random(5, 7),
    "m2": random(4, 5),
    "square": random(6, 6),
    "square2": random(6, 6),
    "shift": random(6),
    "shape": torch.tensor([0, 2, 3]),
    "flat": torch.tensor([0, 6]),
    "pads": torch.tensor([0, 0, 1, 2, 0, 0, 3, 0]),
    "table": random(9, 4),
    "wide": random(3, 1, 6),
}
CONV = ConvGeometry((2, 1), ((1, 1), (0, 2)), (1, 2), 1)


def load(name: str) -> torch.Tensor:
    return TENSORS[name]


def batch_norm(x: torch.Tensor) -> torch.Tensor:
    t = TENSORS
    return F.batch_norm(x, t["mean"], t["var"], t["gamma"], t["beta"], False, 0.0, 1e-3)


BN = Node("bn", BatchNorm(1e-3), ("c", "gamma", "beta", "mean", "var"), ("y",))


def check(nodes: list[Node], in_shape, function: Function, kind: type, out_shape=None) -> None:
    expected = dense(function, in_shape)
    out = out_shape or tuple(function(torch.zeros(1, *in_shape, dtype=torch.float64)).shape[1:])
    operator = lower(region(nodes, in_shape, out), load, dtype=torch.float64)
    assert isinstance(operator, kind)
    got = to_dense(operator).numpy()
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_convolution_and_batch_norm_fold_into_one_convolution() -> None:
    nodes = [Node("conv", Conv(CONV), ("x", "w", "b"), ("c",)), BN]
    check(
        nodes,
        (3, 6, 7),
        lambda x: batch_norm(F.conv2d(F.pad(x, (0, 2, 1, 1)), TENSORS["w"], TENSORS["b"], (2, 1), 0, (1, 2))),
        ConvMap,
    )


def test_grouped_transposed_convolution_and_batch_norm_fold() -> None:
    geometry = ConvGeometry((2, 2), ((0, 0), (0, 0)), (1, 1), 2, transposed=True, output_padding=(0, 0))
    nodes = [Node("conv", Conv(geometry), ("x", "wt"), ("c",)), BN]
    check(
        nodes,
        (4, 3, 3),
        lambda x: batch_norm(F.conv_transpose2d(x, TENSORS["wt"], None, 2, 0, 0, 2)),
        ConvMap,
    )


def test_zero_pad_moves_into_the_convolution() -> None:
    plain = ConvGeometry.plain(2)
    nodes = [
        Node("pad", Call("onnx.Pad", {}, 13), ("x", "pads"), ("p",)),
        Node("conv", Conv(plain), ("p", "w"), ("y",)),
    ]
    check(nodes, (3, 4, 5), lambda x: F.conv2d(F.pad(x, (2, 0, 1, 3)), TENSORS["w"]), ConvMap)


def test_bias_and_trailing_rearrangement_leave_a_lone_operator() -> None:
    nodes = [
        Node("mm", Linear(transposed=False), ("x", "m1"), ("h",)),
        Node("add", Call("onnx.Add", {}, 14), ("h", "none"), ("y",)),
    ]
    check(nodes, (7,), lambda x: x @ TENSORS["m1"].T, MatrixMap)


def test_chain_of_matrices_keeps_every_factor() -> None:
    nodes = [
        Node("a", Linear(alpha=2.0), ("x", "m1"), ("h",)),
        Node("b", Linear(), ("h", "m2"), ("y",)),
    ]
    expected = 2.0 * TENSORS["m2"].numpy() @ TENSORS["m1"].numpy()
    operator = lower(region(nodes, (7,), (4,)), load, dtype=torch.float64)
    np.testing.assert_allclose(to_dense(operator).numpy(), expected, atol=1e-12)


def test_chain_of_matrices_over_positions_is_their_product_once() -> None:
    nodes = [Node("a", Linear(), ("x", "m1"), ("h",)), Node("b", Linear(), ("h", "m2"), ("y",))]
    operator = lower(region(nodes, (11, 7), (11, 4)), load, dtype=torch.float64)
    np.testing.assert_allclose(
        to_dense(operator).numpy(), (TENSORS["m2"] @ TENSORS["m1"]).numpy(), atol=1e-12
    )


def test_a_shuffle_between_two_matrices_is_not_dropped() -> None:
    nodes = [
        Node("a", Linear(), ("x", "square"), ("h",)),
        Node("r", Call("onnx.Reshape", {}, 13), ("h", "shape"), ("r",)),
        Node("t", Call("onnx.Transpose", {"perm": [0, 2, 1]}, 13), ("r",), ("t",)),
        Node("f", Call("onnx.Reshape", {}, 13), ("t", "flat"), ("f",)),
        Node("b", Linear(), ("f", "square2"), ("y",)),
    ]

    def function(x: torch.Tensor) -> torch.Tensor:
        h = (x @ TENSORS["square"].T).reshape(1, 2, 3).transpose(1, 2).reshape(1, 6)
        return h @ TENSORS["square2"].T

    check(nodes, (6,), function, FunctionMap)


def test_residual_sum_is_replayed() -> None:
    same = ConvGeometry((1, 1), ((1, 1), (1, 1)), (1, 1))
    weight = random(3, 3, 3, 3)
    TENSORS["residual"] = weight
    nodes = [
        Node("conv", Conv(same), ("x", "residual"), ("c",)),
        Node("add", Call("onnx.Add", {}, 14), ("x", "c"), ("y",)),
    ]
    check(nodes, (3, 4, 4), lambda x: x + F.conv2d(x, weight, padding=1), FunctionMap)


def test_pool_is_a_product_of_small_factors() -> None:
    attributes = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1], "count_include_pad": 0}
    nodes = [Node("pool", Call("onnx.AveragePool", attributes, 11), ("x",), ("y",))]

    def function(x: torch.Tensor) -> torch.Tensor:
        ones = F.pad(torch.ones_like(x), (0, 1, 1, 1))
        padded = F.pad(x, (0, 1, 1, 1))
        kernel = torch.ones(x.shape[1], 1, 3, 2, dtype=x.dtype)
        total = F.conv2d(padded, kernel, stride=(2, 1), groups=x.shape[1])
        return total / F.conv2d(ones, kernel, stride=(2, 1), groups=x.shape[1])

    check(nodes, (2, 5, 4), function, SeparableMap)


def test_lone_batch_norm_and_embedding() -> None:
    nodes = [Node("bn", BatchNorm(1e-3), ("x", "gamma", "beta", "mean", "var"), ("y",))]
    check(nodes, (6, 2, 2), batch_norm, DiagonalMap)
    nodes = [Node("emb", Embedding(), ("x", "table"), ("y",))]
    operator = lower(region(nodes, None, None), load, dtype=torch.float64)
    np.testing.assert_array_equal(to_dense(operator).numpy(), TENSORS["table"].numpy().T)


def test_unknown_size_gives_the_infinite_grid_with_the_norm_folded() -> None:
    nodes = [Node("conv", Conv(CONV), ("x", "w"), ("c",)), BN]
    operator = lower(region(nodes, None, None), load)
    assert isinstance(operator, InfiniteConv)
    t = TENSORS
    scale = t["gamma"] / torch.sqrt(t["var"] + 1e-3)
    np.testing.assert_allclose(
        operator.weight.numpy(), (t["w"] * scale.reshape(-1, 1, 1, 1)).numpy(), rtol=1e-14
    )
    bare = lower(without_epsilon(region(nodes, None, None)), load)
    assert isinstance(bare, InfiniteConv)
    scale = t["gamma"] / torch.sqrt(t["var"])
    np.testing.assert_allclose(bare.weight.numpy(), (t["w"] * scale.reshape(-1, 1, 1, 1)).numpy(), rtol=1e-14)


def test_what_cannot_be_replayed_says_so() -> None:
    nodes = [Node("relu", Opaque("onnx.Relu"), ("x",), ("y",))]
    with pytest.raises(OperatorError, match=r"relu: onnx\.Relu is not affine"):
        lower(region(nodes, (3,), (3,)), load)
    with pytest.raises(OperatorError, match="unknown input size"):
        lower(region([Node("p", Call("onnx.Pad"), ("x",), ("y",))], None, None), load)
