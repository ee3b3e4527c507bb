"""Regions that are really one small operator: parts of weights, one position of many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from graph_nets import RELU, Net, call, region, region_of, rows

from spectool.graph.parts import block_of, ranges, suffix
from spectool.graph.types import Linear, Region

# --- parts and positions ----------------------------------------------------------------------------------


def fused_projection(x: tuple[int, ...], heads: int = 2) -> tuple[Net, tuple[str, ...]]:
    """x @ Wᵀ, split into three along the channels, the first third scaled by ½."""
    net = Net(x=x)
    width = x[-1]
    h = net.linear("x", "qkv", 3 * width, width)
    h = net(call("Add"), (h, net.weight("bias", 3 * width)), (*x[:-1], 3 * width))
    q, k, v = net.many(call("Split", axis=len(x) - 1), (h,), dict.fromkeys(("q", "k", "v"), x))
    net.weight("half", value=torch.tensor(0.5))
    q = net(call("Mul"), (q, "half"), x)
    return net, tuple(net(RELU, (part,), x) for part in (q, k, v))


def test_a_fused_projection_gives_three_parts_of_its_weight() -> None:
    net, outputs = fused_projection((1, 5, 4))
    survey = net.survey(*outputs)
    assert rows(survey) == [
        ("qkv", "linear", False),
        ("qkv[0:4]", "linear+scale", True),
        ("qkv[4:8]", "linear", True),
        ("qkv[8:12]", "linear", True),
    ]
    weight = net.tensors["qkv"]
    for key, first, alpha in (("qkv[0:4]", 0, 0.5), ("qkv[4:8]", 4, 1.0), ("qkv[8:12]", 8, 1.0)):
        item = region(survey, key)
        (node,) = item.nodes
        assert isinstance(node.op, Linear)
        assert node.op.alpha == alpha
        assert (item.level, item.in_shape, item.out_shape, item.weights) == ("composed", (4,), (4,), ("qkv",))
        assert item.weight_shapes == ((12, 4),)
        torch.testing.assert_close(survey.load(node.inputs[1]), weight[first : first + 4], rtol=0, atol=0)


def test_interleaved_heads_are_parts_of_several_blocks() -> None:
    """Projections stored head by head, (heads, 3, size): the query is two blocks of rows."""
    net = Net(x=(1, 5, 4))
    h = net.linear("x", "qkv", 12, 4)
    h = net(call("Reshape"), (h, net.weight("shape", 5)), (1, 5, 2, 3, 2))
    h = net(call("Transpose", perm=(3, 0, 2, 1, 4)), (h,), (3, 1, 2, 5, 2))
    outputs = [
        net(
            RELU,
            (net(call("Gather", axis=0, index=i), (h, net.weight(f"i{i}", 1)), (1, 2, 5, 2)),),
            (1, 2, 5, 2),
        )
        for i in range(3)
    ]
    survey = net.survey(*outputs)
    assert [key for key, _, maximal in rows(survey) if maximal] == [
        "qkv[0:2][6:8]",
        "qkv[2:4][8:10]",
        "qkv[4:6][10:12]",
    ]
    weight = net.tensors["qkv"]
    part = survey.load(region(survey, "qkv[2:4][8:10]").nodes[0].inputs[1])
    torch.testing.assert_close(part, torch.cat([weight[2:4], weight[8:10]]), rtol=0, atol=0)


def test_reading_one_position_is_the_operator_itself() -> None:
    net = Net(x=(1, 5, 4))
    h = net.linear("x", "w", 6, 4)
    first = net(call("Gather", axis=1, index=0), (h, net.weight("zero", 1)), (1, 6))
    assert rows(net.survey(net(RELU, (first,), (1, 6)))) == [("w", "linear", True)]


def test_channels_of_a_convolution_are_parts_of_its_weight() -> None:
    net = Net(x=(1, 3, 5, 5))
    h = net.conv("x", "conv", 4)
    outputs = net.many(call("Split", axis=1), (h,), {"a": (1, 2, 5, 5), "b": (1, 2, 5, 5)})
    survey = net.survey(*[net(RELU, (part,), (1, 2, 5, 5)) for part in outputs])
    assert rows(survey) == [
        ("conv", "conv2d", False),
        ("conv[0:2]", "conv2d", True),
        ("conv[2:4]", "conv2d", True),
    ]
    item = region(survey, "conv[2:4]")
    assert (item.in_shape, item.out_shape) == ((3, 5, 5), (2, 5, 5))
    torch.testing.assert_close(survey.load("conv[2:4]"), net.tensors["conv"][2:], rtol=0, atol=0)


def test_positions_of_a_convolution_are_replayed() -> None:
    net = Net(x=(1, 3, 5, 5))
    h = net.conv("x", "conv", 4)
    y = net(call("Gather", axis=3, index=(0, 1)), (h, net.weight("index", 2)), (1, 4, 5, 2))
    survey = net.survey(net(RELU, (y,), (1, 4, 5, 2)))
    assert rows(survey) == [("conv", "conv2d", False), ("conv", "conv2d", True)]
    assert len(region_of(survey, 1).nodes) == 2


def test_channels_of_a_grouped_convolution_are_replayed() -> None:
    net = Net(x=(1, 4, 5, 5))
    h = net.conv("x", "conv", 4, groups=2)
    part, _ = net.many(call("Split", axis=1), (h,), {"a": (1, 2, 5, 5), "b": (1, 2, 5, 5)})
    survey = net.survey(net(RELU, (part,), (1, 2, 5, 5)))
    assert [len(item.nodes) for item in survey.items if isinstance(item, Region)] == [1, 2]


def test_the_same_chain_at_every_position_is_one_position() -> None:
    """A normalisation's gain before a projection, split into heads and halves: diag(gain), then a half of W."""
    net = Net(x=(1, 5, 4))
    h = net(call("Mul"), ("x", net.weight("gain", 1, 1, 4)), (1, 5, 4))
    h = net(call("Add"), (h, net.weight("shift", 4)), (1, 5, 4))
    h = net.linear(h, "w", 8, 4)
    h = net(call("Reshape"), (h, net.weight("shape", 4)), (1, 5, 2, 4))
    h = net(call("Transpose", perm=(0, 2, 1, 3)), (h,), (1, 2, 5, 4))
    net.weight("third", value=torch.tensor([3.0]))
    halves = net.many(call("Split", axis=1), (h,), {"a": (1, 1, 5, 4), "b": (1, 1, 5, 4)})
    scaled = net(call("Div"), (halves[1], "third"), (1, 1, 5, 4))
    survey = net.survey(net(RELU, (halves[0],), (1, 1, 5, 4)), net(RELU, (scaled,), (1, 1, 5, 4)))
    assert rows(survey) == [
        ("w", "linear", False),
        ("gain + w[0:4]", "scale+linear", True),
        ("gain + w[4:8]", "scale+linear+scale", True),
    ]
    for key, first, alpha in (("gain + w[0:4]", 0, 1.0), ("gain + w[4:8]", 4, 1 / 3)):
        item = region(survey, key)
        scale, linear = item.nodes
        assert (item.in_shape, item.out_shape, item.weights) == ((4,), (4,), ("gain", "w"))
        assert scale.inputs[0] == item.root
        assert linear.inputs[0] == scale.outputs[0]
        assert isinstance(linear.op, Linear)
        assert linear.op.alpha == pytest.approx(alpha)
        torch.testing.assert_close(survey.load(scale.inputs[1]), net.tensors["gain"][0, 0])
        torch.testing.assert_close(survey.load(linear.inputs[1]), net.tensors["w"][first : first + 4])


def test_positions_may_be_selected_on_the_way() -> None:
    """A normalised class token before the classifier: the gain, then W, at one position."""
    net = Net(x=(1, 5, 4))
    h = net(call("Mul"), ("x", net.weight("gain", 4)), (1, 5, 4))
    h = net(call("Gather", axis=1, index=0), (h, net.weight("zero", 1)), (1, 4))
    net.weight("half", value=torch.tensor(0.5))
    h = net(call("Mul"), (h, "half"), (1, 4))
    y = net.linear(h, "w", 6, 4)
    survey = net.survey(net(RELU, (y,), (1, 6)))
    item = region(survey, "gain + w")
    assert (item.kind, item.in_shape, item.out_shape, len(item.nodes)) == (
        "scale+scale+linear",
        (4,),
        (6,),
        2,
    )
    assert isinstance(item.nodes[1].op, Linear)
    assert item.nodes[1].op.alpha == 0.5


def test_a_chain_that_mixes_positions_keeps_them() -> None:
    net = Net(x=(1, 5, 4))
    h = net.linear("x", "w", 4, 4)
    h = net(call("Transpose", perm=(0, 2, 1)), (h,), (1, 4, 5))
    y = net.linear(h, "w2", 3, 5)
    survey = net.survey(net(RELU, (y,), (1, 4, 3)))
    item = region(survey, "w + w2")
    assert (item.in_shape, item.out_shape) == ((5, 4), (4, 3))


@pytest.mark.parametrize(
    ("block", "shape", "expected"),
    [
        (((0, 4), (0, 3)), (4, 3), ""),
        (((0, 2), (0, 3)), (4, 3), "[0:2]"),
        (((0, 4), (1, 3)), (4, 3), "[:,1:3]"),
        (((0, 1), (2, 4), (0, 3)), (1, 8, 3), "[2:4]"),
        (((1, 2), (2, 4), (0, 3)), (2, 8, 3), "[1,2:4]"),
        (((3, 4),), (4, 3), "[3:4]"),
    ],
)
def test_names_of_parts(block: Any, shape: Any, expected: str) -> None:
    assert suffix(block, shape) == expected


def test_blocks_of_flat_indices() -> None:
    grid = np.arange(24).reshape(4, 6)
    assert block_of(grid[1:3, 2:5], (4, 6)) == ((1, 3), (2, 5))
    assert block_of(grid[::2], (4, 6)) is None
    assert ranges([0, 1, 5, 6, 7, 9]) == [(0, 2), (5, 8), (9, 10)]
