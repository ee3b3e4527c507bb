"""Structure theorems: values, multiplicities and intervals against dense float64 SVDs and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import CASES, Case, case_named, select
from dense import Matrix
from layers import conv, gaussian, matrix_of, sigma_of

from spectool.linear import (
    Composed,
    ConvGeometry,
    ConvMap,
    DiagonalMap,
    FunctionMap,
    MatrixMap,
    Reshaped,
    Scaled,
    SeparableMap,
    adjoint,
)
from spectool.spectrum import svds
from spectool.spectrum.exact import closed_form
from spectool.spectrum.levels import Levels, products, union


def equal_to_first(sigma: Matrix) -> int:
    return int((sigma >= sigma[0] * (1 - 1e-9)).sum())


# --- every operator of the table ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_spectrum_is_enclosed_with_its_multiplicity(case: Case) -> None:
    sigma = case.sigma()
    spectrum = svds(case.build(), len(sigma))
    slack = 1e-12 * sigma[0]
    assert len(spectrum.values) == len(sigma)
    assert (np.array(spectrum.lower) <= sigma + slack).all()
    assert (sigma <= np.array(spectrum.upper) + slack).all()
    assert np.abs(np.array(spectrum.values) - sigma).max() <= 1e-9 * sigma[0]
    assert spectrum.upper_kind == "exact"
    assert spectrum.converged
    assert spectrum.why
    if spectrum.multiplicity_exact and sigma[0] > 0:
        assert spectrum.multiplicity == equal_to_first(sigma)
    assert spectrum.fro == pytest.approx(math.sqrt((sigma**2).sum()), rel=1e-9)


@pytest.mark.parametrize("case", select("structured"), ids=str)
def test_structure_costs_no_matvecs(case: Case) -> None:
    spectrum = svds(case.build(), 4)
    assert spectrum.matvecs == 0
    assert spectrum.method == "exact:non-overlapping"
    assert spectrum.residuals == ()
    assert "do not overlap" in spectrum.why


# --- which theorem, and how often each value occurs -----------------------------------------------------------

CIRCULAR = {"mode": "circular", "padding": 1}


@pytest.mark.parametrize(
    ("A", "method", "multiplicity"),
    [
        (conv(gaussian(12, 8, 1, 1), (30, 30)), "exact:non-overlapping", 900),
        (conv(gaussian(12, 8, 1, 1), (30, 30), stride=2), "exact:non-overlapping", 225),
        (conv(gaussian(6, 5, 1, 1), (40, 40), padding=3, stride=2), "exact:non-overlapping", 400),
        (conv(gaussian(16, 3, 8, 8), (64, 64), stride=8), "exact:non-overlapping", 64),
        (conv(gaussian(16, 3, 2, 2), (40, 40), stride=3, dilation=2), "exact:non-overlapping", 169),
        (conv(gaussian(30, 4, 20, 20), (20, 20)), "exact:non-overlapping", 1),
        (conv(gaussian(8, 4, 2, 2), (40, 40), stride=2, transposed=True), "exact:non-overlapping", 1600),
        (conv(gaussian(6, 2, 1, 1), (30, 30), groups=3), "exact:non-overlapping", 900),
        (conv(gaussian(4, 4, 3, 3), (24, 24), padding=3, dilation=3), "exact:independent", 9),
        (conv(gaussian(4, 4, 1, 3), (24, 24)), "exact:independent", 24),
        (
            conv(gaussian(3, 1, 3, 3).repeat(4, 1, 1, 1), (20, 20), padding=1, groups=12),
            "exact:independent",
            4,
        ),
        (conv(gaussian(4, 4, 3, 3), (40, 40), **CIRCULAR), "exact:circular", None),
        (conv(gaussian(4, 4, 3, 3), (40, 40), stride=2, **CIRCULAR), "exact:circular", None),
        (conv(torch.ones(1, 1, 3, 3), (64, 64), padding=1), "exact:separable", 1),
        (conv(torch.ones(1, 1, 3, 3), (64, 64), padding=1, mode="replicate"), "exact:separable", 1),
        (
            conv(torch.ones(32, 1, 3, 3), (64, 64), padding=1, mode="reflect", groups=32),
            "exact:separable",
            32,
        ),
        (DiagonalMap(torch.tensor([1.0, -3.0, 3.0, 0.0]), (4, 50, 50)), "exact:diagonal", 5000),
        (SeparableMap(7, (torch.full((20, 40), 0.5), torch.eye(30))), "exact:separable", 210),
        (Scaled(conv(gaussian(12, 8, 1, 1), (30, 30)), -2.5), "exact:non-overlapping", 900),
        (adjoint(conv(gaussian(12, 8, 1, 1), (30, 30))), "exact:non-overlapping", 900),
        (Reshaped(conv(gaussian(12, 8, 1, 1), (30, 30)), in_shape=(7200,)), "exact:non-overlapping", 900),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_theorem_and_multiplicity(A: ConvMap, method: str, multiplicity: int | None) -> None:
    spectrum = svds(A, 3)
    assert spectrum.method == method
    assert spectrum.matvecs == 0
    assert spectrum.multiplicity_exact
    assert multiplicity is None or spectrum.multiplicity == multiplicity


def test_padded_pointwise_values_occur_once_per_position_that_reads_a_pixel() -> None:
    A = conv(gaussian(3, 2, 1, 1), (5, 5), padding=2)
    spectrum = svds(A, 50)
    own = np.linalg.svd(A.weight.double().numpy()[:, :, 0, 0], compute_uv=False)
    assert np.allclose(spectrum.values, np.repeat(own, 25), rtol=1e-13, atol=0)


def test_overhanging_windows_lose_taps() -> None:
    """Windows of 3 with stride 4 and padding 2: the first and the last hang over the border."""
    weight = gaussian(5, 2, 3)
    A = conv(weight, (11,), stride=4, padding=2)
    w = weight.double().numpy()
    blocks = [w[:, :, 2:], w, w, w[:, :, :1]]  # reading positions (-2,-1,0), (2,3,4), (6,7,8), (10,11,12)
    own = [np.linalg.svd(block.reshape(5, -1), compute_uv=False) for block in blocks]
    truth = np.sort(np.concatenate(own))[::-1]
    assert np.allclose(svds(A, 20).values[: len(truth)], truth, rtol=1e-12)
    assert svds(A, 20).method == "exact:non-overlapping"


@pytest.mark.parametrize("n", [12, 13, 14])
def test_dilated_layer_is_undilated_layers_on_coarser_grids(n: int) -> None:
    A = conv(gaussian(3, 3, 3, 3), (n, n), padding=2, dilation=2)
    truth = np.sort(
        np.concatenate(
            [
                sigma_of(conv(A.weight, (-(-(n - a) // 2), -(-(n - b) // 2)), padding=1))
                for a in range(2)
                for b in range(2)
            ]
        )
    )[::-1]
    spectrum = svds(A, 40)
    assert spectrum.method == "exact:independent"
    assert np.allclose(spectrum.values, truth[:40], rtol=1e-12)


def test_groups_are_a_union_and_never_a_product() -> None:
    weight = gaussian(6, 2, 3, 3)
    A = conv(weight, (9, 9), padding=1, groups=3)
    own = [sigma_of(conv(weight[2 * g : 2 * g + 2], (9, 9), padding=1)) for g in range(3)]
    truth = np.sort(np.concatenate(own))[::-1]
    assert np.allclose(svds(A, len(truth)).values, truth, rtol=0, atol=1e-12 * truth[0])


def test_many_depthwise_channels_are_pruned_not_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only channels whose bound reaches the fortieth value are factorised, and none that matters is missed."""
    from spectool.spectrum import independent

    solved = []
    whole = independent.matrix_levels

    def counting(matrices: torch.Tensor, k: int) -> Levels:
        solved.append(matrices.shape[0] if matrices.ndim == 3 else 1)
        return whole(matrices, k)

    monkeypatch.setattr(independent, "matrix_levels", counting)
    weight = gaussian(150, 1, 3, 3, seed=5)
    weight /= torch.linalg.vector_norm(weight.flatten(1), dim=1)[:, None, None, None]
    spectrum = svds(conv(weight, (12, 12), padding=1, groups=150), 40)
    taps = [matrix_of(conv(unit.reshape(1, 1, 3, 3), (12, 12), padding=1)) for unit in torch.eye(9)]
    blocks = np.einsum("ct,tmn->cmn", weight.double().reshape(150, 9).numpy(), np.array(taps))
    truth = np.sort(np.linalg.svd(blocks, compute_uv=False).ravel())[::-1]
    assert np.allclose(spectrum.values, truth[:40], rtol=1e-12)
    assert 0 < sum(solved) < 60


def test_transposed_convolution_has_the_values_of_its_convolution() -> None:
    weight = gaussian(5, 4, 4, 4)
    straight = conv(weight, (12, 12), stride=2, padding=1)
    flipped = conv(weight, (6, 6), stride=2, padding=1, transposed=True)
    assert flipped.out_shape == straight.in_shape
    assert np.allclose(svds(straight, 20).values, svds(flipped, 20).values, rtol=1e-12)


@pytest.mark.parametrize("factor", [-3.0, 1e-30, 1e20])
@pytest.mark.parametrize("name", ["conv2d 3x3", "conv2d 1x1", "linear tall", "conv2d circular"])
def test_scaling_a_map_scales_its_values(name: str, factor: float) -> None:
    A = case_named(name).build()
    plain, scaled = svds(A, 5), svds(Scaled(A, factor), 5)
    assert np.allclose(scaled.values, np.array(plain.values) * abs(factor), rtol=1e-12, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_behind_a_convolution_scales_its_rows(transposed: bool, groups: int) -> None:
    weight = gaussian(4, 6 // groups, 3, 3) if transposed else gaussian(6, 4 // groups, 3, 3)
    A = conv(weight, (6, 6), padding=1, groups=groups, transposed=transposed)
    scale = torch.tensor([0.5, -2.0, 0.0, 1.5, -0.25, 1e-4])
    pair = Composed(DiagonalMap(scale, A.out_shape), A)
    rows = np.repeat(scale.double().numpy(), 36)[:, None]
    truth = np.linalg.svd(rows * matrix_of(A), compute_uv=False)
    spectrum = svds(pair, 30)
    assert np.allclose(spectrum.values, truth[:30], rtol=0, atol=1e-12 * truth[0])
    assert spectrum.upper_kind == "exact"
    assert spectrum.matvecs == 0


def test_chain_of_matrices_is_multiplied() -> None:
    maps = [gaussian(300, 50, seed=1), gaussian(50, 2000, seed=2), gaussian(2000, 400, seed=3)]
    spectrum = svds(Composed(*(MatrixMap(weight) for weight in maps)), 6)
    a, b, c = (weight.double().numpy() for weight in maps)
    truth = np.linalg.svd(a @ b @ c, compute_uv=False)[:6]
    assert np.allclose(spectrum.values, truth, rtol=1e-11)
    assert (np.array(spectrum.lower) <= truth).all()
    assert (truth <= np.array(spectrum.upper)).all()
    assert spectrum.matvecs == 0


def test_cancelling_chain_is_still_enclosed() -> None:
    """[X, X]·[Y; E − Y] = X·E is 1e10 times smaller than its terms: the rounding counts relative to the factors."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((60, 60)), rng.standard_normal((60, 60))
    opposite = -y + 1e-10 * rng.standard_normal((60, 60))
    truth = np.linalg.svd(x @ (y + opposite), compute_uv=False)  # the sum is exact
    left, right = np.hstack([x, x]), np.vstack([y, opposite])
    spectrum = svds(Composed(MatrixMap(torch.from_numpy(left)), MatrixMap(torch.from_numpy(right))), 60)
    assert (np.array(spectrum.lower) <= truth).all()
    assert (truth <= np.array(spectrum.upper)).all()
    assert spectrum.upper[0] - spectrum.lower[0] > 1e-14


def test_separable_chain_multiplies_axis_by_axis() -> None:
    pool, scale = torch.full((4, 8), 0.0), torch.tensor([2.0, -1.0, 0.5])
    for i in range(4):
        pool[i, 2 * i : 2 * i + 2] = 0.5
    upsample = torch.eye(8).repeat_interleave(2, dim=0)
    chain = Composed(
        SeparableMap(3, (pool, pool)),
        DiagonalMap(scale, (3, 8, 8)),
        SeparableMap(3, (upsample.T, upsample.T)),
    )
    factor = (pool @ upsample.T).double().numpy()
    matrix = np.kron(np.diag(scale.numpy()), np.kron(factor, factor))
    truth = np.linalg.svd(matrix, compute_uv=False)
    spectrum = svds(chain, 48)
    assert np.allclose(spectrum.values, truth, rtol=0, atol=1e-13 * truth[0])
    assert spectrum.method == "exact:separable"
    assert spectrum.multiplicity == equal_to_first(truth)


def test_no_theorem_for_what_has_none() -> None:
    large = gaussian(6, 4, 3, 3)
    assert closed_form(conv(large, (40, 40), padding=1), 4) is None
    assert closed_form(conv(large, (40, 40), padding=1, mode="reflect"), 4) is None
    assert closed_form(conv(large, (41, 41), padding=1, stride=2, mode="circular"), 4) is None
    assert closed_form(MatrixMap(torch.zeros(1500, 1500)), 4) is None
    assert closed_form(FunctionMap(torch.nn.Tanhshrink(), (3,)), 1) is None


@pytest.mark.parametrize("pads", [((1, 2),), ((3, 0),), ((0, 3),)])
def test_circular_padding_may_lie_on_one_side(pads: tuple[tuple[int, int], ...]) -> None:
    weight = gaussian(5, 6, 4)
    A = ConvMap(weight, (6, 60), ConvGeometry((2,), pads, (1,), 1, "circular"))
    spectrum = svds(A, 12)
    assert spectrum.method == "exact:circular"
    truth = np.linalg.svd(matrix_of(A), compute_uv=False)[:12]
    assert np.allclose(spectrum.values, truth, rtol=1e-12)


# --- reference values ---------------------------------------------------------------------------------------

KERNEL = torch.tensor([[[[2.0, 7.0, -1.0], [1.0, 3.0, -8.0], [5.0, -3.0, 1.0]]]])
BINOMIAL = torch.tensor([[[[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]]])
LAPLACIAN = torch.tensor([[[[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]]])


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (
            {"padding": 1, "mode": "circular"},
            [22.91221348, 22.91221348, 22.73452631, 22.73452631, 22.59309063],
        ),
        ({"padding": 1}, [22.72753302, 22.72744344, 22.4144093, 22.4144085, 22.22151133]),
        ({"padding": 1, "stride": 2}, [13.81511119, 13.81419628, 13.79273318]),
        ({}, [22.67943198, 22.67933422, 22.31291351]),
        ({"padding": 2, "dilation": 2}, [22.00672288] * 3),
    ],
)
def test_reference_values_of_a_3x3_kernel(options: dict[str, int], values: list[float]) -> None:
    spectrum = svds(conv(KERNEL, (20, 20), **options), len(values))  # type: ignore[arg-type]
    assert np.allclose(spectrum.values, values, rtol=0, atol=6e-9)


def test_reference_values_of_the_smallest_singular_values() -> None:
    line = svds(conv(torch.tensor([[[2.0, 7.0, -1.0]]]), (20,), padding=1, mode="circular"), 20)
    assert line.values[0] == pytest.approx(8.0056336379, abs=6e-11)
    assert line.values[-1] == pytest.approx(6.0, abs=1e-12)
    plane = svds(conv(KERNEL, (20, 20), padding=1, mode="circular"), 400)
    assert plane.values[-1] == pytest.approx(0.1548414175, abs=6e-11)


def test_reference_box_by_padding_mode() -> None:
    truth = {"zeros": 8.8664689165, "replicate": 9.0, "circular": 9.0, "reflect": 9.3307827417}
    for mode, value in truth.items():
        A = conv(torch.ones(1, 1, 3, 3), (20, 20), padding=1, mode=mode)
        assert svds(A, 1).values[0] == pytest.approx(value, abs=6e-11)


@pytest.mark.parametrize("n", [20, 100])
def test_whole_spectra_with_closed_forms(n: int) -> None:
    """1-D factors have 2 + 2cos(iπ/(n+1)): products for the binomial kernel, sums for the Laplacian."""
    line = 2 + 2 * np.cos(np.arange(1, n + 1) * np.pi / (n + 1))
    binomial = svds(conv(BINOMIAL, (n, n), padding=1), 30)
    assert np.allclose(binomial.values, np.sort(np.outer(line, line).ravel())[::-1][:30], rtol=1e-12)
    if n == 20:
        laplacian = svds(conv(LAPLACIAN, (n, n), padding=1), 400)
        sums = np.sort(np.add.outer(line, line).ravel())[::-1]
        assert np.allclose(laplacian.values, sums, rtol=0, atol=1e-12 * sums[0])
        assert laplacian.values[0] == pytest.approx(7.955323304901, abs=1e-11)
        assert binomial.values[0] == pytest.approx(15.821792221373, abs=1e-11)


def test_circular_values_of_one_channel_come_in_pairs() -> None:
    values = np.array(svds(conv(gaussian(1, 1, 5), (21,), padding=2, mode="circular"), 21).values)
    autocorrelation = np.correlate(
        gaussian(1, 1, 5).double().numpy()[0, 0], gaussian(1, 1, 5).double().numpy()[0, 0], "full"
    )[4:]
    angles = 2 * np.pi * np.arange(21) / 21
    squares = autocorrelation[0] + 2 * sum(autocorrelation[j] * np.cos(j * angles) for j in range(1, 5))
    assert np.allclose(values, np.sort(np.sqrt(squares))[::-1], rtol=1e-12)


# --- lists with repeats --------------------------------------------------------------------------------------


def test_levels_expand_repeats_and_fill_with_zeros() -> None:
    levels = Levels.around(np.array([1.0, 3.0]), 0.1, np.array([2, 1_000_000_000]))
    values, lower, upper = levels.expand(3)
    assert values.tolist() == [3.0, 3.0, 3.0]
    assert lower.tolist() == [2.9] * 3
    assert upper.tolist() == [3.1] * 3
    short = Levels.around(np.array([2.0]), 0.0).expand(3)[0]
    assert short.tolist() == [2.0, 0.0, 0.0]


def test_union_sorts_each_end_by_itself() -> None:
    tight, loose = Levels.around(np.array([2.0, 1.0]), 0.0), Levels.around(np.array([1.5]), 0.9)
    values, lower, upper = union([tight, loose]).expand(3)
    assert values.tolist() == [2.0, 1.5, 1.0]
    assert lower.tolist() == pytest.approx([2.0, 1.0, 0.6])
    assert upper.tolist() == pytest.approx([2.4, 2.0, 1.0])


def test_products_keep_the_largest_with_their_multiplicities() -> None:
    rng = np.random.default_rng(0)
    lines = [np.sort(rng.random(9))[::-1] for _ in range(3)]
    found = products([Levels.around(line, 0.0, 2) for line in lines], 50)
    truth = np.repeat(np.sort(np.multiply.outer(np.multiply.outer(*lines[:2]), lines[2]).ravel())[::-1], 8)
    assert np.allclose(found.expand(50)[0], truth[:50], rtol=1e-15)
