"""Affine dataflow and its rows on graphs made by hand."""

from __future__ import annotations

import time

import pytest
from graph_nets import RELU, Net, call, exits, region, rows

from spectool.graph import regions
from spectool.graph.affine import flow, region_nodes
from spectool.graph.rules import ONNX_RULES
from spectool.graph.types import Embedding, Linear, Opaque, Region, Skipped, Value

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
