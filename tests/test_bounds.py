"""Every upper bound: holds, is as tight as it is said to be, and is named for what proves it."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from dense import Matrix, conv_matrix, conv_transpose_matrix

from spectool.errors import OperatorError, UsageError
from spectool.linear import (
    Composed,
    ConvGeometry,
    ConvMap,
    DiagonalMap,
    InfiniteConv,
    MatrixMap,
    padding_matrix,
)
from spectool.spectrum import bounds as bounds_module
from spectool.spectrum import supremum, svds
from spectool.spectrum.any_size import any_size, enclose_supremum
from spectool.spectrum.bounds import deterministic, stencil_bound
from spectool.spectrum.cholesky import proven_bound
from spectool.spectrum.padding import padding_norm, unpadded
from spectool.spectrum.periodic import grid_levels, periods, symbol_levels
from spectool.spectrum.stencil import split, stencil_of
from spectool.spectrum.symbol import LARGE_SIDE, polynomial


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def geometry(
    dims: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1, mode: str = "zeros"
):
    return ConvGeometry((stride,) * dims, ((padding, padding),) * dims, (dilation,) * dims, groups, mode)  # type: ignore[arg-type]


def conv(weight: torch.Tensor, size: tuple[int, ...], **options: object) -> ConvMap:
    g = geometry(len(size), **options)  # type: ignore[arg-type]
    return ConvMap(weight, (weight.shape[1] * g.groups, *size), g)


def sigma_of(A: ConvMap) -> Matrix:
    g = A.geometry
    make = conv_transpose_matrix if g.transposed else conv_matrix
    last = g.output_padding if g.transposed else g.padding_mode
    matrix = make(A.weight.double().numpy(), A.in_shape[1:], g.stride, g.padding, g.dilation, g.groups, last)  # type: ignore[operator]
    return np.linalg.svd(matrix, compute_uv=False)


def symbol_of(A: ConvMap, k: int = 1) -> Matrix:
    whole = stencil_of(A)
    assert whole is not None
    return stencil_bound(whole, k).expand(k)[2]


# --- symbol on a finite grid ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size", "options", "excess"),
    [
        ((1, 1, 5), (300,), {"padding": 2}, 5e-5),
        ((2, 2, 3), (100,), {"padding": 1}, 1e-3),
        ((1, 1, 3, 3), (18, 18), {"padding": 1}, 1.5e-2),
        ((3, 3, 3, 3), (14, 14), {"padding": 1}, 2.5e-2),
        ((8, 8, 3, 3), (7, 7), {"padding": 1}, 1e-1),
        ((4, 3, 7, 7), (14, 14), {"padding": 3, "stride": 2}, 1e-1),
    ],
)
def test_symbol_bound_is_tight(
    shape: tuple[int, ...], size: tuple[int, ...], options: dict[str, int], excess: float
) -> None:
    for seed in range(3):
        A = conv(gaussian(*shape, seed=seed), size, **options)
        truth, bound = float(sigma_of(A)[0]), float(symbol_of(A)[0])
        assert truth * (1 - 1e-12) <= bound <= truth * (1 + excess)


def test_smallest_period_cannot_be_smaller() -> None:
    """With one position less the periodic operator identifies pixels, and its values stop being bounds."""
    broken = 0
    for seed in range(40):
        A = conv(gaussian(2, 2, 3, seed=seed), (5,), padding=1 + seed % 2, stride=1 + seed % 3 // 2)
        whole = stencil_of(A)
        assert whole is not None
        ((part, _),) = split(whole)
        symbol, truth = polynomial(part.weight, part.stride), sigma_of(A)
        valid = grid_levels(symbol, periods(part), len(truth)).expand(len(truth))[2]
        short = grid_levels(symbol, periods(part, -1), len(truth)).expand(len(truth))[2]
        assert (truth <= valid * (1 + 1e-12)).all()
        broken += bool((truth > short * (1 + 1e-9)).any())
    assert broken >= 10


def test_every_larger_period_is_valid_and_the_smallest_bound_counts() -> None:
    A = conv(gaussian(3, 3, 3, 3), (6, 9), padding=1)
    whole, truth = stencil_of(A), sigma_of(A)
    assert whole is not None
    ((part, _),) = split(whole)
    single = [symbol_levels(part, 20).upper]
    symbol = polynomial(part.weight, part.stride)
    for extra in (1, 2, 5, 40):
        single.append(grid_levels(symbol, periods(part, extra), 20).expand(20)[2])
        assert (truth[:20] <= single[-1] * (1 + 1e-12)).all()
    assert np.array_equal(symbol_levels(part, 20, tries=3).upper, np.minimum.reduce(single[:3]))


@pytest.mark.parametrize("channels", [1, 2, 3, LARGE_SIDE, LARGE_SIDE + 9])
@pytest.mark.parametrize("stride", [1, 2])
def test_grid_values_are_those_of_the_circulant(channels: int, stride: int) -> None:
    """The symbol with its Cholesky tests, against an FFT of the kernel and an SVD per frequency."""
    weight = gaussian(channels, channels, 3, 3, seed=channels)
    grid, k = (4, 3), 40
    levels = grid_levels(polynomial(weight[None], (stride, stride)), grid, k)
    n = tuple(size * stride for size in grid)
    spectrum = np.fft.fft2(weight.double().numpy(), n)
    phases = [
        spectrum[..., a * grid[0] : (a + 1) * grid[0], b * grid[1] : (b + 1) * grid[1]]
        for a in range(stride)
        for b in range(stride)
    ]
    # Decimation in space is folding in frequency: one matrix (out × in·s²) per frequency, divided by s.
    folded = np.concatenate(phases, axis=1) / stride
    truth = np.sort(np.linalg.svd(np.moveaxis(folded, (0, 1), (2, 3)), compute_uv=False).ravel())[::-1]
    values, lower, upper = levels.expand(min(k, len(truth)))
    slack = 1e-12 * truth[0]
    assert np.abs(values - truth[: len(values)]).max() <= slack
    assert (lower <= truth[: len(lower)] + slack).all()
    assert (truth[: len(upper)] <= upper + slack).all()
    assert (upper - lower).max() <= 1e-7 * truth[0]


def test_symbol_bound_of_groups_is_that_of_the_worst_group() -> None:
    weight = gaussian(6, 2, 3, 3)
    own = [symbol_of(conv(weight[2 * g : 2 * g + 2], (9, 9), padding=1))[0] for g in range(3)]
    assert symbol_of(conv(weight, (9, 9), padding=1, groups=3))[0] == pytest.approx(max(own), rel=1e-12)


def test_symbol_bound_at_every_scale() -> None:
    weight = gaussian(4, 4, 3, 3).double()
    plain = symbol_of(conv(weight, (9, 9), padding=1))[0]
    for scale in (1e-30, 1e25):
        assert symbol_of(conv(weight * scale, (9, 9), padding=1))[0] == pytest.approx(
            plain * scale, rel=1e-12
        )
    for scale in (1e-200, 1e200):
        found = svds(conv(weight * scale, (20, 20), padding=1), 1, certify=True, method="lanczos")
        assert found.upper_kind == "symbol"
        assert found.lower[0] <= found.upper[0] <= found.lower[0] * 1.02


# --- symbol for any size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taps", "stride", "dilation", "truth"),
    [
        ([1, -1], 1, 1, 2.0),
        ([1, 1], 2, 1, math.sqrt(2)),
        ([1, 1], 2, 2, 2.0),
        ([1, 1], 4, 2, math.sqrt(2)),
        ([1, 1], 3, 2, math.sqrt(2)),
        ([1, 2, 1], 1, 7, 4.0),
        ([0, 1, 2, 1, 0, 0], 1, 1, 4.0),
        ([3], 5, 1, 3.0),
        ([1, 0, 1], 2, 1, 2.0),
    ],
)
def test_supremum_of_small_kernels(taps: list[float], stride: int, dilation: int, truth: float) -> None:
    weight = torch.tensor([[taps]], dtype=torch.float64)
    found = supremum(InfiniteConv(weight, geometry(1, stride=stride, dilation=dilation)))
    assert found.lower[0] <= truth * (1 + 1e-15) <= found.upper[0] * (1 + 1e-15)
    assert found.upper[0] == pytest.approx(truth, rel=1.1e-6)
    assert found.converged
    assert found.upper_kind == "symbol-any-size"
    assert len(found.values) == 1
    assert found.matvecs == 0


@pytest.mark.parametrize(
    "shape", [(1, 1, 7), (3, 2, 4), (2, 2, 3, 3), (1, 1, 5, 2), (2, 3, 2, 2, 2), (28, 26, 3, 3)]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_supremum_against_a_fine_grid(shape: tuple[int, ...], stride: int) -> None:
    """A grid of M points per axis misses the supremum by at most cos(πd/M) per axis, and never exceeds it."""
    weight, dims = gaussian(*shape), len(shape) - 2
    grid = {1: 4096, 2: 128 if shape[0] < 20 else 24, 3: 32}[dims]
    spectrum = np.fft.fftn(weight.double().numpy(), (grid * stride,) * dims, axes=range(2, 2 + dims))
    for axis in range(2, 2 + dims):
        spectrum = np.concatenate(np.split(spectrum, stride, axis=axis), axis=1) / math.sqrt(stride)
    sampled = float(np.linalg.svd(np.moveaxis(spectrum, (0, 1), (-2, -1)), compute_uv=False).max())
    factor = math.prod(math.cos(math.pi * (-(-k // stride) - 1) / 2 / grid) for k in shape[2:])
    found = supremum(InfiniteConv(weight, geometry(dims, stride=stride)))
    assert found.converged
    assert found.upper[0] <= found.lower[0] * (1 + 1.01e-6)
    assert sampled <= found.upper[0] * (1 + 1e-12)
    assert found.lower[0] <= sampled / factor * (1 + 1e-12)


def test_supremum_of_groups_and_of_transposed_convolutions() -> None:
    weight = gaussian(6, 2, 3, 3)
    own = [any_size(weight[2 * g : 2 * g + 2], geometry(2), tol=1e-7) for g in range(3)]
    assert any_size(weight, geometry(2, groups=3), tol=1e-7) == pytest.approx(max(own), rel=1e-6)
    flipped = ConvGeometry((2, 2), ((0, 0),) * 2, (1, 1), 1, "zeros", True, (0, 0))
    assert any_size(weight, flipped, tol=1e-7) == pytest.approx(
        any_size(weight, geometry(2, stride=2), tol=1e-7), rel=1e-6
    )


def test_supremum_bounds_every_size_and_padding() -> None:
    weight = gaussian(3, 2, 4, 3)
    for stride, dilation in ((1, 1), (2, 1), (2, 2), (3, 2)):
        bound = any_size(weight, geometry(2, stride=stride, dilation=dilation))
        for n in (1, 5, 9):
            for padding in (dilation * 3, dilation * 3 + 4):
                A = conv(weight, (n, n + 2), stride=stride, dilation=dilation, padding=padding)
                assert sigma_of(A)[0] <= bound * (1 + 1e-12)


def test_stride_one_bounds_every_stride_and_dilation() -> None:
    """What is printed where only the tensor is known."""
    weight = gaussian(3, 2, 3, 3)
    bound = any_size(weight, geometry(2))
    for stride in (1, 2, 3):
        for dilation in (1, 2):
            A = conv(weight, (8, 8), stride=stride, dilation=dilation, padding=2)
            assert sigma_of(A)[0] <= bound * (1 + 1e-12)


def test_supremum_stops_at_its_effort_with_a_valid_interval() -> None:
    weight = gaussian(40, 40, 3, 3)
    tight = enclose_supremum(weight, geometry(2), tol=1e-6)
    early = enclose_supremum(weight, geometry(2), tol=1e-6, effort=3e7)
    assert tight.tight
    assert not early.tight
    assert early.evaluations < tight.evaluations
    assert early.lower <= tight.upper
    assert tight.lower <= early.upper <= 1.3 * tight.upper


@pytest.mark.parametrize("k", range(2, 16))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_unrefined_bound_holds_for_extremal_kernels(k: int, sign: float) -> None:
    """|1 ± e^{i(k−1)θ}| attains the grid inequality: with a degree or a cell a little off, the bound fails."""
    taps = torch.zeros(1, 1, k)
    taps[..., 0], taps[..., -1] = 1.0, sign
    for channels in (1, LARGE_SIDE):
        weight = taps * torch.eye(channels)[:, :, None]
        first = enclose_supremum(weight, geometry(1), tol=1e-9, effort=0.0)
        assert first.upper >= 2.0
        plane = enclose_supremum(weight[..., None] * taps[0, 0], geometry(2), tol=1e-9, effort=0.0)
        assert plane.upper >= 4.0
        assert first.lower <= 2.0 * (1 + 1e-15)


@pytest.mark.parametrize("k", [3, 5, 9, 15, 16])
def test_unrefined_bound_holds_for_narrow_peaks(k: int) -> None:
    """A wave cut to k taps has a peak 2π/k wide at its frequency, wherever that lies between the samples."""
    for angle in np.linspace(0.05, 3.1, 40):
        taps = torch.from_numpy(np.cos(angle * np.arange(k)))
        sampled = float(np.abs(np.fft.fft(taps.numpy(), 1 << 13)).max())
        first = enclose_supremum(taps[None, None], geometry(1), tol=1e-9, effort=0.0)
        assert first.upper >= sampled
        if k <= 5:
            square = (taps[:, None] * taps)[None, None]
            assert enclose_supremum(square, geometry(2), tol=1e-9, effort=0.0).upper >= sampled**2


def test_many_channels_end_within_seconds() -> None:
    start = time.process_time()
    found = supremum(InfiniteConv(gaussian(512, 512, 3, 3), geometry(2)))
    assert time.process_time() - start < 30  # a few seconds of one core; machines differ
    assert found.lower[0] <= found.upper[0] <= 1.2 * found.lower[0]


def test_supremum_refuses_what_it_cannot_use() -> None:
    conv_ = InfiniteConv(torch.tensor([[[1.0, math.nan]]]), geometry(1))
    with pytest.raises(OperatorError, match=r"1 of 2 weights are NaN or infinite"):
        supremum(conv_)
    with pytest.raises(UsageError, match="tol must be between 0 and 1"):
        supremum(InfiniteConv(torch.ones(1, 1, 1), geometry(1)), tol=0)
    assert supremum(InfiniteConv(torch.zeros(2, 2, 3), geometry(1))).upper == (0.0,)


# --- other padding modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("pads", [(0, 0), (1, 1), (2, 0), (0, 3), (4, 4)])
def test_padding_norm_is_the_norm_of_the_padding_matrix(mode: str, pads: tuple[int, int]) -> None:
    A = ConvMap(torch.ones(1, 1, 1), (1, 5), ConvGeometry((1,), (pads,), (1,), 1, mode))  # type: ignore[arg-type]
    truth = np.linalg.norm(padding_matrix(5, *pads, mode).numpy(), 2)  # type: ignore[arg-type]
    assert padding_norm(A) == pytest.approx(truth, rel=1e-14)
    assert padding_norm(A) >= truth * (1 - 1e-15)


def test_padding_that_no_tap_reads_costs_nothing() -> None:
    A = ConvMap(torch.ones(1, 1, 1), (1, 6), ConvGeometry((4,), ((3, 0),), (1,), 1, "reflect"))
    assert padding_norm(A) == pytest.approx(1.0)


@pytest.mark.parametrize(("mode", "norm"), [("reflect", 2.0), ("replicate", 2.0), ("circular", 2.0)])
def test_padding_bound_is_the_valid_norm_times_the_padding_norms(mode: str, norm: float) -> None:
    A = conv(torch.ones(1, 1, 3, 3), (12, 12), padding=1, mode=mode)
    assert padding_norm(A) == pytest.approx(norm)
    bound = stencil_bound(unpadded(A), 1).expand(1)[2][0] * padding_norm(A)
    truth = float(sigma_of(A)[0])
    assert truth <= bound <= 3.3 * truth


def test_certified_kind_of_a_reflecting_convolution_is_padding() -> None:
    A = conv(gaussian(4, 4, 3, 3), (20, 20), padding=1, mode="reflect")
    proven = svds(A, 2, certify=True)
    chance = svds(A, 2)
    assert proven.upper_kind == "padding"
    assert chance.upper_kind == "probabilistic"
    assert chance.upper[0] < proven.upper[0]


# --- Cholesky ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (700, 50)])
def test_cholesky_proves_from_just_above_and_nothing_below(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    truth = float(np.linalg.svd(weight.double().numpy(), compute_uv=False)[0])
    level = proven_bound(MatrixMap(weight), truth)
    assert level is not None
    assert truth <= level <= truth * (1 + 2e-6)
    low = proven_bound(MatrixMap(weight), truth * 0.999)
    assert low is not None
    assert truth <= low <= truth * 1.01
    assert proven_bound(MatrixMap(weight), truth * 0.9) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cholesky_reads_every_stored_type(dtype: torch.dtype) -> None:
    weight = gaussian(60, 50).to(dtype)
    truth = float(np.linalg.svd(weight.double().numpy(), compute_uv=False)[0])
    level = proven_bound(MatrixMap(weight), truth)
    assert level is not None
    assert truth <= level <= truth * (1 + 2e-6)


def test_cholesky_certifies_a_large_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    import spectool.spectrum.dense as dense_module
    import spectool.spectrum.solve as solve_module

    monkeypatch.setattr(dense_module, "SMALL_SIDE", 16)
    monkeypatch.setattr(solve_module, "_CERTIFIED_SIDE", 16)
    weight = gaussian(300, 200)
    truth = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    proven = svds(MatrixMap(weight), 3, certify=True)
    assert proven.upper_kind == "cholesky"
    assert proven.method == "lanczos"
    assert truth[0] <= proven.upper[0] <= truth[0] * (1 + 2e-6)
    assert (truth[:3] <= np.array(proven.upper) * (1 + 1e-12)).all()


def test_a_certificate_of_a_middling_linear_layer_is_its_spectrum() -> None:
    weight = gaussian(1060, 1040)
    found = svds(MatrixMap(weight), 2, certify=True)
    assert found.method == "dense"
    assert found.upper_kind == "exact"
    assert (
        np.abs(np.array(found.values) - np.linalg.svd(weight.double().numpy(), compute_uv=False)[:2]).max()
        < 1e-8
    )


# --- chains -------------------------------------------------------------------------------------------------------


def test_product_bound_multiplies_the_parts() -> None:
    first, second = (
        conv(gaussian(6, 3, 3, 3, seed=1), (8, 8), padding=1),
        conv(gaussian(4, 6, 3, 3, seed=2), (8, 8), padding=1),
    )
    chain = Composed(second, first)
    bound = deterministic(chain, 5)
    parts = [deterministic(part, 5) for part in (second, first)]
    assert bound is not None
    assert bound.kind == "product"
    assert all(part is not None for part in parts)
    ones = [float(part.upper[0]) for part in parts if part is not None]
    assert bound.upper[0] == pytest.approx(ones[0] * ones[1], rel=1e-12)
    truth = np.linalg.svd(dense_matrix(second) @ dense_matrix(first), compute_uv=False)[:5]
    assert (truth <= bound.upper * (1 + 1e-12)).all()


def dense_matrix(A: ConvMap) -> Matrix:
    g = A.geometry
    return conv_matrix(
        A.weight.double().numpy(), A.in_shape[1:], g.stride, g.padding, g.dilation, g.groups, g.padding_mode
    )


def test_certified_chain_says_product_and_an_uncertified_one_takes_the_smaller() -> None:
    size = (20, 20)
    chain = Composed(
        conv(gaussian(3, 4, 3, 3, seed=2), size, padding=1),
        DiagonalMap(torch.tensor([1.0, -2.0, 0.5, 1.0]), (4, *size)),
        conv(gaussian(4, 3, 3, 3, seed=1), size, padding=1),
    )
    proven, chance = svds(chain, 2, certify=True), svds(chain, 2)
    assert proven.upper_kind == "product"
    assert chance.upper_kind == "probabilistic"
    assert chance.upper[0] < proven.upper[0]
    assert proven.lower[0] <= proven.upper[0]


def test_a_function_has_no_deterministic_bound() -> None:
    from spectool.linear import FunctionMap

    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.AvgPool2d(2)).eval()
    A = FunctionMap(module.requires_grad_(False), (2, 50, 50))
    assert deterministic(A, 2) is None
    assert svds(A, 2, certify=True).upper_kind == "probabilistic"


def test_too_large_a_grid_gives_way_to_the_bound_for_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    A = conv(gaussian(3, 3, 3, 3), (24, 24), padding=1)
    fine = svds(A, 2, certify=True)
    monkeypatch.setattr(bounds_module, "_SYMBOL_WORK", 0.0)
    coarse = svds(A, 2, certify=True)
    assert (fine.upper_kind, coarse.upper_kind) == ("symbol", "symbol-any-size")
    assert fine.upper[0] <= coarse.upper[0] * (1 + 1e-9)
    assert coarse.upper[0] <= fine.upper[0] * 1.03
