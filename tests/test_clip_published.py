"""Scaling, FastClip, FFT clipping and the SVD projection against numpy."""

import math

import numpy as np
import pytest
import torch

import spectool.clip.svd as svd_module
from spectool.clip.family import Family
from spectool.clip.published import fastclip, rescaled, scale, sedghi, svd_clip, top_value
from spectool.errors import OperatorError, UsageError
from spectool.linear import ConvGeometry, ConvMap, MatrixMap
from tests.dense import conv_matrix, spectrum_matrix


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def clipped(matrix, limit):
    u, s, vt = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    return (u * np.minimum(s, limit)) @ vt


def geometry(dims=1, *, stride=1, pad=1, groups=1, mode="zeros"):
    return ConvGeometry((stride,) * dims, ((pad, pad),) * dims, (1,) * dims, groups, mode)


def conv(weight, in_shape, g):
    return Family(lambda w: ConvMap(w, in_shape, g, dtype=torch.float64), weight)


def top(weight, size, g):
    dense = conv_matrix(weight.numpy(), size, g.stride, g.padding, g.dilation, g.groups, g.padding_mode)
    return np.linalg.norm(dense, 2)


# --- matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 9), (9, 1), (300, 280), (280, 300)])
def test_svd_clip_is_the_projection(shape):
    matrix = random(*shape)
    limit = 0.6 * float(np.linalg.norm(matrix, 2))
    found = svd_clip(matrix, limit)
    truth = clipped(matrix, limit)
    assert found.weight.dtype == torch.float64
    assert found.weight.numpy() == pytest.approx(truth, abs=1e-11 * limit)
    assert found.lower == pytest.approx(np.linalg.norm(truth - matrix.numpy()), rel=1e-9)
    assert found.lower <= np.linalg.norm(found.weight.numpy() - matrix.numpy()) * (1 + 1e-12)
    assert found.method == "svd"


@pytest.mark.parametrize("values", [[3.0, 3.0, 3.0, 1.0], [5.0, 2.0, 0.0, 0.0], [2.0, 1e-9]])
def test_svd_clip_with_repeats_and_zeros(values):
    matrix = torch.from_numpy(spectrum_matrix(np.random.default_rng(1), 400, 300, values))
    found = svd_clip(matrix, 1.5)
    assert found.weight.numpy() == pytest.approx(clipped(matrix, 1.5), abs=1e-11)
    assert found.lower == pytest.approx(math.sqrt(sum(max(v - 1.5, 0) ** 2 for v in values)), rel=1e-9)


@pytest.mark.parametrize("side", [6, 260])
def test_svd_clip_of_a_batch_leaves_what_obeys(side):
    matrices = random(4, side, side + 2).to(torch.bfloat16)
    matrices[2] *= 0.01
    limit = 0.9 * float(np.linalg.norm(matrices[0].double(), 2))
    found = svd_clip(matrices, limit)
    truth = np.stack([clipped(m.double(), limit) for m in matrices])
    assert found.weight.numpy() == pytest.approx(truth, abs=1e-10)
    assert torch.equal(found.weight[2], matrices[2].double())
    assert found.lower == pytest.approx(np.linalg.norm(truth - matrices.double().numpy()), rel=1e-9)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("route", ["gram", "iterate"])
def test_svd_clip_of_large_matrices(many, route, monkeypatch):
    monkeypatch.setattr(svd_module, "_FULL", 256)
    if route == "iterate":
        monkeypatch.setattr(svd_module, "_GRAM", 256)
    rng = np.random.default_rng(2)
    values = np.concatenate([np.linspace(9, 6, 60 if many else 5), np.linspace(4, 0.1, 200)])
    matrix = torch.from_numpy(spectrum_matrix(rng, 320, 380, values)).float()
    before = matrix.clone()
    found = svd_clip(matrix, 5.0)
    assert torch.equal(matrix, before)
    assert found.weight.dtype == torch.float32
    assert found.weight.numpy() == pytest.approx(clipped(matrix, 5.0), abs=2e-5)
    assert np.linalg.norm(found.weight.double().numpy(), 2) <= 5.0 * (1 + 5e-6)
    change = np.linalg.norm(clipped(matrix, 5.0) - matrix.double().numpy())
    assert change * (1 - 1e-4) <= found.lower <= change * (1 + 1e-7)
    same = svd_clip(matrix, 9.5)
    assert torch.equal(same.weight, matrix)
    assert same.lower == 0.0
    assert torch.equal(svd_clip(matrix, 50.0).weight, matrix)


def test_svd_clip_refuses_a_limit_of_zero():
    with pytest.raises(UsageError, match="positive number"):
        svd_clip(random(3, 3), 0.0)


# --- scaling ------------------------------------------------------------------------------------------------


def test_scaling():
    weight, size, g = random(4, 3, 3, 3), (6, 5), geometry(2)
    family = conv(weight, (3, *size), g)
    assert top_value(family, weight) == pytest.approx(top(weight, size, g), rel=1e-10)
    limit = 0.5 * top(weight, size, g)
    found = scale(family, limit)
    assert found.weight.numpy() == pytest.approx(0.5 * weight.numpy(), rel=1e-9)
    assert found.lower == 0.0
    assert found.applications > 0
    assert torch.equal(scale(family, 3 * limit).weight, weight)


def test_scaling_beside_a_fixed_branch():
    """‖I + t·diag(3, 1)‖ = 1 + 3t."""
    weight = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    branch = torch.eye(2, dtype=torch.float64)
    family = Family(lambda w: MatrixMap(branch + w, dtype=torch.float64), weight, homogeneous=False)
    found = rescaled(family, weight, 2.5)
    assert found.numpy() == pytest.approx(0.5 * weight.numpy(), rel=1e-6)
    assert np.linalg.norm((branch + found).numpy(), 2) <= 2.5
    with pytest.raises(OperatorError, match="no weight brings the norm below"):
        rescaled(family, weight, 0.5)


# --- FastClip -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_fastclip_ends_at_the_limit(mode):
    weight, size, g = random(6, 6, 3, 3), (8, 8), geometry(2, mode=mode)
    before = top(weight, size, g)
    found = fastclip(conv(weight, (6, *size), g), 0.7 * before)
    assert top(found.weight, size, g) == pytest.approx(0.7 * before, rel=1e-9)
    change = float(torch.linalg.vector_norm(found.weight - weight) / torch.linalg.vector_norm(weight))
    assert 0.05 < change < 0.3  # scaling costs .3


def test_fastclip_of_a_matrix_is_close_to_the_projection():
    matrix = torch.from_numpy(spectrum_matrix(np.random.default_rng(0), 12, 10, [5.0, 3.0, 1.0, 0.5]))
    family = Family(lambda w: MatrixMap(w, dtype=torch.float64), matrix)
    found = fastclip(family, 2.0, power_steps=60)
    assert found.weight.numpy() == pytest.approx(clipped(matrix, 2.0), abs=1e-3)


def test_fastclip_does_not_diverge_where_the_published_step_does():
    weight, size, g = random(8, 8, 9), (64,), geometry(pad=4)
    limit = 0.3 * top(weight, size, g)
    published = fastclip(conv(weight, (8, *size), g), limit, step=0.35, gradient_steps=200, deflations=20)
    assert "diverged" in published.note
    found = fastclip(conv(weight, (8, *size), g), limit, gradient_steps=200, deflations=20)
    assert "diverged" not in found.note
    for one in (published, found):
        assert bool(torch.isfinite(one.weight).all())
        assert top(one.weight, size, g) == pytest.approx(limit, rel=1e-9)


def test_fastclip_does_not_raise_small_layers():
    weight = 0.1 * random(3, 3, 3)
    family = conv(weight, (3, 8), geometry())
    found = fastclip(family, 10.0)
    assert torch.equal(found.weight, weight)
    assert found.iterations == 0


# --- clipping by FFT ----------------------------------------------------------------------------------------


def fft_clip(weight, size, limit, rounds):
    """Clip with numpy's FFT over the image's size, crop to the kernel's taps; (out, in, *k) at the origin."""
    axes = tuple(range(2, weight.ndim))
    taps = tuple(slice(0, k) for k in weight.shape[2:])
    for _ in range(rounds):
        symbols = np.moveaxis(np.fft.fftn(weight, size, axes=axes), (0, 1), (-2, -1))
        u, s, vt = np.linalg.svd(symbols, full_matrices=False)
        symbols = np.moveaxis((u * np.minimum(s, limit)[..., None, :]) @ vt, (-2, -1), (0, 1))
        weight = np.fft.ifftn(symbols, axes=axes).real[(slice(None), slice(None), *taps)]
    return weight


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("rounds", [1, 7])
@pytest.mark.parametrize("shape, size", [((3, 4, 3), (9,)), ((3, 2, 3, 3), (6, 5))])
def test_sedghi_is_clip_and_crop(mode, rounds, shape, size):
    weight, g = random(*shape), geometry(len(size), mode=mode)
    limit = 0.5 * top(weight, size, g)
    found = sedghi(weight, g, (shape[1], *size), limit, alternations=rounds)
    truth = torch.from_numpy(fft_clip(weight.numpy(), size, limit, rounds))
    truth = truth * (limit / top(truth, size, g))
    assert found.weight.numpy() == pytest.approx(truth.numpy(), abs=1e-9)


def test_sedghi_with_groups_and_what_it_does_not_do():
    weight, g = random(4, 2, 3), geometry(groups=2, mode="circular")
    limit = 0.5 * top(weight, (8,), g)
    found = sedghi(weight, g, (4, 8), limit)
    parts = [fft_clip(part, (8,), limit, 1) for part in weight.reshape(2, 2, 2, 3).numpy()]
    truth = torch.from_numpy(np.concatenate(parts))
    truth = truth * (limit / top(truth, (8,), g))
    assert found.weight.numpy() == pytest.approx(truth.numpy(), abs=1e-9)
    assert torch.equal(sedghi(weight, g, (4, 8), 100.0).weight, weight)
    with pytest.raises(OperatorError, match="not defined for stride"):
        sedghi(weight, geometry(groups=2, stride=2), (4, 8), limit)
    with pytest.raises(OperatorError, match="no larger than the grid"):
        sedghi(weight, geometry(groups=2, mode="circular"), (4, 2), limit)
