"""Intervals hold: for drawn operators of every kind, lower ≤ truth ≤ upper, for svds and for every bound alone.

The truth is numpy's SVD of matrices that ``tests/dense.py`` writes from the definitions. It has a rounding error of
its own, 1e-12 of σ₁.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from dense import Matrix, conv_matrix, conv_transpose_matrix, diagonal_matrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectool.linear import Composed, ConvGeometry, ConvMap, DiagonalMap, LinearMap, MatrixMap, SeparableMap
from spectool.spectrum import Spectrum, svds
from spectool.spectrum.any_size import enclose_supremum
from spectool.spectrum.bounds import deterministic, stencil_bound
from spectool.spectrum.cholesky import proven_bound
from spectool.spectrum.exact import closed_form
from spectool.spectrum.padding import padding_norm, unpadded
from spectool.spectrum.stencil import split, stencil_of

ROUNDING = 1e-12


def drawn(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Drawn:
    """An operator and its dense matrix; the repr is what hypothesis prints."""

    map: LinearMap
    matrix: Matrix
    text: str

    def __repr__(self) -> str:
        return self.text

    @property
    def sigma(self) -> Matrix:
        return np.linalg.svd(self.matrix, compute_uv=False)


# --- strategies ---------------------------------------------------------------------------------------------

TYPES = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
SCALES = [1.0, 1.0, 1e-3, 1e-33, 1e25]


@st.composite
def weights(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """Gaussian, with one strong direction, of small integers with zeros, or constant; any type and scale."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["gaussian", "heavy", "integers", "constant", "product"]))
    if kind == "integers":
        values = rng.integers(-2, 3, shape).astype(float)
    elif kind == "constant":
        values = np.full(shape, rng.choice([1.0, -0.5, 3.0]))
    elif kind == "product":
        values = np.ones(())
        for size in shape:
            values = np.multiply.outer(values, rng.standard_normal(size))
    else:
        values = rng.standard_normal(shape)
        if kind == "heavy":
            values = values + 3 * rng.standard_normal(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    dtype = draw(st.sampled_from(TYPES))
    scale = draw(st.sampled_from(SCALES)) if dtype in (torch.float32, torch.float64) else 1.0
    return torch.from_numpy(values * scale).to(dtype)


@st.composite
def convolutions(
    draw: st.DrawFn, *, mode: str | None = "zeros", transposed: bool | None = None, most: int = 3
) -> Drawn:
    """A convolution of 1 to 3 axes with any stride, dilation, groups and padding; its matrix stays small."""
    dims = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    flipped = draw(st.booleans()) if transposed is None else transposed
    modes = ["zeros", "circular", "reflect", "replicate"] if mode is None else [mode]
    padded = draw(st.sampled_from(modes)) if not flipped else "zeros"
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    ins, outs = draw(st.integers(1, most)), draw(st.integers(1, most))
    longest = {1: 14, 2: 6, 3: 3}[dims]
    size = tuple(draw(st.integers(1, longest)) for _ in range(dims))
    kernel = tuple(draw(st.integers(1, {1: 5, 2: 3, 3: 2}[dims])) for _ in range(dims))
    stride = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(dims))
    dilation = tuple(draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(dims))
    padding, extra = [], []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        limit = {"zeros": 4, "replicate": 4, "circular": min(4, n), "reflect": min(4, n - 1)}[padded]
        least = -1 if padded == "zeros" else 0
        lead, trail = draw(st.integers(least, limit)), draw(st.integers(least, limit))
        span = d * (k - 1) + 1
        if flipped:
            e = draw(st.integers(0, s - 1))
            while (n - 1) * s + span + e - lead - trail < 1:
                lead, trail = lead - 1, trail - 1
            extra.append(e)
        else:
            if n + lead + trail < span:
                lead, trail, k = max(lead, 0), max(trail, 0), 1
            extra.append(0)
        padding.append((lead, trail))
        kernel = (*kernel[: len(padding) - 1], k, *kernel[len(padding) :])
    shape = (groups * ins, outs, *kernel) if flipped else (groups * outs, ins, *kernel)
    weight = draw(weights(shape))
    geometry = ConvGeometry(
        stride, tuple(padding), dilation, groups, padded, flipped, tuple(extra) if flipped else ()
    )
    A = ConvMap(weight, (groups * ins, *size), geometry)
    dense = weight.double().numpy()
    if flipped:
        matrix = conv_transpose_matrix(dense, size, stride, padding, dilation, groups, extra)
    else:
        matrix = conv_matrix(dense, size, stride, padding, dilation, groups, padded)
    return Drawn(
        A, matrix, f"{tuple(weight.shape)} {weight.dtype} on {size}, {geometry}, {weight.flatten()[:3]}"
    )


@st.composite
def matrices(draw: st.DrawFn) -> Drawn:
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    weight = draw(weights((m, n)))
    if draw(st.booleans()):
        weight = weight * torch.logspace(0, -draw(st.integers(0, 12)), n).to(weight.dtype)
    return Drawn(MatrixMap(weight), weight.double().numpy(), f"matrix {m} × {n} {weight.dtype}")


@st.composite
def diagonals(draw: st.DrawFn) -> Drawn:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    scale = draw(weights(shape[:1]))
    text = f"diagonal {scale} on {shape}"
    return Drawn(DiagonalMap(scale, shape), diagonal_matrix(scale.double().numpy(), shape), text)


@st.composite
def separables(draw: st.DrawFn) -> Drawn:
    channels = draw(st.integers(1, 3))
    factors = [
        draw(weights((draw(st.integers(1, 6)), draw(st.integers(1, 6)))))
        for _ in range(draw(st.integers(1, 3)))
    ]
    matrix = np.eye(channels)
    for factor in factors:
        matrix = np.kron(matrix, factor.double().numpy())
    text = f"separable, {channels} channels, {[tuple(f.shape) for f in factors]}"
    return Drawn(SeparableMap(channels, tuple(factors)), matrix, text)


@st.composite
def chains(draw: st.DrawFn) -> Drawn:
    """A convolution, a scale per channel and another convolution or a matrix behind it."""
    first = draw(convolutions(mode=None, most=2))
    channels, *size = first.map.out_shape
    scale = torch.from_numpy(np.random.default_rng(draw(st.integers(0, 999))).standard_normal(channels))
    second = DiagonalMap(scale, first.map.out_shape)
    matrix = diagonal_matrix(scale.numpy(), first.map.out_shape) @ first.matrix
    maps: list[LinearMap] = [second, first.map]
    if draw(st.booleans()):
        weight = draw(weights((3, channels, *[1 if n < 2 else 2 for n in size])))
        third = ConvMap(weight, first.map.out_shape, ConvGeometry.plain(len(size)))
        matrix = (
            conv_matrix(
                weight.double().numpy(), size, (1,) * len(size), [(0, 0)] * len(size), (1,) * len(size)
            )
            @ matrix
        )
        maps.insert(0, third)
    return Drawn(Composed(*maps), matrix, f"chain on {first}")


# --- checks -------------------------------------------------------------------------------------------------


def assert_encloses(lower: Matrix | None, upper: Matrix, sigma: Matrix) -> None:
    slack = ROUNDING * float(sigma[0])
    if lower is not None:
        assert (np.asarray(lower) <= sigma[: len(lower)] + slack).all(), (lower, sigma)
    assert (sigma[: len(upper)] <= np.asarray(upper) + slack).all(), (sigma, upper)


def assert_holds(spectrum: Spectrum, sigma: Matrix) -> None:
    """Every interval contains the truth and its own value; lists descend."""
    values, lower, upper = (
        np.array(entries) for entries in (spectrum.values, spectrum.lower, spectrum.upper)
    )
    assert_encloses(lower, upper, sigma)
    assert (lower <= values).all()
    assert (values <= upper).all()
    for entries in (values, lower, upper):
        assert (np.diff(entries) <= 0).all()


@drawn(450)
@given(convolutions(mode="zeros"))
def test_symbol_bounds_hold_for_every_index(conv: Drawn) -> None:
    whole = stencil_of(conv.map)
    assert whole is not None
    sigma = conv.sigma
    assert_encloses(None, stencil_bound(whole, len(sigma)).expand(len(sigma))[2], sigma)


@drawn(300)
@given(convolutions(mode="zeros"))
def test_independent_parts_have_the_singular_values_of_the_whole(conv: Drawn) -> None:
    whole = stencil_of(conv.map)
    assert whole is not None
    sigma = conv.sigma
    found = [
        np.tile(np.linalg.svd(part.to_matrices().numpy(), compute_uv=False).ravel(), count)
        for part, count in split(whole)
    ]
    values = np.sort(np.concatenate([np.zeros(len(sigma)), *found]))[::-1][: len(sigma)]
    assert np.abs(values - sigma).max() <= ROUNDING * sigma[0]


@drawn(250)
@given(convolutions(mode="zeros"), st.sampled_from([0.0, 1e5, 1e11]))
def test_the_bound_for_any_size_holds_at_this_one(conv: Drawn, effort: float) -> None:
    assert isinstance(conv.map, ConvMap)
    found = enclose_supremum(conv.map.weight, conv.map.geometry, tol=1e-3, effort=effort)
    assert found.lower <= found.best <= found.upper
    assert_encloses(None, np.array([found.upper]), conv.sigma)


@drawn(250)
@given(
    st.sampled_from(["circular", "reflect", "replicate"]).flatmap(
        lambda m: convolutions(mode=m, transposed=False)
    )
)
def test_padding_bounds_hold_for_every_index(conv: Drawn) -> None:
    assert isinstance(conv.map, ConvMap)
    sigma = conv.sigma
    bound = stencil_bound(unpadded(conv.map), len(sigma)).expand(len(sigma))[2] * padding_norm(conv.map)
    assert_encloses(None, bound, sigma)


@drawn(250)
@given(matrices(), st.floats(0.5, 1.5))
def test_cholesky_never_proves_what_is_false(matrix: Drawn, ratio: float) -> None:
    assert isinstance(matrix.map, MatrixMap)
    sigma = matrix.sigma
    level = proven_bound(matrix.map, float(sigma[0]) * ratio)
    if level is None:
        assert ratio < 1 or sigma[0] == 0
    else:
        assert_encloses(None, np.array([level]), sigma)


@drawn(150)
@given(chains())
def test_product_bounds_hold_for_every_index(chain: Drawn) -> None:
    sigma = chain.sigma
    bound = deterministic(chain.map, len(sigma))
    assert bound is not None
    assert_encloses(None, bound.upper, sigma)


@drawn(350)
@given(st.one_of(convolutions(mode=None), matrices(), diagonals(), separables(), chains()))
def test_theorems_enclose_every_value(operator: Drawn) -> None:
    sigma = operator.sigma
    solved = closed_form(operator.map, len(sigma))
    if solved is None:
        assert isinstance(operator.map, Composed)  # two convolutions: no theorem
        return
    _, lower, upper = solved.levels.expand(len(sigma))
    assert_encloses(lower, upper, sigma)
    tight = (upper - lower)[sigma > 1e-3 * sigma[0]]
    assert (tight <= 1e-9 * sigma[0]).all()


@drawn(250)
@given(
    st.one_of(convolutions(mode=None), matrices(), diagonals(), separables(), chains()),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
def test_svds_encloses(operator: Drawn, k: int, certify: bool, vectors: bool) -> None:
    sigma = operator.sigma
    spectrum = svds(operator.map, k, certify=certify, vectors=vectors)
    assert len(spectrum.values) == min(k, len(sigma))
    assert_holds(spectrum, sigma)
    assert math.isfinite(spectrum.upper[0])
    assert abs(spectrum.values[0] - sigma[0]) <= 1e-6 * sigma[0]


@pytest.mark.parametrize("method", ["lanczos", "power", "powerqr"])
@drawn(60)
@given(
    operator=st.one_of(convolutions(mode=None), matrices(), chains()),
    k=st.integers(1, 4),
    cap=st.sampled_from([None, None, 30]),
    certify=st.booleans(),
)
def test_iterative_methods_enclose(
    method: str, operator: Drawn, k: int, cap: int | None, certify: bool
) -> None:
    spectrum = svds(operator.map, k, method=method, max_matvecs=cap, certify=certify)  # type: ignore[arg-type]
    assert_holds(spectrum, operator.sigma)
