"""The pieces of the exact projection: interior point, leading triplets, bundle, gradients, roundings, proofs.

The truths are numpy, scipy's optimisers on the definition, and Dykstra's alternating projections.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clip_tools import DictWriter, clip, conv_dense, conv_node, geometry, linear_node, region
from scipy.optimize import minimize

from spectool.clip import Constraint, Problem, bundle, prove_limit, store
from spectool.clip.family import ConvFamily, Family, MatrixFamily, SumFamily
from spectool.clip.interior import minimise, smat, svec
from spectool.clip.leading import leading
from spectool.clip.rounding import _neighbour, repaired
from spectool.errors import OperatorError
from spectool.graph.types import Call, Node
from spectool.linear import ConvMap, MatrixMap
from spectool.lower import lower
from spectool.spectrum import svds

DOUBLE = torch.float64


def random(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def family(weight, size, g):
    return ConvFamily(weight, (weight.shape[1] * g.groups, *size), g)


# --- the small programme ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize(("p", "n"), [(1, 3), (2, 2), (3, 20), (8, 5), (8, 200), (20, 30), (20, 400)])
def test_interior_point_meets_the_optimality_conditions(p, n, extra):
    t = p * (p + 1) // 2
    images = random(t + extra, n, seed=p + n)
    # b = X·z − (positive definite): bounded, and some of Y is zero at the optimum.
    linear = images @ random(n, seed=1) * 3
    linear -= torch.cat([svec(torch.eye(p, dtype=DOUBLE)), torch.ones(extra, dtype=DOUBLE)]) * (0.5 + p)
    gram = images @ images.T
    found = [minimise(gram, linear, p), minimise(gram, linear, p, images=images)]
    for y in found:
        slack = gram @ y - linear
        value = 0.5 * float(y @ (slack - linear))
        floor = -1e-6 * float(linear.abs().max())
        assert np.linalg.eigvalsh(smat(y[:t], p).numpy())[0] >= 0
        assert np.linalg.eigvalsh(smat(slack[:t], p).numpy())[0] >= floor
        assert float(y[t:].sum()) >= 0
        assert float(slack[t:].sum()) >= floor
        assert abs(float(y @ slack)) <= 1e-6 * abs(value) + 1e-20
    assert torch.allclose(gram @ found[0], gram @ found[1], rtol=1e-3, atol=1e-3 * float(linear.abs().max()))


def test_svec_keeps_inner_products():
    a, b = random(5, 5), random(5, 5, seed=1)
    a, b = a + a.T, b + b.T
    assert float(svec(a) @ svec(b)) == pytest.approx(float((a * b).sum()))
    assert torch.equal(smat(svec(a), 5), a) or torch.allclose(smat(svec(a), 5), a, atol=1e-15)


# --- leading triplets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [[5, 4, 3, 2, 1], [2, 2, 2, 2, 2, 2, 1], [1, 1e-9], [0, 0, 0], [1, 1 - 1e-9]]
)
def test_leading_values_are_those_of_the_svd(values):
    u, v = (
        np.linalg.qr(random(30, len(values)).numpy())[0],
        np.linalg.qr(random(20, len(values), seed=1).numpy())[0],
    )
    A = MatrixMap(torch.from_numpy(u * np.asarray(values, dtype=float) @ v.T), dtype=DOUBLE)
    found = leading(A, 4, torch.Generator().manual_seed(0), tol=1e-9)
    wanted = np.pad(np.asarray(values, dtype=float), (0, 4))[:4]
    assert np.allclose(found.values.numpy(), wanted, atol=1e-7)
    moved = A.matvec(found.right)
    assert torch.allclose(moved, found.values[:, None] * found.left, atol=1e-12)


@pytest.mark.parametrize("mode", ["circular", "zeros"])
def test_a_round_sees_what_its_warm_start_cannot_reach(mode):
    """Frequencies of a circular convolution never mix: the pairs of some do not lead to others (was 8 % too far)."""
    g = geometry(1, pad=1, mode=mode) if mode == "zeros" else geometry(1, pad=2, mode=mode)
    weight = random(4, 4, 4 if mode == "zeros" else 5, seed=4)
    for level in (0.8, 0.5):
        top = np.linalg.norm(conv_dense(weight.numpy(), (20,), g), 2)
        made = bundle(family(weight, (20,), g), level * top, gap=0.007)
        after = np.linalg.norm(conv_dense(made.weight.numpy(), (20,), g), 2)
        assert after <= level * top * (1 + 5e-4)
        assert float((made.weight - weight).norm()) <= 1.01 * made.lower


# --- the projection against optimisers -------------------------------------------------------------------------


def cosine_optimum(weight, n, limit):
    """The nearest three-tap circular kernel by SLSQP on |Σ wₖ e^{ikθ}|² ≤ c² at every frequency."""
    waves = np.exp(2j * np.pi * np.outer(np.arange(n // 2 + 1), np.arange(len(weight))) / n)

    def room(w):
        return limit**2 - np.abs(waves @ w) ** 2

    def slope(w):
        return -2 * np.real(np.conj(waves @ w)[:, None] * waves)

    start = weight * limit / np.abs(waves @ weight).max()
    found = minimize(
        lambda w: 0.5 * ((w - weight) ** 2).sum(),
        start,
        jac=lambda w: w - weight,
        constraints={"type": "ineq", "fun": room, "jac": slope},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    assert room(found.x).min() >= -1e-9
    return float(np.linalg.norm(found.x - weight))


@pytest.mark.parametrize("level", [0.95, 0.6, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_one_channel_circular_kernels_against_slsqp(seed, level):
    weight, n = random(1, 1, 3, seed=seed), 12
    g = geometry(1, pad=1, mode="circular")
    top = np.linalg.norm(conv_dense(weight.numpy(), (n,), g), 2)
    best = cosine_optimum(weight.numpy().ravel(), n, level * top)
    made = bundle(family(weight, (n,), g), level * top, gap=1e-4)
    assert made.lower <= best * (1 + 1e-7)
    assert float((made.weight - weight).norm()) == pytest.approx(best, rel=1e-3)
    alone = region([conv_node(g)], ["w"], (1, n), (1, n))
    stored = clip([(alone, level * top)], {"w": weight}, 1 / level)  # by the symbol
    assert stored.projected.lower * float(weight.norm()) <= best * (1 + 1e-7)
    assert stored.change * float(weight.norm()) <= best * 1.1


def simplex_optimum(weight, size, g, limit):
    """The nearest kernel by Nelder–Mead on what scaling makes feasible: never nearer than the nearest."""

    def feasible(w):
        top = np.linalg.norm(conv_dense(w.reshape(weight.shape), size, g), 2)
        return w * min(1.0, limit / top)

    def cost(w):
        return float(np.linalg.norm(feasible(w) - weight.ravel()))

    best = weight.ravel()
    for _ in range(4):
        options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 1500, "adaptive": True}
        best = minimize(cost, best, method="Nelder-Mead", options=options).x
    return cost(best)


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((1, 1, 3), (8,), {}),
        ((1, 1, 3), (7,), {"stride": 2}),
        ((1, 2, 2), (5,), {"mode": "replicate"}),
        ((2, 1, 2), (5,), {"transposed": True}),
        ((1, 1, 2, 2), (4, 4), {"mode": "reflect"}),
    ],
    ids=["zeros", "stride 2", "replicate", "transposed", "reflect"],
)
def test_small_kernels_against_a_simplex_search(shape, size, options):
    weight, g = random(*shape, seed=5), geometry(len(size), **options)
    limit = 0.7 * np.linalg.norm(conv_dense(weight.numpy(), size, g), 2)
    best = simplex_optimum(weight.numpy(), size, g, limit)
    channels = shape[0] if g.transposed else shape[1]
    made = bundle(ConvFamily(weight, (channels, *size), g), limit, gap=1e-3)
    assert made.lower <= best * (1 + 1e-9)
    assert float((made.weight - weight).norm()) <= best * (1 + 2e-3)


def test_many_channels_against_dykstra():
    """Alternating projections in the frequency domain, with Dykstra's correction, converge to the nearest kernel."""
    n, weight = 6, random(3, 3, 3, 3, seed=6)
    g = geometry(2, mode="circular")
    limit = 0.7 * np.linalg.norm(conv_dense(weight.numpy(), (n, n), g), 2)
    full = np.zeros((3, 3, n, n))
    full[:, :, :3, :3] = weight.numpy()
    x, correction = full.copy(), np.zeros_like(full)
    for _ in range(1500):
        symbol = np.fft.fft2(x + correction).transpose(2, 3, 0, 1)
        u, s, v = np.linalg.svd(symbol)
        clipped = np.fft.ifft2(((u * s.clip(max=limit)[..., None, :]) @ v).transpose(2, 3, 0, 1)).real
        correction = x + correction - clipped
        x = np.zeros_like(full)
        x[:, :, :3, :3] = clipped[:, :, :3, :3]
    top = np.linalg.norm(conv_dense(x[:, :, :3, :3], (n, n), g), 2)
    feasible = x[:, :, :3, :3] * min(1.0, limit / top)
    best = float(np.linalg.norm(feasible - weight.numpy()))
    made = bundle(family(weight, (n, n), g), limit, gap=2e-3)
    assert made.lower <= best
    assert float((made.weight - weight).norm()) <= best * (1 + 3e-3)


def test_the_bound_holds_for_random_feasible_weights():
    g, size = geometry(2, stride=2), (7, 7)
    weight = random(5, 4, 3, 3, seed=7)
    limit = 0.6 * np.linalg.norm(conv_dense(weight.numpy(), size, g), 2)
    made = bundle(family(weight, size, g), limit)
    for seed in range(100):
        other = made.weight + random(*weight.shape, seed=seed) * float(made.weight.std()) * 10 ** -(seed % 5)
        top = np.linalg.norm(conv_dense(other.numpy(), size, g), 2)
        other = other * min(1.0, limit / top)
        assert float((other - weight).norm()) >= made.lower * (1 - 1e-9)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"mode": "circular"}, {"transposed": True}])
def test_the_bound_of_tiny_limits_holds(options):
    g, size = geometry(2, **options), (6, 6)
    weight = random(3, 3, 3, 3, seed=8)
    dense = conv_dense(weight.numpy(), size, g)
    for level in (0.3, 0.1, 1e-3):
        limit = level * np.linalg.norm(dense, 2)
        made = family(weight, size, g)
        exact = bundle(made, limit, gap=0.01)
        assert made.floor(limit) <= float((exact.weight - weight).norm())
    assert made.floor(limit) >= 0.99 * float(weight.norm())


# --- gradients -------------------------------------------------------------------------------------------------


def families():
    conv = geometry(2, stride=2)
    up = geometry(1, stride=2, transposed=True)
    single = MatrixFamily(random(4, 3), (2, 5), transposed=True, factor=-1.5)
    return {
        "conv": family(random(3, 2, 3, 3), (5, 6), conv),
        "transposed": ConvFamily(random(3, 2, 3), (3, 5), up),
        "positions": single,
        "sum": SumFamily([ConvFamily(random(2, 2, 3), (2, n), geometry(1)) for n in (5, 8)], [0.5, 2.0]),
    }


@pytest.mark.parametrize("name", families())
def test_pairs_are_the_gradients(name):
    made = families()[name]
    A = made.at(made.start)
    left, right = random(4, *A.out_shape), random(4, *A.in_shape, seed=1)
    by_definition = Family.pairs(made, left, right)
    assert torch.allclose(made.pairs(left, right), by_definition, atol=1e-12)
    one = made.pull(left[:1], right[:1]).flatten()
    assert torch.allclose(one, by_definition[0], atol=1e-12)
    # ⟨L*(uvᵀ), w⟩ = ⟨u, A(w)v⟩.
    assert float(one @ made.start.flatten()) == pytest.approx(float((A.matvec(right[:1]) * left[:1]).sum()))


# --- storage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_neighbours_are_the_next_numbers(kind):
    values = torch.tensor([0.0, 1.0, -1.0, 0.1, -0.1, 2.0, 1e-7, -3.0]).to(kind)
    up, down = _neighbour(values, torch.ones(8)), _neighbour(values, -torch.ones(8))
    assert bool((up > values).all())
    assert bool((down < values).all())
    assert torch.equal(_neighbour(values, torch.zeros(8)), values)
    # Nothing lies in between: the middle rounds to one of the two.
    for other in (up, down):
        middle = (0.5 * (values.double() + other.double())).to(kind)
        assert bool(((middle == values) | (middle == other)).all())
    if kind == torch.float16:
        assert np.array_equal(up.numpy()[1:], np.nextafter(values.numpy(), np.float16(np.inf))[1:])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_repaired_roundings_obey_where_a_cast_does_not(kind, seed):
    g, size = geometry(2), (6, 6)
    weight = random(5, 4, 3, 3, seed=seed)
    alone = region([conv_node(g)], ["w"], (4, *size), (5, *size))
    limit = 0.7 * np.linalg.norm(conv_dense(weight.numpy(), size, g), 2)
    wanted = bundle(family(weight, size, g), limit, gap=1e-3).weight
    wanted = wanted * (limit / np.linalg.norm(conv_dense(wanted.numpy(), size, g), 2))
    problem = Problem((Constraint(alone, limit),), ("w",), {"w": weight}.__getitem__)
    fixed = repaired(problem, {"w": wanted}, kind)["w"]
    cast = wanted.to(kind)
    off = [np.linalg.norm(conv_dense(w.double().numpy(), size, g), 2) / limit for w in (cast, fixed)]
    assert off[1] <= 1 + 1e-6
    assert off[1] > 1 - torch.finfo(kind).eps
    if off[0] > 1 + 1e-6:
        assert off[1] < off[0]
    moved = [float((w.double() - wanted).norm()) for w in (cast, fixed)]
    assert moved[1] <= 1.5 * moved[0]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(7, 7), (10, 5)])
def test_a_proven_limit_can_be_proven(kind, size):
    g = geometry(2)
    weight = random(5, 4, 3, 3, seed=9).to(kind)
    alone = region([conv_node(g)], ["w"], (4, *size), (5, *size))
    limit = 0.6 * np.linalg.norm(conv_dense(weight.double().numpy(), size, g), 2)
    made = clip([(alone, limit)], {"w": weight}, 1 / 0.6)
    writer, load = DictWriter({"w": weight}), {"w": weight}.__getitem__
    proven = prove_limit(made.problem, made.projected.weights, made.stored, writer, lambda name: kind, load)
    stored = proven.edits["w"]
    assert stored.dtype == kind
    check = svds(lower(alone, {"w": stored}.__getitem__), 1, certify=True, seed=5)
    assert check.upper[0] <= limit
    assert check.upper_kind not in ("probabilistic", "none")
    after = np.linalg.norm(conv_dense(stored.double().numpy(), size, g), 2)
    assert 0.9 * limit <= after <= limit


def test_store_brings_what_is_off_back_to_the_limit():
    weight = random(6, 6, dtype=torch.float32)
    alone = region([linear_node()], ["w"], (6,), (6,))
    limit = 0.5 * float(torch.linalg.matrix_norm(weight.double(), 2))
    problem = Problem((Constraint(alone, limit),), ("w",), {"w": weight}.__getitem__)
    for factor in (1.01, 0.97, 1.0):
        wanted = weight.double() * 0.5 * factor
        made = store(
            problem,
            {"w": wanted},
            DictWriter({"w": weight}),
            lambda n: torch.float32,
            {"w": weight}.__getitem__,
        )
        after = float(torch.linalg.matrix_norm(made.edits["w"].double(), 2))
        assert limit * (1 - 3e-4) <= after <= limit * (1 + 1e-9)


def test_a_bundle_of_nothing_to_do_returns_the_start():
    weight = random(3, 3, 3, seed=10)
    made = bundle(family(weight, (9,), geometry(1)), 1e6)
    assert torch.equal(made.weight, weight)
    assert made.lower == 0.0
    assert made.iterations == 0


def test_a_bundle_says_when_no_weight_will_do():
    nodes = [
        conv_node(geometry(1), "w", "x", "h"),
        Node("y", Call("onnx.Concat", {"axis": 1}, 13), ("x", "h"), ("y",)),
    ]
    made = region(nodes, ["w"], (2, 6), (4, 6))
    with pytest.raises(OperatorError, match="does not depend on the weight"):
        clip([(made, 0.5)], {"w": random(2, 2, 3)}, 4.0)


def test_maps_that_do_not_come_in_float64_are_still_bounded():
    """Large operators are projected in float32: the result still obeys once stored."""
    g, size = geometry(2), (16, 16)
    weight = random(6, 6, 3, 3, seed=11, dtype=torch.float32)
    limit = 0.8 * np.linalg.norm(conv_dense(weight.double().numpy(), size, g), 2)
    made = bundle(ConvFamily(weight, (6, *size), g), limit, gap=0.01)
    found = leading(
        ConvMap(made.weight.double(), (6, *size), g, dtype=DOUBLE), 6, torch.Generator(), tol=1e-6
    )
    assert made.weight.dtype == torch.float32
    assert float(found.values[0]) <= limit * (1 + 5e-4)
    assert float((made.weight - weight).norm()) <= 1.01 * made.lower
