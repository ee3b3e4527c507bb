"""The symbol's supremum: encloses, is attained, and bounds every size, stride and padding it is said to bound."""

from __future__ import annotations

import importlib
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers import conv, gaussian, geometry, sigma_of

import spectool
from spectool.errors import OperatorError, UsageError
from spectool.linear import ConvGeometry, InfiniteConv
from spectool.progress import Step
from spectool.spectrum import supremum
from spectool.spectrum.any_size import any_size, enclose_supremum
from spectool.spectrum.symbol import LARGE_SIDE

plain = ConvGeometry.plain(1)
module = importlib.import_module("spectool.spectrum.any_size")


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


def test_a_nearly_flat_symbol_is_searched_some_cells_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One large weight among small ones: no cell goes out early, and all at once they took 4.7 GB."""
    kernel = 1e-2 * torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel[0, 0, 1, 1] = 1.0
    whole = module.enclose_supremum(kernel, ConvGeometry.plain(2), tol=1e-6)
    seen = []
    halved = module._halved
    monkeypatch.setattr(module, "_MOST_CELLS", 50)

    def noted(cells: Any, degree: torch.Tensor) -> Any:
        seen.append(len(cells.group))
        return halved(cells, degree)

    monkeypatch.setattr(module, "_halved", noted)
    parts = module.enclose_supremum(kernel, ConvGeometry.plain(2), tol=1e-6)
    assert len(seen) > 3
    assert max(seen) <= 50
    assert whole.tight
    assert parts.tight
    assert parts.upper <= parts.lower * (1 + 1.1e-6)
    frequencies = torch.linspace(-torch.pi, torch.pi, 201, dtype=torch.float64)
    taps = torch.exp(1j * frequencies[:, None] * torch.arange(3))
    symbol = torch.einsum("oiyx,ay,bx->aboi", kernel.to(torch.complex128), taps, taps)
    truth = float(torch.linalg.matrix_norm(symbol, ord=2).max())  # on a grid: a lower bound of the supremum
    assert truth <= parts.upper
    assert parts.lower == pytest.approx(whole.lower, rel=1e-6)


def test_smallest_numbers_are_enclosed_and_largest_refused() -> None:
    least = 5e-324
    found = supremum(InfiniteConv(least * torch.tensor([[[3.0, -2.0, 1.0]]], dtype=torch.float64), plain))
    assert found.lower[0] < 6 * least < found.upper[0]
    assert found.lower[0] >= 4 * least
    near = torch.full((2, 2, 3), 2e307, dtype=torch.float64)
    assert supremum(InfiniteConv(near, plain)).values[0] == pytest.approx(1.2e308)
    with pytest.raises(OperatorError, match="beyond float64's range"):
        supremum(InfiniteConv(4 * near, plain))


@pytest.mark.parametrize(
    ("kernel", "norm"), [(1e-160, 1e-160), (1e-100, 1e-250), (1e-30, 1e-290), (1e160, 1e160), (1e-300, 1e300)]
)
def test_products_of_unknown_size_are_enclosed_or_refused(tmp_path: Path, kernel: float, norm: float) -> None:
    """0 and 7e-320, five hundredths of a percent off, were given as exact."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)
    gamma = 0.5 + torch.rand(3, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.float64)
    state = {
        "conv.weight": kernel * weight, "bn.weight": norm * gamma, "bn.bias": zeros, "bn.running_mean": zeros,
        "bn.running_var": 1 + zeros,
    }  # fmt: skip
    torch.save(state, tmp_path / "net.pt")
    report = spectool.inspect(tmp_path / "net.pt", k=1, assume_bn=True)
    row = next(row for row in report.rows if row.level == "composed")
    angles = np.exp(1j * np.linspace(0, 2 * np.pi, 4001)[:, None] * np.arange(3))
    scaled = weight.numpy() * (gamma.numpy() / math.sqrt(1 + 1e-5))[:, None, None]
    truth = np.linalg.svd(np.einsum("oik,ak->aoi", scaled, angles), compute_uv=False).max()
    if kernel * norm < 1e-300 or kernel * norm > 1e300:
        assert row.status == "skipped"
        assert "leaves the range of float64" in row.note
    else:
        assert row.sigma_lower[0] <= truth * kernel * norm * (1 + 1e-6)
        assert row.sigma_upper[0] >= truth * kernel * norm
        assert row.sigma[0] == pytest.approx(truth, rel=1e-5)


def test_progress_tells_how_far_the_search_is(tmp_path: Path) -> None:
    """Every interval on the way holds σ₁, in its four digits too, and the row's key stands beside it."""
    weight, grid = gaussian(72, 72, 3, 3) * 1e-3, 16
    torch.save({"net.weight": weight}, tmp_path / "net.pt")
    steps: list[Step] = []
    spectool.inspect(tmp_path / "net.pt", progress=steps.append)
    told = [re.fullmatch(r"(\d+) frequencies, σ₁ in \[(\S+), (\S+)\]", step.message) for step in steps]
    found = [(int(one[1]), float(one[2]), float(one[3])) for one in told if one]
    assert {step.task for step, one in zip(steps, told, strict=True) if one} == {"net.weight"}
    counts, lower, upper = zip(*found, strict=True)
    assert len(found) > 3
    assert list(counts) == sorted(set(counts))
    assert upper[-1] / lower[-1] < 1.001 < upper[0] / lower[0]
    spectrum = np.moveaxis(np.fft.fftn(weight.double().numpy(), (grid, grid), axes=(2, 3)), (0, 1), (-2, -1))
    sampled = float(np.linalg.svd(spectrum, compute_uv=False).max())
    assert all(sampled <= high for high in upper)
    assert all(low <= sampled / math.cos(math.pi / grid) ** 2 for low in lower)


def test_tiny_symbols_are_charged_for_more_than_their_flops() -> None:
    """A flat symbol of 10×3 took 36 s, since 30 million of its frequencies have as few flops as the effort allows."""
    weight = gaussian(10, 3, 3, 3)
    weight[0, 0, 0, 0] = 1e6
    found = enclose_supremum(weight, geometry(2), tol=1e-12, effort=1e9)
    assert not found.tight
    assert 50_000 < found.evaluations < 300_000
    assert found.upper < found.lower * 1.0001
