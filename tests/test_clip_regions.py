"""Regions of more than one node, clipped and stored; the truth is torch's own Jacobian of plain functional code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_tools import (
    Clipped,
    DictWriter,
    clip,
    conv_dense,
    conv_node,
    geometry,
    linear_node,
    norm_constants,
    norm_node,
    norm_scale,
    region,
)

from spectool.clip import Constraint, Options, group, solve, store
from spectool.errors import OperatorError
from spectool.graph.parts import Derived, with_parts
from spectool.graph.types import Call, Node
from spectool.graph.writing import TracedWriter

SAME, NINE = geometry(2), 9


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def top(function, shape, values):
    """σ₁ of the linear part of a function of (x, constants in float64)."""
    wide = {name: value.double() for name, value in values.items()}
    jacobian = torch.autograd.functional.jacobian(
        lambda x: function(x[None], wide)[0], torch.zeros(shape, dtype=torch.float64)
    )
    return float(np.linalg.norm(jacobian.reshape(-1, int(np.prod(shape))).numpy(), 2))


def norm(x, values, prefix="n", eps=1e-5):
    gamma, beta, mean, var = (values[f"{prefix}.{part}"] for part in ("gamma", "beta", "mean", "var"))
    return F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps)


def obeys(after, limit):
    assert limit * (1 - 3e-4) <= after <= limit * (1 + 1e-9)


def certified(made: Clipped, gap: float):
    assert made.projected.lower is not None
    assert made.projected.lower <= made.change * (1 + 1e-6)
    assert made.change <= gap * made.projected.lower + 1e-6


# --- convolution and batch norm --------------------------------------------------------------------------------


def conv_norm(channels=(4, 6), size=7, seed=0, eps=1e-5, gamma=None, **options):
    g = geometry(2, **options)
    weight = random(channels[1], channels[0] // g.groups, 3, 3, seed=seed)
    constants = {"w": weight, **norm_constants(channels[1], seed=seed, gamma=gamma)}
    out = g.output_size((size, size), (3, 3))
    made = region([conv_node(g), norm_node(eps=eps)], ["w"], (channels[0], size, size), (channels[1], *out))

    def function(x, values):
        return norm(F.conv2d(x, values["w"], None, g.stride, g.padding[0][0], 1, g.groups), values, eps=eps)

    return made, constants, function


@pytest.mark.parametrize("level", [0.95, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {"gamma": [0.5, -2.0, 0.0, 1.5, -0.25, 0.0]},
        {"eps": 0.1, "stride": 2},
        {"channels": (6, 6), "groups": 6},
        {"gamma": [1e-4, -1e-4, 1.0, 1.0, 2.0, 3.0]},
    ],
    ids=["negative and zero gamma", "eps, stride", "depthwise", "tiny gamma"],
)
def test_conv_and_norm(options, level):
    made, constants, function = conv_norm(**options)
    shape = made.in_shape
    before = top(function, shape, constants)
    limit = level * before
    result = clip([(made, limit)], constants, 1 / level, exact=True)
    obeys(top(function, shape, result.values), limit)
    assert set(result.stored.edits) == {"w"}
    assert result.projected.metric == "folded"
    certified(result, 1.01)
    s = norm_scale(constants, eps=options.get("eps", 1e-5))[:, None, None, None]
    old, new = constants["w"].double().numpy(), result.values["w"].double().numpy()
    change = np.linalg.norm(s * (new - old)) / np.linalg.norm(s * old)
    assert change == pytest.approx(result.change, rel=1e-9)
    assert change <= (1 - level) * (1 + 1e-6)
    still = torch.from_numpy(s[:, 0, 0, 0] == 0)
    assert torch.equal(result.values["w"][still], constants["w"][still])
    assert bool(result.values["w"].isfinite().all())


@pytest.mark.parametrize("seed", range(3))
def test_clipping_a_composition_never_raises_it(seed):
    """Published code clips the composition with batch statistics and ends above where it began: 3.64 became 6.62."""
    made, constants, function = conv_norm(seed=seed)
    constants["n.var"] = constants["n.var"] * 0.05  # statistics far from those of any batch
    before = top(function, made.in_shape, constants)
    for level in (1.5, 0.9, 0.55):
        result = clip([(made, level * before)], constants, 1 / level)
        after = top(function, made.in_shape, result.values)
        assert after <= min(before, level * before) * (1 + 1e-9)
        assert all(torch.equal(result.values[name], constants[name]) for name in constants if name != "w")
        if level > 1:
            assert torch.equal(result.values["w"], constants["w"])


def test_a_pool_behind_the_norm():
    made, constants, _ = conv_norm(size=8)
    pool = Node(
        "p", Call("onnx.AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}, 11), ("z",), ("p",)
    )
    longer = region([*made.nodes, pool], ["w"], (4, 8, 8), (6, 4, 4))

    def function(x, values):
        return F.avg_pool2d(norm(F.conv2d(x, values["w"], padding=1), values), 2)

    before = top(function, (4, 8, 8), constants)
    result = clip([(longer, 0.7 * before)], constants, 1 / 0.7, exact=True)
    obeys(top(function, (4, 8, 8), result.values), 0.7 * before)
    certified(result, 1.01)
    assert result.change < 0.3


def test_half_types_of_a_composition():
    made, constants, function = conv_norm()
    constants["w"] = constants["w"].bfloat16()
    before = top(function, made.in_shape, constants)
    result = clip([(made, 0.8 * before)], constants, 1 / 0.8)
    after = top(function, made.in_shape, result.values)
    assert result.values["w"].dtype == torch.bfloat16
    assert 0.8 * before * (1 - 2**-6) <= after <= 0.8 * before


# --- several weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.9, 0.4])
def test_a_chain_of_linears(level):
    constants = {"a": random(12, 9, seed=1), "b": random(7, 12, seed=2)}
    chain = region([linear_node("a", "x", "h"), linear_node("b", "h", "y")], ["a", "b"], (9,), (7,))
    product = constants["b"].double() @ constants["a"].double()
    before = float(torch.linalg.matrix_norm(product, 2))
    result = clip([(chain, level * before)], constants, 1 / level)
    a, b = (result.values[name].double() for name in "ab")
    obeys(float(torch.linalg.matrix_norm(b @ a, 2)), level * before)
    assert set(result.stored.edits) == {"a", "b"}
    assert result.projected.lower is None
    assert "not convex" in result.projected.note
    # Scaling both by √level obeys as well.
    assert result.change <= (1 - level**0.5) * (1 + 1e-6)
    assert result.projected.scaling == pytest.approx(1 - level**0.5, rel=1e-4)


def test_depthwise_norm_pointwise_norm():
    depth, point = geometry(2, groups=5), geometry(2, pad=0)
    constants = {
        "d": random(5, 1, 3, 3, seed=3),
        "p": random(6, 5, 1, 1, seed=4),
        **norm_constants(5, "m", seed=5),
        **norm_constants(6, "n", seed=6),
    }
    nodes = [
        conv_node(depth, "d", "x", "h"),
        norm_node("m", "h", "i"),
        conv_node(point, "p", "i", "y"),
        norm_node("n", "y", "z"),
    ]
    made = region(nodes, ["d", "p"], (5, 6, 6), (6, 6, 6))

    def function(x, values):
        h = norm(F.conv2d(x, values["d"], padding=1, groups=5), values, "m")
        return norm(F.conv2d(h, values["p"]), values, "n")

    before = top(function, (5, 6, 6), constants)
    result = clip([(made, 0.6 * before)], constants, 1 / 0.6)
    obeys(top(function, (5, 6, 6), result.values), 0.6 * before)
    assert set(result.stored.edits) == {"d", "p"}
    assert result.change <= result.projected.scaling


def test_two_parallel_convolutions_are_convex():
    wide, narrow = geometry(2), geometry(2, pad=0)
    constants = {"a": random(4, 3, 3, 3, seed=7), "b": random(4, 3, 1, 1, seed=8)}
    nodes = [
        conv_node(wide, "a", "x", "h"),
        conv_node(narrow, "b", "x", "i"),
        Node("y", Call("onnx.Add", {}, 14), ("h", "i"), ("y",)),
    ]
    made = region(nodes, ["a", "b"], (3, 6, 6), (4, 6, 6))

    def function(x, values):
        return F.conv2d(x, values["a"], padding=1) + F.conv2d(x, values["b"])

    before = top(function, (3, 6, 6), constants)
    result = clip([(made, 0.8 * before)], constants, 1 / 0.8, exact=True)
    obeys(top(function, (3, 6, 6), result.values), 0.8 * before)
    certified(result, 1.01)
    assert result.change <= 0.2 * (1 + 1e-6)


# --- what does not depend on the weight ------------------------------------------------------------------------


def residual(join):
    constants = {"w": random(4, 4, 3, 3, seed=9, scale=0.3)}
    branch = conv_node(SAME, "w", "x", "h")
    if join == "sum":
        nodes = [branch, Node("y", Call("onnx.Add", {}, 14), ("x", "h"), ("y",))]
        return (
            region(nodes, ["w"], (4, 6, 6), (4, 6, 6)),
            constants,
            lambda x, values: x + F.conv2d(x, values["w"], padding=1),
        )
    nodes = [branch, Node("y", Call("onnx.Concat", {"axis": 1}, 13), ("x", "h"), ("y",))]
    return (
        region(nodes, ["w"], (4, 6, 6), (8, 6, 6)),
        constants,
        lambda x, values: torch.cat([x, F.conv2d(x, values["w"], padding=1)], dim=1),
    )


@pytest.mark.parametrize("join", ["sum", "beside"])
@pytest.mark.parametrize("level", [0.9, 0.6])
def test_an_identity_branch(join, level):
    made, constants, function = residual(join)
    before = top(function, (4, 6, 6), constants)
    assert level * before > 1.05
    result = clip([(made, level * before)], constants, 1 / level, exact=True)
    obeys(top(function, (4, 6, 6), result.values), level * before)
    certified(result, 1.01)


def test_a_limit_that_no_weight_reaches_is_refused():
    made, constants, function = residual("beside")
    before = top(function, (4, 6, 6), constants)
    with pytest.raises(OperatorError, match="does not depend on the weight"):
        clip([(made, 0.9)], constants, before / 0.9)


def test_a_sum_can_cancel_the_identity():
    """‖x + w∗x‖ ≤ 0.9 < ‖I‖ asks for a weight of about −0.1 in the middle, which scaling never finds."""
    made, constants, function = residual("sum")
    before = top(function, (4, 6, 6), constants)
    result = clip([(made, 0.9)], constants, before / 0.9)
    after = top(function, (4, 6, 6), result.values)
    assert 0.9 * (1 - 3e-4) <= after <= 0.9 * (1 + 1e-9)
    certified(result, 1.10)


# --- one weight, several uses ----------------------------------------------------------------------------------


def test_one_weight_at_two_places():
    weight = random(4, 4, 3, 3, seed=10)
    small = region([conv_node(SAME)], ["w"], (4, 4, 4), (4, 4, 4))
    strided = geometry(2, stride=2)
    large = region([conv_node(strided)], ["w"], (4, 9, 9), (4, 5, 5))

    def tops(w):
        w = w.double().numpy()
        sizes = (((4, 4), SAME), ((9, 9), strided))
        return [np.linalg.norm(conv_dense(w, size, g), 2) for size, g in sizes]

    before = tops(weight)
    limits = (0.7 * before[0], 0.65 * before[1])
    ratio = max(b / limit for b, limit in zip(before, limits, strict=True))
    result = clip([(small, limits[0]), (large, limits[1])], {"w": weight}, ratio, exact=True)
    assert len(result.problem.constraints) == 2
    after = [value / limit for value, limit in zip(tops(result.values["w"]), limits, strict=True)]
    assert 1 - 3e-4 <= max(after) <= 1 + 1e-9
    certified(result, 1.01)
    # Each alone is a relaxation: its lower bound is no higher than what both cost.
    for made, limit, b in zip((small, large), limits, before, strict=True):
        assert clip([(made, limit)], {"w": weight}, b / limit).projected.lower <= result.change


def test_both_levels_at_once():
    made, constants, function = conv_norm(seed=11)
    alone = region([made.nodes[0]], ["w"], (4, 7, 7), (6, 7, 7))
    plain = lambda x, values: F.conv2d(x, values["w"], padding=1)  # noqa: E731
    before = top(plain, (4, 7, 7), constants), top(function, (4, 7, 7), constants)
    limits = 0.8 * before[0], 0.7 * before[1]
    result = clip([(alone, limits[0]), (made, limits[1])], constants, 1 / 0.7, exact=True)
    after = (
        top(plain, (4, 7, 7), result.values) / limits[0],
        top(function, (4, 7, 7), result.values) / limits[1],
    )
    assert 1 - 3e-4 <= max(after) <= 1 + 1e-9
    certified(result, 1.01)


@pytest.mark.parametrize("gamma", [[0.0, 1.0, -2.0, 0.5], [0.0, 3.0, 1.0, 2.0]])
def test_a_channel_that_one_operator_hides_is_clipped_for_the_other(gamma):
    """Behind γ = 0 a change costs nothing folded; the row used to be held fast, and no weight obeyed."""
    made, constants, function = conv_norm((2, 4), 5, gamma=gamma)
    constants["w"][0] *= 4
    alone = region([conv_node(geometry())], ["w"], made.in_shape, made.out_shape)

    def tops(weights):
        plain = top(lambda x, values: F.conv2d(x, values["w"], None, 1, 1), made.in_shape, weights)
        return np.array([plain, top(function, made.in_shape, weights)])

    limits = 0.6 * tops(constants)
    result = clip([(alone, limits[0]), (made, limits[1])], constants, 1 / 0.6, exact=True)
    ratio = max(tops(result.values) / limits)
    assert 1 - 3e-4 <= ratio <= 1 + 1e-9
    assert result.projected.metric == "weights"
    certified(result, 1.01)
    moved = result.values["w"] - constants["w"]
    assert float(moved.norm() / constants["w"].norm()) == pytest.approx(result.change, rel=1e-6)
    assert result.change < 0.4


def test_one_weight_twice_in_a_row_is_not_called_convex():
    weight = random(6, 6, seed=12)
    made = region([linear_node("w", "x", "h"), linear_node("w", "h", "y")], ["w"], (6,), (6,))
    square = weight.double() @ weight.double()
    before = float(torch.linalg.matrix_norm(square, 2))
    result = clip([(made, 0.5 * before)], {"w": weight}, 2.0)
    after = result.values["w"].double()
    obeys(float(torch.linalg.matrix_norm(after @ after, 2)), 0.5 * before)
    assert result.projected.lower is None
    assert "not convex" in result.projected.note
    assert result.change <= (1 - 0.5**0.5) * (1 + 1e-4)


def test_one_weight_twice_side_by_side():
    weight = random(4, 4, 3, 3, seed=13)
    dilated = geometry(2, pad=2, dilation=2)
    nodes = [
        conv_node(SAME, "w", "x", "h"),
        conv_node(dilated, "w", "x", "i"),
        Node("y", Call("onnx.Add", {}, 14), ("h", "i"), ("y",)),
    ]
    made = region(nodes, ["w"], (4, 6, 6), (4, 6, 6))

    def function(x, values):
        w = values["w"]
        return F.conv2d(x, w, padding=1) + F.conv2d(x, w, padding=2, dilation=2)

    before = top(function, (4, 6, 6), {"w": weight})
    result = clip([(made, 0.8 * before)], {"w": weight}, 1 / 0.8, exact=True)
    obeys(top(function, (4, 6, 6), result.values), 0.8 * before)
    certified(result, 1.01)


def test_parts_of_a_fused_weight_are_clipped_apart():
    weight = random(12, 5, seed=14)
    parts = {
        f"w[{begin}:{begin + 4}]": Derived("w", (((begin, begin + 4),),), 0, (4, 5)) for begin in (0, 4, 8)
    }
    stored = {"w": weight}
    load = with_parts(stored.__getitem__, parts)
    writer = TracedWriter(load, lambda name: name if name in stored else None, lambda name: None, parts)
    values = [float(torch.linalg.matrix_norm(weight[i : i + 4].double(), 2)) for i in (0, 4, 8)]
    limit = sorted(values)[1] * 0.9  # two are above, one is not
    regions = [region([linear_node(name)], [name], (5,), (4,)) for name in parts]
    problems, refused = group([Constraint(r, limit) for r in regions], load, writer)
    assert len(problems) == 3
    assert not refused
    for problem, value in zip(problems, values, strict=True):
        if value <= limit:
            continue
        projected = solve(problem, value / limit, Options())
        made = store(problem, projected.weights, writer, lambda n: torch.float32, stored.__getitem__)
        stored.update(made.edits)
    for begin, value in zip((0, 4, 8), values, strict=True):
        now = stored["w"][begin : begin + 4]
        if value <= limit:
            assert torch.equal(now, weight[begin : begin + 4])
        else:
            obeys(float(torch.linalg.matrix_norm(now.double(), 2)), limit)


def test_what_has_no_way_back_is_refused_with_the_reason():
    made, constants, _ = conv_norm()
    writer = DictWriter({name: value for name, value in constants.items() if name != "w"})
    problems, refused = group([Constraint(made, 1.0)], constants.__getitem__, writer)
    assert not problems
    assert "cannot be written back" in refused[0]
    problems, refused = group([Constraint(made, 1.0)], constants.__getitem__, None)
    assert not problems
    assert "nothing can be written back" in refused[0]
