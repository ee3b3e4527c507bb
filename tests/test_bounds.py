"""Every upper bound: holds, is as tight as it is said to be, and is named for what proves it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense import Matrix
from layers import conv, gaussian, matrix_of, sigma_of

from spectool.linear import (
    Composed,
    ConvGeometry,
    ConvMap,
    DiagonalMap,
    MatrixMap,
    padding_matrix,
)
from spectool.spectrum import bounds as bounds_module
from spectool.spectrum import svds
from spectool.spectrum.bounds import deterministic, stencil_bound
from spectool.spectrum.cholesky import proven_bound
from spectool.spectrum.padding import padding_norm, unpadded
from spectool.spectrum.periodic import grid_levels, periods, symbol_levels
from spectool.spectrum.stencil import split, stencil_of
from spectool.spectrum.symbol import LARGE_SIDE, polynomial


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
    truth = np.linalg.svd(weight.double().numpy(), compute_uv=False)[:8]
    found = svds(MatrixMap(weight), 8, certify=True)
    assert found.method == "dense"
    assert found.upper_kind == "exact"
    slack = 1e-12 * truth[0]
    assert (np.array(found.lower) <= truth + slack).all()
    assert (truth <= np.array(found.upper) + slack).all()
    assert found.upper[0] - found.lower[0] <= 1e-9 * truth[0]


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
    truth = np.linalg.svd(matrix_of(second) @ matrix_of(first), compute_uv=False)[:5]
    assert (truth <= bound.upper * (1 + 1e-12)).all()


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
