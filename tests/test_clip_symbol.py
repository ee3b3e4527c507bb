"""The projection on the symbol against dense matrices, closed forms and a brute-force line search."""

import math

import numpy as np
import pytest
import torch

from spectool.clip.bundle import bundle
from spectool.clip.family import Family
from spectool.clip.symbol import exact_grid, project_any_size, project_measured, project_symbol
from spectool.clip.symbol_map import SymbolMap, reduced_stride
from spectool.clip.symbol_solve import best_step
from spectool.errors import UsageError
from spectool.linear import ConvGeometry, ConvMap
from tests.dense import conv_matrix, conv_transpose_matrix


def geometry(dims=1, *, stride=1, pads=None, dilation=1, groups=1, mode="zeros", transposed=False):
    pads = ((0, 0),) * dims if pads is None else pads
    return ConvGeometry((stride,) * dims, pads, (dilation,) * dims, groups, mode, transposed, (0,) * dims)


def dense(weight, size, g):
    weight = np.asarray(weight, dtype=np.float64)
    if g.transposed:
        return conv_transpose_matrix(weight, size, g.stride, g.padding, g.dilation, g.groups)
    return conv_matrix(weight, size, g.stride, g.padding, g.dilation, g.groups, g.padding_mode)


def top(weight, size, g):
    return np.linalg.norm(dense(weight, size, g), 2)


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def onto_l1(rows, limit):
    """Project every row on the ball Σ|x| ≤ limit (sort and threshold)."""
    out = []
    for row in np.asarray(rows):
        if np.abs(row).sum() > limit:
            sizes = np.sort(np.abs(row))[::-1]
            excess = (np.cumsum(sizes) - limit) / np.arange(1, len(sizes) + 1)
            row = np.sign(row) * np.maximum(np.abs(row) - excess[sizes > excess][-1], 0)
        out.append(row)
    return np.array(out)


# --- the map ------------------------------------------------------------------------------------------------

CIRCULAR = [
    # shape, size, geometry
    ((3, 2, 3), (9,), geometry(pads=((1, 1),), mode="circular")),
    ((3, 2, 3), (8,), geometry(pads=((1, 1),), stride=2, mode="circular")),
    ((2, 2, 3), (8,), geometry(pads=((2, 2),), dilation=2, mode="circular")),
    ((2, 2, 3), (12,), geometry(pads=((2, 2),), dilation=2, stride=2, mode="circular")),
    ((2, 3, 3), (12,), geometry(pads=((4, 4),), dilation=4, stride=2, mode="circular")),
    ((2, 2, 2), (12,), geometry(pads=((2, 1),), dilation=3, stride=2, mode="circular")),
    ((4, 1, 3, 2), (6, 4), geometry(2, pads=((1, 1), (0, 1)), groups=2, mode="circular")),
    ((2, 2, 3, 3), (6, 4), geometry(2, pads=((1, 1), (1, 1)), stride=2, mode="circular")),
    ((3, 1, 5), (3,), geometry(pads=((2, 2),), mode="circular")),  # taps meet each other
]


@pytest.mark.parametrize("shape, size, g", CIRCULAR)
def test_exact_grid_has_the_norm_of_the_circular_operator(shape, size, g):
    weight = random(*shape)
    grid = exact_grid(g, size, shape[2:])
    assert grid is not None
    kernel = weight.reshape(g.groups, -1, *shape[1:])
    made = SymbolMap(kernel.shape, reduced_stride(g), grid)
    symbols = made.values(made.split(kernel)).numpy()
    truth = top(weight, size, g)
    assert np.linalg.norm(symbols, 2, axis=(2, 3)).max() == pytest.approx(truth, rel=1e-12)


def test_no_exact_grid_where_the_operator_is_not_circular():
    assert exact_grid(geometry(pads=((1, 1),)), (8,), (3,)) is None
    assert exact_grid(geometry(pads=((1, 1),), mode="reflect"), (8,), (3,)) is None
    assert exact_grid(geometry(pads=((0, 1),), mode="circular"), (8,), (3,)) is None  # an output is missing
    assert exact_grid(geometry(pads=((1, 1),), stride=2, mode="circular"), (9,), (3,)) is None


@pytest.mark.parametrize("stride, kernel", [((1,), (3,)), ((2,), (3,)), ((2, 3), (3, 2)), ((1, 2), (1, 5))])
def test_map_and_adjoint(stride, kernel):
    shape = (2, 3, 2, *kernel)
    made = SymbolMap(shape, stride, (5,) * len(stride), torch.full((1, len(stride)), 0.3))
    weight = random(*shape)
    components = made.split(weight)
    assert torch.equal(made.join(components), weight)
    symbols = made.forward(components)
    other = random(*symbols.shape, seed=1)
    back = made.join(made.adjoint(other))
    assert float((symbols * other).sum()) == pytest.approx(float((weight * back).sum()), rel=1e-12)
    # What the adjoint returns lies on the kernel's own taps.
    assert torch.allclose(made.split(back), made.adjoint(other), rtol=0, atol=0)


def test_best_step_is_the_global_minimum():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 4)) * 10.0 ** rng.integers(-3, 3, (200, 4))
    rows[:, 0] = -np.abs(rows[:, 0])
    rows[:, 3] = np.abs(rows[:, 3])
    steps = best_step(*torch.from_numpy(rows).T).numpy()
    for (a1, a2, a3, a4), step in zip(rows, steps, strict=True):
        roots = np.roots([4 * a4, 3 * a3, 2 * a2, a1])
        roots = roots[np.abs(roots.imag) < 1e-9 * np.abs(roots)].real
        worth = [np.polyval([a4, a3, a2, a1, 0.0], t) for t in roots[roots > 0]]
        assert np.polyval([a4, a3, a2, a1, 0.0], step) == pytest.approx(min(worth), rel=1e-6)
    assert float(best_step(*torch.tensor([[0.0], [1.0], [0.0], [1.0]]))) == 0.0


# --- closed forms -------------------------------------------------------------------------------------------


def test_two_taps_are_a_projection_on_the_l1_ball():
    """On an even grid max |a + b·e^{iθ}| = |a| + |b|: every group of a depthwise conv is such a projection."""
    weight = random(300, 1, 2)
    found = project_symbol(weight, geometry(groups=300), 1.2, grid=(8,), tol=1e-5, gap=1e-6)
    truth = onto_l1(weight[:, 0].numpy(), 1.2)
    assert found.weight[:, 0].numpy() == pytest.approx(truth, abs=2e-4)
    change = np.linalg.norm(truth - weight[:, 0].numpy())
    assert found.lower is not None
    assert change * (1 - 1e-4) <= found.lower <= change * (1 + 1e-12)
    obeys = np.abs(weight[:, 0].numpy()).sum(axis=1) < 1.2
    assert 20 < obeys.sum() < 280
    assert torch.equal(found.weight[obeys], weight[obeys])


@pytest.mark.parametrize(
    "shape, size, g",
    [
        ((3, 4, 5), (5,), geometry(pads=((2, 2),), mode="circular")),
        ((4, 3, 3, 3), (3, 3), geometry(2, pads=((1, 1), (1, 1)), mode="circular")),
        ((4, 2, 6), (6,), geometry(pads=((2, 2),), stride=2, mode="circular")),
    ],
)
def test_a_kernel_as_large_as_the_image_is_clipped_exactly(shape, size, g):
    """Then every shift-invariant matrix is a kernel, and clipping the singular values is the projection."""
    weight = random(*shape)
    matrix = dense(weight, size, g)
    limit = 0.6 * np.linalg.norm(matrix, 2)
    grid = exact_grid(g, size, shape[2:])
    if grid is None:  # padding (2, 2) for an even kernel: the same windows, one more of them
        grid = tuple(n // s for n, s in zip(size, g.stride, strict=True))
    found = project_symbol(weight, g, limit, grid=grid, tol=1e-5, gap=1e-5)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    nearest = (u * np.minimum(s, limit)) @ vt
    assert dense(found.weight, size, g) == pytest.approx(nearest, abs=3e-3 * limit)
    # Every tap occurs once per output position.
    change = np.linalg.norm(nearest - matrix) / math.sqrt(matrix.shape[0] / shape[0])
    assert found.lower is not None
    assert change * (1 - 1e-4) <= found.lower <= change * (1 + 1e-9)


def test_any_size_of_two_taps():
    weight = random(20, 1, 2)
    found = project_any_size(weight, geometry(groups=20), 1.0)
    truth = onto_l1(weight[:, 0].numpy(), 1.0)
    assert found.weight[:, 0].numpy() == pytest.approx(truth, abs=1e-2)
    assert np.abs(found.weight[:, 0].numpy()).sum(axis=1).max() <= 1.0
    assert found.lower is not None
    assert found.lower <= np.linalg.norm(truth - weight[:, 0].numpy()) * (1 + 1e-12)


# --- properties ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.95, 0.6, 0.1])
@pytest.mark.parametrize("shape, size, g", CIRCULAR[:8])
def test_circular_projections_obey_and_are_nearest(shape, size, g, fraction):
    weight = random(*shape, seed=3)
    limit = fraction * top(weight, size, g)
    grid = exact_grid(g, size, shape[2:])
    found = project_symbol(weight, g, limit, grid=grid)
    assert top(found.weight, size, g) <= limit * (1 + 1e-9)
    assert found.sup_on_grid == pytest.approx(top(found.weight, size, g), rel=1e-9)
    change = float(torch.linalg.vector_norm(found.weight - weight))
    assert found.lower is not None
    assert found.lower <= change <= 1.005 * found.lower
    assert change < (1 - fraction) * float(torch.linalg.vector_norm(weight)) * (
        1 + 1e-9
    )  # what scaling costs


def test_the_bound_holds_for_feasible_kernels_found_otherwise():
    """Kernels on segments from other feasible ones towards the start are no nearer than the bound."""
    weight, size = random(4, 3, 3), (10,)
    g = geometry(pads=((1, 1),), mode="circular")
    limit = 0.7 * top(weight, size, g)
    found = project_symbol(weight, g, limit, grid=(10,))
    assert found.lower is not None
    rng = np.random.default_rng(0)
    nearest = math.inf
    for _ in range(60):
        other = found.weight + 0.05 * torch.from_numpy(rng.standard_normal(weight.shape))
        other = other * min(1.0, limit / top(other, size, g))
        nearest = min(nearest, float(torch.linalg.vector_norm(other - weight)))
    assert found.lower <= nearest


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_units_do_not_matter(scale):
    weight = random(4, 3, 3)
    one = project_symbol(weight, geometry(), 2.0, grid=(12,))
    other = project_symbol(weight * scale, geometry(), 2.0 * scale, grid=(12,))
    assert one.lower is not None
    assert other.lower == pytest.approx(one.lower * scale, rel=1e-6)
    assert (other.weight / scale).numpy() == pytest.approx(one.weight.numpy(), abs=1e-6)


def test_a_kernel_that_obeys_is_not_touched():
    weight = random(8, 2, 3).to(torch.bfloat16)
    for found in (
        project_symbol(weight, geometry(groups=4), 100.0, grid=(8,)),
        project_any_size(weight, geometry(groups=4), 100.0),
        project_measured(weight, geometry(groups=4), 100.0, lambda w: 1.0),
    ):
        assert torch.equal(found.weight, weight.double())
        assert found.iterations == 0
    barely = project_symbol(weight, geometry(groups=4), 1e-3, grid=(8,))
    assert barely.sup_on_grid <= 1e-3 * (1 + 1e-9)


def test_barely_above_the_limit():
    weight, size = random(4, 3, 3), (10,)
    g = geometry(pads=((1, 1),), mode="circular")
    limit = top(weight, size, g) * (1 - 1e-5)
    found = project_symbol(weight, g, limit, grid=(10,))
    assert top(found.weight, size, g) <= limit * (1 + 1e-9)
    assert 0 < float(torch.linalg.vector_norm(found.weight - weight)) <= 1e-5 * float(weight.norm()) * 1.001


@pytest.mark.parametrize(
    "shape, g",
    [
        ((4, 3, 3), geometry()),
        ((3, 4, 4), geometry(stride=2, transposed=True)),
        ((4, 3, 3), geometry(stride=2, dilation=2)),
        ((4, 2, 3, 3), geometry(2)),
        ((6, 2, 3), geometry(groups=3, stride=2)),
        ((4, 3, 1), geometry()),
    ],
)
def test_any_size_holds_for_large_inputs(shape, g):
    weight = random(*shape, seed=5)
    size = (48,) if g.dims == 1 else (9, 9)
    limit = 0.7 * top(weight, size, g)
    found = project_any_size(weight, g, limit)
    reached = top(found.weight, size, g)
    assert 0.9 * limit < reached <= limit
    assert found.sup_on_grid <= limit
    change = float(torch.linalg.vector_norm(found.weight - weight))
    assert found.lower is not None
    assert found.lower <= change <= 1.05 * found.lower


def test_measured_reaches_the_limit_and_comes_near_the_bundle():
    weight, size, g = random(4, 4, 3, 3), (8, 8), geometry(2, pads=((1, 1), (1, 1)))
    for fraction, near in ((0.95, 1.25), (0.7, 1.06)):  # so small a map is not what the grid is for
        limit = fraction * top(weight, size, g)
        found = project_measured(weight, g, limit, lambda w: float(top(w, size, g)))
        assert found.lower is None
        assert top(found.weight, size, g) == pytest.approx(limit, rel=1e-9)
        family = Family(lambda w: ConvMap(w, (4, *size), g, dtype=torch.float64), weight)
        change = float(torch.linalg.vector_norm(found.weight - weight))
        lower = bundle(family, limit, gap=0.02).lower
        assert lower <= change * (1 + 1e-6)
        assert change <= near * lower


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_limits_that_cannot_be(limit):
    for project in (project_symbol, project_any_size):
        with pytest.raises(UsageError, match="positive number"):
            project(random(2, 2, 3), geometry(), limit)


@pytest.mark.parametrize(
    "shape, stride", [((1, 5, 4, 3, 3), (2, 1)), ((2, 3, 2, 5), (2,)), ((1, 4, 4, 3, 3), (1, 1))]
)
@pytest.mark.parametrize("tap_by_tap", [True, False])
def test_products_with_every_symbol(shape, stride, tap_by_tap, monkeypatch):
    monkeypatch.setattr(SymbolMap, "_tap_by_tap", lambda self, columns: tap_by_tap)
    made = SymbolMap(shape, stride, (6,) * len(stride))
    components = made.split(random(*shape))
    symbols = made.forward(components)
    left = random(shape[0], made.frequencies, 2 * made.sides[0], 3)
    right = random(shape[0], made.frequencies, made.sides[1], 3, seed=1)
    assert made.times(components, right).numpy() == pytest.approx((symbols @ right).numpy(), abs=1e-12)
    truth = symbols.mT @ left
    assert made.transposed_times(components, left).numpy() == pytest.approx(truth.numpy(), abs=1e-12)
    pulled = made.adjoint(left @ right.mT)
    assert made.pull(left, right).numpy() == pytest.approx(pulled.numpy(), abs=1e-12)


def test_a_kernel_of_trained_size_is_projected_on_the_exact_grid():
    """Large enough for the routes that small kernels do not take; truth by numpy's FFT."""
    rng = np.random.default_rng(0)
    flat = (np.linalg.qr(rng.standard_normal((72, 72)))[0] * np.arange(1, 73) ** -0.35) @ np.linalg.qr(
        rng.standard_normal((66 * 9, 72))
    )[0].T
    weight = torch.from_numpy(flat.reshape(72, 66, 3, 3))

    def norm(kernel):
        symbols = np.fft.fft2(kernel.numpy(), (10, 10)).transpose(2, 3, 0, 1)
        return np.linalg.norm(symbols, 2, axis=(2, 3)).max()

    limit = 0.8 * norm(weight)
    found = project_symbol(weight, geometry(2), limit, grid=(10, 10))
    assert norm(found.weight) <= limit * (1 + 1e-9)
    change = float(torch.linalg.vector_norm(found.weight - weight))
    assert found.lower is not None
    assert found.lower <= change <= 1.005 * found.lower
