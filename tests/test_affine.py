"""Affine dataflow and rows on graphs made by hand: no front-end, no file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from spectool.graph import regions
from spectool.graph.affine import flow, region_nodes
from spectool.graph.parts import block_of, ranges, suffix
from spectool.graph.regions import survey_graph
from spectool.graph.roles import Known
from spectool.graph.rules import ONNX_RULES
from spectool.graph.types import (
    BatchNorm,
    Call,
    Conv,
    Embedding,
    Graph,
    Linear,
    Node,
    Op,
    Opaque,
    Region,
    Skipped,
    Survey,
    Value,
)
from spectool.linear.geometry import ConvGeometry

RELU = Opaque("onnx.Relu")
Shape = tuple[int | None, ...]


def call(name: str, **attributes: Any) -> Call:
    return Call(f"onnx.{name}", attributes, 13)


class Net:
    """A graph under construction; ``net(op, inputs, shape)`` appends a node and returns its output's name."""

    def __init__(self, **inputs: Shape) -> None:
        self.nodes: list[Node] = []
        self.values = {name: Value(name, shape) for name, shape in inputs.items()}
        self.inputs = tuple(inputs)
        self.tensors: dict[str, torch.Tensor] = {}

    def weight(self, name: str, *shape: int, value: torch.Tensor | None = None) -> str:
        seed = torch.Generator().manual_seed(len(self.tensors))
        self.tensors[name] = torch.randn(*shape, generator=seed) if value is None else value
        return name

    def __call__(
        self, op: Op, inputs: Sequence[str], shape: Shape, name: str = "", dtype: str = "float32"
    ) -> str:
        name = name or f"v{len(self.nodes)}"
        return self.many(op, inputs, {name: shape}, dtype)[0]

    def many(
        self, op: Op, inputs: Sequence[str], outputs: Mapping[str, Shape], dtype: str = "float32"
    ) -> tuple[str, ...]:
        self.nodes.append(Node(next(iter(outputs)), op, tuple(inputs), tuple(outputs)))
        self.values |= {name: Value(name, shape, dtype) for name, shape in outputs.items()}
        return tuple(outputs)

    def linear(self, x: str, name: str, rows: int, columns: int) -> str:
        shape = self.values[x].shape
        assert shape is not None
        return self(Linear(), (x, self.weight(name, rows, columns)), (*shape[:-1], rows))

    def conv(self, x: str, name: str, out: int, **geometry: Any) -> str:
        shape = self.values[x].shape
        assert shape is not None
        assert shape[1] is not None
        self.weight(name, out, shape[1] // geometry.get("groups", 1), 1, 1)
        return self(Conv(ConvGeometry.plain(2, **geometry)), (x, name), (1, out, *shape[2:]))

    def norm(self, x: str, name: str) -> str:
        shape = self.values[x].shape
        assert shape is not None
        assert shape[1] is not None
        names = [self.weight(f"{name}.{part}", shape[1]) for part in ("gamma", "beta", "mean", "var")]
        return self(BatchNorm(1e-5), (x, *names), shape)

    def graph(self, *outputs: str) -> Graph:
        constants = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return Graph(tuple(self.nodes), self.values, self.inputs, outputs, constants)

    def survey(self, *outputs: str, **known: Any) -> Survey:
        load = self.tensors.__getitem__
        return survey_graph(
            self.graph(*outputs), Known(load=load, rules=ONNX_RULES, move=move(self), **known), source="test"
        )


def move(net: Net) -> Any:
    """The operations on index arrays that these graphs use, in numpy."""

    def run(node: Node, arrays: Sequence[np.ndarray | None]) -> Sequence[np.ndarray]:
        x = next(array for array in arrays if array is not None)
        assert isinstance(node.op, Call)
        values = node.op.attributes
        match node.op.name.removeprefix("onnx."):
            case "Split":
                return np.split(x, len(node.outputs), values["axis"])
            case "Reshape":
                return [x.reshape([size or 0 for size in net.values[node.outputs[0]].shape or ()])]
            case "Transpose":
                return [x.transpose(values["perm"])]
            case "Gather":
                return [np.take(x, values["index"], values["axis"])]
            case "Concat":
                return [np.concatenate([array for array in arrays if array is not None], values["axis"])]
        raise ValueError(node.op.name)

    return run


def rows(survey: Survey) -> list[tuple[str, str, bool]]:
    return [(item.key, item.kind, item.maximal) for item in survey.items if isinstance(item, Region)]


def exits(graph: Graph) -> list[tuple[str, str]]:
    found = flow(graph, ONNX_RULES)
    return [(found.root[name], name) for name in found.exits(graph)]


def region(survey: Survey, key: str) -> Region:
    (item,) = [item for item in survey.items if item.key == key]
    assert isinstance(item, Region)
    return item


# --- dataflow ---------------------------------------------------------------------------------------------


def test_a_residual_sum_of_linear_branches_is_one_region() -> None:
    net = Net(x=(1, 4))
    y = net(call("Add"), ("x", net.linear("x", "w", 4, 4)), (1, 4))
    graph = net.graph(y)
    assert exits(graph) == [("x", y)]
    assert region_nodes(graph, flow(graph, ONNX_RULES), "x", y) == [0, 1]


def test_a_sum_behind_a_nonlinearity_starts_a_new_root() -> None:
    net = Net(x=(1, 4))
    h = net(RELU, ("x",), (1, 4))
    branch = net.linear(h, "w", 4, 4)
    y = net(call("Add"), ("x", branch), (1, 4))
    z = net.linear(y, "w2", 4, 4)
    assert exits(net.graph(z)) == [(h, branch), (y, z)]


@pytest.mark.parametrize("op", ["Mul", "MatMul", "Einsum"])
def test_products_of_a_value_with_itself_are_not_affine(op: str) -> None:
    net = Net(x=(4, 4))
    y = net(call(op), ("x", "x"), (4, 4))
    assert flow(net.graph(y), ONNX_RULES).root[y] == y


def test_a_product_with_a_constant_is_affine_on_either_side() -> None:
    net = Net(x=(1, 4))
    c = net.weight("c", 4)
    left, right = net(call("Mul"), (c, "x"), (1, 4)), net(call("Mul"), ("x", c), (1, 4))
    assert exits(net.graph(left, right)) == [("x", left), ("x", right)]


def test_a_quotient_is_affine_in_its_numerator_only() -> None:
    net = Net(x=(1, 4))
    c = net.weight("c", 4)
    over, under = net(call("Div"), ("x", c), (1, 4)), net(call("Div"), (c, "x"), (1, 4))
    assert exits(net.graph(over, under)) == [("x", over)]


def test_a_mask_must_be_constant() -> None:
    net = Net(x=(1, 4))
    mask, other = net.weight("mask", 4), net.weight("other", 4)
    fixed = net(call("Where"), (mask, "x", other), (1, 4))
    condition = net(Opaque("onnx.Less"), ("x", other), (1, 4), dtype="bool")
    moving = net(call("Where"), (condition, "x", other), (1, 4))
    assert exits(net.graph(fixed, moving)) == [("x", fixed)]


def test_integers_are_never_affine() -> None:
    net = Net(x=(1, 4))
    h = net.linear("x", "w", 4, 4)
    rounded = net(call("Cast"), (h,), (1, 4), dtype="int64")
    shifted = net(call("Add"), (rounded, net.weight("one", 1)), (1, 4), dtype="int64")
    back = net(call("Cast"), (shifted,), (1, 4))
    y = net.linear(back, "w2", 4, 4)
    assert exits(net.graph(y)) == [("x", h), (back, y)]


def test_reading_a_shape_is_no_use_of_the_value() -> None:
    net = Net(x=(1, 4))
    h = net.linear("x", "w", 4, 4)
    net(call("Shape"), (h,), (2,), dtype="int64")
    y = net.linear(h, "w2", 4, 4)
    assert exits(net.graph(y)) == [("x", y)]


def test_a_value_that_leaves_and_flows_on_ends_one_region_and_continues_in_another() -> None:
    net = Net(x=(1, 4))
    h = net.linear("x", "w", 4, 4)
    net(RELU, (h,), (1, 4))
    y = net.linear(h, "w2", 4, 4)
    assert exits(net.graph(y)) == [("x", h), ("x", y)]


def test_operators_with_weights_that_flow_are_boundaries() -> None:
    net = Net(x=(4, 4), k=(4, 4))
    y = net(Linear(), ("x", "k"), (4, 4))
    b = net(Linear(), ("x", net.weight("w", 4, 4), "k"), (4, 4))
    assert exits(net.graph(y, b)) == []


def test_an_output_that_is_an_input_or_a_constant_is_no_region() -> None:
    net = Net(x=(1, 4))
    net.weight("c", 4)
    assert exits(net.graph("x", "c")) == []


# --- rows -------------------------------------------------------------------------------------------------


def test_a_lone_operator_among_rearrangements_and_a_bias_is_its_own_region() -> None:
    net = Net(x=(1, 2, 6))
    h = net(call("Reshape"), ("x", net.weight("shape", 2)), (2, 6))
    h = net.linear(h, "w", 4, 6)
    h = net(call("Add"), (net.weight("bias", 4), h), (2, 4))
    y = net(call("Transpose", perm=(1, 0)), (h,), (4, 2))
    survey = net.survey(y)
    assert rows(survey) == [("w", "linear", True)]
    item = region(survey, "w")
    assert (item.in_shape, item.out_shape, item.level, len(item.nodes)) == ((6,), (4,), "layer", 1)


def test_a_bias_that_enlarges_the_value_is_no_bias() -> None:
    net = Net(x=(1, 6))
    h = net.linear("x", "w", 4, 6)
    y = net(call("Add"), (h, net.weight("table", 5, 4)), (5, 4))
    assert rows(net.survey(y)) == [("w", "linear", False), ("w", "linear", True)]


def test_batch_norm_behind_an_operator_makes_a_pair() -> None:
    net = Net(x=(1, 3, 5, 5))
    y = net.norm(net.conv("x", "conv", 4), "bn")
    survey = net.survey(net(RELU, (y,), (1, 4, 5, 5)))
    assert rows(survey) == [
        ("conv", "conv2d", False),
        ("bn.gamma", "batchnorm", False),
        ("conv + bn.gamma", "conv2d+batchnorm", True),
    ]
    pair = region(survey, "conv + bn.gamma")
    assert pair.weights == ("conv", "bn.gamma", "bn.var")
    assert (pair.in_shape, pair.out_shape, pair.operators) == ((3, 5, 5), (4, 5, 5), 1)


def test_a_pair_looks_through_a_bias_but_not_past_a_second_user() -> None:
    net = Net(x=(1, 3, 5, 5))
    h = net(call("Add"), (net.conv("x", "a", 4), net.weight("bias", 4, 1, 1)), (1, 4, 5, 5))
    y = net.norm(h, "bn")
    used = net.conv("x", "b", 4)
    z = net.norm(used, "bn2")
    survey = net.survey(y, z, used)
    assert [key for key, _, _ in rows(survey)] == [
        "a",
        "bn.gamma",
        "a + bn.gamma",
        "b",
        "bn2.gamma",
        "b + bn2.gamma",
    ]
    # The second composition is a maximal region, but its pair is not *the* use of b: b itself leaves, too.
    assert region(survey, "b").maximal
    assert region(survey, "b + bn2.gamma").maximal


def test_an_operator_that_is_also_used_without_the_batch_norm_makes_no_pair() -> None:
    net = Net(x=(1, 3, 5, 5))
    h = net.conv("x", "a", 4)
    y = net.conv(net.norm(h, "bn"), "b", 4)
    survey = net.survey(y, net(RELU, (h,), (1, 4, 5, 5)))
    assert rows(survey) == [
        ("a", "conv2d", True),
        ("bn.gamma", "batchnorm", False),
        ("b", "conv2d", False),
        ("a + bn.gamma + b", "conv2d+batchnorm+conv2d", True),
    ]


def test_larger_regions_follow_their_last_layer() -> None:
    net = Net(x=(1, 3, 5, 5))
    h = net.norm(net.conv("x", "depthwise", 3, groups=3), "bn1")
    y = net.norm(net.conv(h, "pointwise", 4), "bn2")
    survey = net.survey(y)
    assert [key for key, _, maximal in rows(survey) if maximal] == [
        "depthwise + bn1.gamma + pointwise + bn2.gamma"
    ]
    assert [key for key, _, _ in rows(survey)][-2:] == [
        "pointwise + bn2.gamma",
        "depthwise + bn1.gamma + pointwise + bn2.gamma",
    ]
    assert survey.items[-1].operators == 2


def test_weightless_regions_have_rows_that_count_nothing() -> None:
    net = Net(x=(1, 3, 4, 4))
    pool = net(call("AveragePool", kernel_shape=(2, 2)), ("x",), (1, 3, 3, 3), "pooled")
    mean = net(call("ReduceMean"), ("x",), (1, 3, 1, 1), "mean")
    scale = net(call("Mul"), ("x", net.weight("gain", 3, 1, 1)), (1, 3, 4, 4), "scaled")
    moved = net(call("Reshape"), ("x", "gain"), (1, 48), "moved")
    cut = net(call("Slice"), ("x",), (1, 3, 2, 2), "cut")
    channels = net(call("ReduceMean"), ("x",), (1, 1, 4, 4), "channels")
    centred = net(call("Sub"), ("x", channels), (1, 3, 4, 4), "centred")
    survey = net.survey(pool, mean, scale, moved, cut, channels, centred)
    assert rows(survey) == [
        ("avgpool:pooled", "avgpool", True),
        ("avgpool:mean", "avgpool", True),
        ("gain", "scale", True),
    ]
    assert {item.operators for item in survey.items} == {0}
    assert region(survey, "avgpool:pooled").in_shape == (3, 4, 4)


def test_a_value_used_twice_in_a_concatenation_is_more_than_its_operator() -> None:
    net = Net(x=(1, 6))
    h = net.linear("x", "w", 4, 6)
    twice = net(call("Concat", axis=1), (h, h), (1, 8))
    once = net(call("Concat", axis=1), (h, net.weight("pad", 1, 2)), (1, 6))
    survey = net.survey(net(RELU, (twice,), (1, 8)), net(RELU, (once,), (1, 6)))
    assert rows(survey) == [("w", "linear", True), ("w", "linear", True)]
    _, composed = survey.items
    assert isinstance(composed, Region)
    assert (composed.level, composed.out_shape, len(composed.nodes)) == ("composed", (8,), 2)


def test_a_gather_that_repeats_entries_is_more_than_its_operator() -> None:
    for index, maximal in (((5, 0, 1), True), ((0, 0, 1), False)):
        net = Net(x=(1, 9, 6))
        h = net.linear("x", "w", 4, 6)
        y = net(call("Gather", axis=1, index=index), (h, net.weight("index", 3)), (1, 3, 4))
        survey = net.survey(net(RELU, (y,), (1, 3, 4)))
        assert rows(survey)[0] == ("w", "linear", maximal)
        assert len(survey.items) == (1 if maximal else 2)


def test_selecting_before_an_operator_changes_nothing_unless_entries_repeat() -> None:
    for index, maximal in (((5, 0, 1), True), ((0, 0, 1), False)):
        net = Net(x=(1, 6))
        chosen = net(call("Gather", axis=1, index=index), ("x", net.weight("index", 3)), (1, 3))
        y = net.linear(chosen, "w", 4, 3)
        assert rows(net.survey(net(RELU, (y,), (1, 4))))[0] == ("w", "linear", maximal)


def test_entries_that_are_no_channels_times_positions_are_replayed() -> None:
    """Channel 0 at the first position and channel 1 at the second are no part of the matrix."""
    net = Net(x=(1, 2, 6))
    h = net.linear("x", "w", 4, 6)
    h = net(call("Reshape"), (h, net.weight("shape", 2)), (1, 8))
    y = net(call("Gather", axis=1, index=(0, 5)), (h, net.weight("index", 2)), (1, 2))
    survey = net.survey(net(RELU, (y,), (1, 2)))
    assert rows(survey) == [("w", "linear", False), ("w", "linear", True)]
    composed = survey.items[1]
    assert isinstance(composed, Region)
    assert (composed.in_shape, len(composed.nodes)) == ((2, 6), 3)


def test_open_sizes_do_not_make_a_bias_an_operator() -> None:
    net = Net(x=(None, 6))
    h = net.linear("x", "w", 4, 6)
    y = net(call("Add"), (h, net.weight("bias", 4)), (None, 4))
    assert rows(net.survey(y)) == [("w", "linear", True)]
    z = net(call("Add"), (h, net.weight("table", 7, 4)), (None, 4))
    assert isinstance(net.survey(z).items[1], Skipped)


def test_constants_that_join_a_value_change_nothing() -> None:
    """A class token before the patches: the convolution's own values and some zeros."""
    net = Net(x=(1, 3, 4, 4))
    h = net.conv("x", "patch", 6)
    h = net(call("Reshape"), (h, net.weight("shape", 3)), (1, 6, 16))
    h = net(call("Transpose", perm=(0, 2, 1)), (h,), (1, 16, 6))
    h = net(call("Concat", axis=1), (net.weight("token", 1, 1, 6), h), (1, 17, 6))
    y = net(call("Add"), (h, net.weight("positions", 1, 17, 6)), (1, 17, 6))
    assert rows(net.survey(net(RELU, (y,), (1, 17, 6)))) == [("patch", "conv2d", True)]


def test_the_second_use_of_a_weight_is_numbered() -> None:
    net = Net(x=(1, 4))
    h = net(RELU, (net.linear("x", "w", 4, 4),), (1, 4))
    y = net.linear(h, "w", 4, 4)
    assert [key for key, _, _ in rows(net.survey(y))] == ["w", "w#2"]


def test_operators_that_nothing_reads_are_listed_but_bound_nothing() -> None:
    net = Net(x=(1, 4))
    net.linear("x", "dead", 4, 4)
    y = net.linear("x", "alive", 4, 4)
    assert rows(net.survey(y)) == [("dead", "linear", False), ("alive", "linear", True)]


def test_embeddings_are_rows_in_their_one_hot_input() -> None:
    net = Net(tokens=(1, 7))
    net.values["tokens"] = Value("tokens", (1, 7), "int64")
    y = net(Embedding(), ("tokens", net.weight("table", 11, 5)), (1, 7, 5))
    survey = net.survey(y)
    item = region(survey, "table")
    assert (item.kind, item.in_shape, item.out_shape, item.maximal) == ("embedding", (11,), (5,), True)


def test_extra_rows_stand_where_their_node_stands() -> None:
    net = Net(x=(1, 4))
    h = net(Opaque("onnx.LSTM"), (net.linear("x", "first", 4, 4),), (1, 4), "lstm")
    y = net.linear(h, "last", 4, 4)
    extra = Skipped("inside", "lstm", (), (), "why not")
    survey = net.survey(y, extras={"lstm": (extra,)})
    assert [item.key for item in survey.items] == ["first", "inside", "last"]


def test_unknown_sizes_make_skips_of_compositions_and_open_shapes_of_operators() -> None:
    net = Net(x=(1, 3, None, None))
    h = net.conv("x", "conv", 4)
    y = net(call("AveragePool", kernel_shape=(2, 2)), (h,), (1, 4, None, None))
    survey = net.survey(y)
    conv, composed = survey.items
    assert isinstance(conv, Region)
    assert conv.in_shape is None
    assert isinstance(composed, Skipped)
    assert (composed.reason, composed.operators) == ("its input size is not known", 0)


def test_a_batch_axis_of_one_is_left_out_and_any_other_is_kept() -> None:
    single, several = Net(x=(1, 2, 4)), Net(x=(3, 2, 4))
    for net, expected in ((single, (2, 4)), (several, (3, 2, 4))):
        shape = net.values["x"].shape
        assert shape is not None
        h = net(call("Mul"), ("x", net.weight("c", 4)), shape)
        h = net(call("Concat", axis=1), (h, "x"), (shape[0], 4, 4))
        (item,) = net.survey(h).items
        assert isinstance(item, Region)
        assert (item.in_shape, item.batched) == (expected, net is single)


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


# --- size -------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_nodes_take_seconds() -> None:
    """Half in one long chain without a weight, half in short regions; quadratic work would take hours."""
    net = Net(x=(1, 2))
    net.weight("c", 2)
    net.weight("w", 2, 2)
    h = "x"
    for _ in range(50_000):
        h = net(call("Add"), (h, "c"), (1, 2))
    for _ in range(25_000):
        h = net(RELU, (net(Linear(), (h, "w"), (1, 2)),), (1, 2))
    start = time.perf_counter()
    survey = net.survey(h)
    assert len(survey.items) == 25_000
    assert time.perf_counter() - start < 30


def test_overlap_without_end_is_cut_short_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of a linear chain leaves: n regions of 1 … n nodes."""
    monkeypatch.setattr(regions, "_TOO_MANY_NODES", 1000)
    net = Net(x=(1, 2))
    net.weight("w", 2, 2)
    h, outputs = "x", []
    for _ in range(100):
        h = net(Linear(), (h, "w"), (1, 2))
        outputs.append(net(RELU, (h,), (1, 2)))
    survey = net.survey(*outputs)
    # 1 + 2 + … + 44 = 990 nodes fit.
    assert survey.notes == ("56 of 100 affine regions left out: they overlap too much",)
    assert [item.level for item in survey.items if isinstance(item, Region)].count("layer") == 100
    assert [item.level for item in survey.items if isinstance(item, Region)].count("composed") == 43
