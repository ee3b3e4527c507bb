"""Contracts of every map in ``cases.CASES``: shapes, entries, adjoint, linearity, precision, norm, scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, case_named, select
from dense import (
    adaptive_matrix,
    avgpool_matrix,
    conv_matrix,
    conv_transpose_matrix,
    upsample_matrix,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spectool.linear import (
    Adjoint,
    Composed,
    ConvGeometry,
    ConvMap,
    FunctionMap,
    LinearMap,
    adjoint,
    all_finite,
    dot_test,
    frobenius,
    normal_matvec,
    prescale,
    size,
    to_dense,
)

EVERY = pytest.mark.parametrize("case", CASES, ids=str)
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, b: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((b, *shape), generator=generator, dtype=torch.float64).to(dtype)


def flat(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().reshape(len(x), -1).numpy()


def rows_agree(got: torch.Tensor, expected: np.ndarray, size: float, tolerance: float) -> None:
    """Each row within ``tolerance·size``, where ``size`` bounds the norm of what was multiplied."""
    error = np.linalg.norm(flat(got) - expected, axis=1)
    assert error.max() <= tolerance * size


# --- every case -------------------------------------------------------------------------------------------


@EVERY
def test_names_and_shapes(case: Case) -> None:
    A = case.build()
    assert isinstance(A, LinearMap)
    assert size(A) == case.dense().shape == (math.prod(A.out_shape), math.prod(A.in_shape))
    for dtype in (torch.float32, torch.float64):
        B = A.to(dtype=dtype)
        for b in (1, 2):
            x = torch.zeros((b, *B.in_shape), dtype=dtype)
            y = B.matvec(x)
            assert (y.shape, y.dtype) == ((b, *B.out_shape), dtype)
            z = B.rmatvec(y)
            assert (z.shape, z.dtype) == ((b, *B.in_shape), dtype)
            assert not y.any(), "a bias got through"
            assert not z.any()
    assert all_finite(A)
    assert A.dtype == torch.float32, "`to` changed the map it was called on"


@EVERY
def test_dense_matrix(case: Case) -> None:
    expected = case.dense()
    got = to_dense(case.build()).numpy()
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-14 * np.abs(expected).max())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_forward_adjoint_and_normal(case: Case, dtype: torch.dtype) -> None:
    A, matrix = case.build().to(dtype=dtype), case.dense()
    norm = float(np.linalg.norm(matrix))
    x, y = random(A.in_shape, dtype), random(A.out_shape, dtype, seed=1)
    x_before, y_before = x.clone(), y.clone()
    image, back = A.matvec(x), A.rmatvec(y)
    x_norm, y_norm = (np.linalg.norm(flat(v), axis=1).max() for v in (x, y))
    tolerance = 4 * EPS[dtype] * (2 if "composed" not in case.tags else 8)
    rows_agree(image, flat(x) @ matrix.T, norm * x_norm, tolerance)
    rows_agree(back, flat(y) @ matrix, norm * y_norm, tolerance)
    assert dot_test(A) <= tolerance

    assert torch.equal(x, x_before), "matvec changed its argument"
    assert torch.equal(y, y_before), "rmatvec changed its argument"
    assert torch.equal(A.matvec(x), image), "a second application differs"
    assert torch.equal(A.rmatvec(y), back)

    alone = torch.cat([A.matvec(one[None]) for one in x])
    rows_agree(alone, flat(image), norm * x_norm, tolerance)
    alone = torch.cat([A.rmatvec(one[None]) for one in y])
    rows_agree(alone, flat(back), norm * y_norm, tolerance)

    if norm < 1e15 or dtype == torch.float64:  # else AᵀA leaves float32, which is what prescale is for
        rows_agree(
            normal_matvec(A, x), flat(x) @ matrix.T @ matrix, norm * norm * x_norm + 1e-37, 2 * tolerance
        )
        transposed = normal_matvec(adjoint(A), y)
        rows_agree(transposed, flat(y) @ matrix @ matrix.T, norm * norm * y_norm + 1e-37, 2 * tolerance)


@EVERY
def test_adjoint_is_a_map_and_undoes_itself(case: Case) -> None:
    A = case.build()
    T = adjoint(A)
    assert (T.in_shape, T.out_shape) == (A.out_shape, A.in_shape)
    assert T is A.inner if isinstance(A, Adjoint) else adjoint(T) is A
    expected = case.dense().T
    np.testing.assert_allclose(to_dense(T).numpy(), expected, rtol=1e-13, atol=1e-14 * np.abs(expected).max())


@EVERY
def test_frobenius_norm(case: Case) -> None:
    got = frobenius(case.build())
    if got is None:
        assert case.tags & {"function", "composed"}
    else:
        assert got == pytest.approx(np.linalg.norm(case.dense()), rel=1e-12, abs=0)


def test_frobenius_norm_of_compositions_that_fold() -> None:
    folding = [case for case in select("composed") if frobenius(case.build()) is not None]
    assert [case.name for case in folding] == [
        "composed conv and batch norm",
        "composed batch norm before a grouped conv",
        "composed transposed conv and batch norm",
    ]


@EVERY
def test_prescaled_map_is_a_power_of_two_away(case: Case) -> None:
    A = case.build()
    B, factor = prescale(A)
    assert math.frexp(factor)[0] == 0.5
    matrix = case.dense() / factor
    got = to_dense(B).numpy()
    np.testing.assert_allclose(got, matrix, rtol=1e-13, atol=1e-14 * np.abs(matrix).max())
    x = random(B.in_shape, torch.float32)
    image = B.rmatvec(B.matvec(x))
    assert image.dtype == torch.float32
    # Nothing overflowed or vanished, and what float32 computes is right to float32.
    scale = np.linalg.norm(matrix) ** 2 * np.linalg.norm(flat(x), axis=1).max()
    assert scale < 1e12
    rows_agree(image, flat(x) @ matrix.T @ matrix, scale, 32 * EPS[torch.float32])


# --- the definitions the truth is built from, against torch's own layers ----------------------------------


def of_layer(layer: object, in_shape: tuple[int, ...]) -> np.ndarray:
    basis = torch.eye(math.prod(in_shape), dtype=torch.float64).reshape(-1, *in_shape)
    return layer(basis).reshape(len(basis), -1).T.detach().numpy()  # type: ignore[operator]


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_dense_convolution_is_the_layer(mode: str) -> None:
    layer = torch.nn.Conv2d(
        4, 6, (3, 2), (2, 1), (2, 3), (1, 2), groups=2, bias=False, padding_mode=mode
    ).double()
    expected = of_layer(layer, (4, 5, 6))
    got = conv_matrix(
        layer.weight.detach().numpy(), (5, 6), (2, 1), ((2, 2), (3, 3)), (1, 2), groups=2, mode=mode
    )
    np.testing.assert_allclose(got, expected, atol=1e-15)


def test_dense_transposed_convolution_is_the_layer() -> None:
    layer = torch.nn.ConvTranspose2d(
        4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2, bias=False, dilation=(2, 1)
    )
    layer = layer.double()
    got = conv_transpose_matrix(
        layer.weight.detach().numpy(), (3, 4), (2, 3), ((1, 1), (0, 0)), (2, 1), 2, (1, 2)
    )
    np.testing.assert_allclose(got, of_layer(layer, (4, 3, 4)), atol=1e-15)


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("n", [7, 8, 9, 10])
def test_dense_pool_is_the_layer(n: int, ceil: bool, count: bool) -> None:
    layer = torch.nn.AvgPool2d(3, 2, 1, ceil_mode=ceil, count_include_pad=count)
    got = avgpool_matrix(2, (n, 8), (3, 3), (2, 2), (1, 1), ceil=ceil, count_include_pad=count)
    np.testing.assert_allclose(got, of_layer(layer, (2, n, 8)), atol=1e-15)


def test_dense_resizing_is_the_layer() -> None:
    expected = of_layer(lambda x: F.adaptive_avg_pool2d(x, (3, 4)), (2, 7, 10))
    np.testing.assert_allclose(adaptive_matrix(2, (7, 10), (3, 4)), expected, atol=1e-15)
    for mode, options in (
        ("nearest", {"mode": "nearest"}),
        ("linear", {"mode": "bilinear"}),
        ("corners", {"mode": "bilinear", "align_corners": True}),
    ):
        expected = of_layer(lambda x, o=options: F.interpolate(x, (9, 11), **o), (2, 6, 5))
        np.testing.assert_allclose(upsample_matrix(2, (6, 5), (9, 11), mode), expected, atol=1e-14)


# --- convolutions of any geometry -------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], ConvGeometry]:
    """A weight shape, an input shape and a geometry that torch would accept, up to cropping paddings."""
    dims = draw(st.integers(1, 3))
    groups, per_in, per_out = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    transposed = draw(st.booleans())
    mode = (
        "zeros"
        if transposed
        else draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    )
    n, kernel, stride, dilation, padding, extra = [], [], [], [], [], []
    for _ in range(dims):
        n.append(draw(st.integers(1, 12 // dims)))
        kernel.append(draw(st.integers(1, 4)))
        stride.append(draw(st.integers(1, 4)))
        dilation.append(draw(st.integers(1, 3)))
        limit = {"circular": n[-1], "reflect": n[-1] - 1}.get(mode, 5)
        low = -2 if mode == "zeros" else 0
        padding.append((draw(st.integers(low, limit)), draw(st.integers(low, limit))))
        extra.append(draw(st.integers(0, max(stride[-1], dilation[-1]) - 1)) if transposed else 0)
    first, second = (per_in * groups, per_out) if transposed else (per_out * groups, per_in)
    geometry = ConvGeometry(
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        mode,
        transposed,
        tuple(extra) if transposed else (),
    )
    return (first, second, *kernel), (per_in * groups, *n), geometry


@settings(max_examples=100, deadline=None, derandomize=True)
@given(convolutions())
def test_any_convolution(problem: tuple[tuple[int, ...], tuple[int, ...], ConvGeometry]) -> None:
    weight_shape, in_shape, g = problem
    out = g.output_size(in_shape[1:], weight_shape[2:])
    assume(min(out) >= 1 and math.prod(out) * math.prod(in_shape[1:]) <= 20_000)
    weight = random(weight_shape[1:], torch.float64, b=weight_shape[0])
    if g.transposed:
        expected = conv_transpose_matrix(
            weight.numpy(), in_shape[1:], g.stride, g.padding, g.dilation, g.groups, g.output_padding
        )
    else:
        expected = conv_matrix(
            weight.numpy(), in_shape[1:], g.stride, g.padding, g.dilation, g.groups, g.padding_mode
        )
    for dtype in (torch.float64, torch.float32):
        A = ConvMap(weight, in_shape, g, dtype=dtype)
        m, n = expected.shape
        assert size(A) == (m, n)
        tolerance = 4 * EPS[dtype] * max(np.linalg.norm(expected), 1e-3)
        forward = A.matvec(torch.eye(n, dtype=dtype).reshape(n, *A.in_shape))
        backward = A.rmatvec(torch.eye(m, dtype=dtype).reshape(m, *A.out_shape))
        np.testing.assert_allclose(flat(forward), expected.T, atol=tolerance)
        np.testing.assert_allclose(flat(backward), expected, atol=tolerance)
    assert frobenius(A) == pytest.approx(np.linalg.norm(expected), rel=1e-12)


# --- known values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, values",
    [
        ("conv1d circular 2 7 -1", {0: 8.0056336379, -1: 6.0}),
        (
            "conv2d reference circular",
            {
                0: 22.91221348,
                1: 22.91221348,
                2: 22.73452631,
                3: 22.73452631,
                4: 22.59309063,
                -1: 0.1548414175,
            },
        ),
        (
            "conv2d reference zeros",
            {0: 22.72753302, 1: 22.72744344, 2: 22.4144093, 3: 22.4144085, 4: 22.22151133},
        ),
        ("conv2d reference stride 2", {0: 13.81511119, 1: 13.81419628, 2: 13.79273318}),
        ("conv2d reference valid", {0: 22.67943198, 1: 22.67933422, 2: 22.31291351}),
        ("conv2d reference dilation 2", {0: 22.00672288, 1: 22.00672288, 2: 22.00672288}),
        ("conv2d box zeros", {0: 8.8664689165}),
        ("conv2d box reflect", {0: 9.3307827417}),
        ("conv2d box replicate", {0: 9.0}),
        ("conv2d binomial", {0: 15.821792221373}),
        ("conv2d laplacian", {0: 7.955323304901}),
    ],
)
def test_reference_values(name: str, values: dict[int, float]) -> None:
    sigma = np.linalg.svd(to_dense(case_named(name).build()).numpy(), compute_uv=False)
    for index, value in values.items():
        assert sigma[index] == pytest.approx(value, rel=1e-9)


def test_whole_spectra_that_are_products_and_sums() -> None:
    angles = np.cos(np.arange(1, 21) * np.pi / 21)
    product = np.sort(np.abs(np.outer(2 + 2 * angles, 2 + 2 * angles)).ravel())[::-1]
    sigma = np.linalg.svd(to_dense(case_named("conv2d binomial").build()).numpy(), compute_uv=False)
    np.testing.assert_allclose(sigma, product, atol=1e-12)
    total = np.sort(np.abs(np.add.outer(2 - 2 * angles, 2 - 2 * angles)).ravel())[::-1]
    sigma = np.linalg.svd(to_dense(case_named("conv2d laplacian").build()).numpy(), compute_uv=False)
    np.testing.assert_allclose(sigma, total, atol=1e-12)


def test_prescribed_spectra_are_what_they_say() -> None:
    sigma = case_named("linear 12-fold cluster 1e-8 apart").sigma()
    np.testing.assert_allclose(sigma[:12], 1 - 1e-8 * np.arange(12), atol=1e-14)
    assert np.diff(sigma[:12]).max() < -0.9e-8
    assert np.ptp(case_named("linear 12-fold exact").sigma()[:12]) < 1e-14


@pytest.mark.parametrize("case", select("function"), ids=str)
def test_functions_by_either_recording(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = case.dense()
    for entries in (0, 1 << 62):
        monkeypatch.setattr("spectool.linear.function._TRACED_ENTRIES", entries)
        A = case.build()
        assert isinstance(A, FunctionMap)
        basis = torch.eye(expected.shape[1]).reshape(-1, *A.in_shape)
        pushes = []
        for _ in range(11):
            image = A.matvec(basis)
            pushes.append(A._forward[len(basis)][0])
        assert pushes[7] is pushes[0]
        assert (pushes[8] is not pushes[0]) == (entries == 0), (
            "the ninth application is the first that is traced"
        )
        np.testing.assert_allclose(flat(image).T, expected, atol=4e-7 * np.abs(expected).max())


def test_a_large_bias_leaves_no_trace() -> None:
    case = case_named("function conv with a bias of 1e6")
    A = case.build()
    x = random(A.in_shape, torch.float32)
    naive = A.function(x) - A.function(torch.zeros_like(x))  # type: ignore[attr-defined]
    exact = flat(x) @ case.dense().T
    assert np.abs(flat(naive) - exact).max() > 1e-2, "the case does not show what it is for"
    assert np.abs(flat(A.matvec(x)) - exact).max() < 1e-5


def test_composition_is_the_product_of_what_it_is_made_of() -> None:
    A = case_named("composed depthwise, batch norm, pointwise").build()
    assert isinstance(A, Composed)
    product = np.linalg.multi_dot([to_dense(part).numpy() for part in A.maps])
    np.testing.assert_allclose(to_dense(A).numpy(), product, atol=1e-13)
