"""Every operator of the table that has a weight, clipped and stored; σ₁ by the dense float64 SVD of what is stored.

A fifth of the convolutions and all matrices and half types at one level each, chosen by their names; with
SPECTOOL_ALL_LEVELS=1 everything at all levels, by default and exactly (20 minutes).
"""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest
import torch
from clip_tools import SUBJECTS, Subject, clip

LEVELS = (0.95, 0.8, 0.5, 0.2)
HALF = (torch.float16, torch.bfloat16)


def _runs() -> list[tuple[Subject, float, bool]]:
    everything = os.environ.get("SPECTOOL_ALL_LEVELS") == "1"
    runs = []
    for subject in SUBJECTS:
        if not bool(subject.weight.any()) or subject.sigma(subject.weight) == 0.0:
            continue
        if everything:
            runs += [(subject, level, exact) for level in LEVELS for exact in (False, True)]
            continue
        number = zlib.crc32(subject.name.encode())
        if subject.is_matrix or subject.weight.dtype in HALF or number % 5 == 0:
            runs.append((subject, LEVELS[number // 3 % 4], number // 12 % 2 == 0))
    return runs


def _named(run: object) -> str:
    return {True: "exact", False: "default"}[run] if isinstance(run, bool) else str(run)


@pytest.mark.parametrize(("subject", "level", "exact"), _runs(), ids=_named)
def test_what_is_stored_obeys_and_is_near(subject, level, exact):
    before = subject.sigma(subject.weight)
    limit = level * before
    made = clip([(subject.region, limit)], {"w": subject.weight}, before / limit, exact=exact)
    stored = made.stored.edits["w"]
    assert stored.dtype == subject.weight.dtype
    assert stored.shape == subject.weight.shape
    assert bool(stored.isfinite().all())
    half, unit = stored.dtype in HALF, torch.finfo(stored.dtype).eps
    after = subject.sigma(stored)
    assert after <= limit * (1.0 if half else 1 + 1e-9)
    assert after >= limit * (1 - (2 * unit if half else 3e-4))

    # The change, from the tensors alone, in the metric that was minimised.
    old, new = subject.weight.double().numpy(), stored.double().numpy()
    size = np.abs(old).max()
    change = np.linalg.norm((new - old) / size) / np.linalg.norm(old / size)
    assert made.projected.metric == "weights"
    assert change == pytest.approx(made.change, rel=1e-9, abs=1e-12)
    lower, rounding = made.projected.lower, unit if half else 1e-6
    assert 0 < lower <= change * (1 + 1e-6) + rounding
    assert change <= (1 - level) * (1 + 1e-6) + rounding, "more than scaling changes"
    gap = 1.001 if subject.is_matrix else 1.01 if exact else 1.10
    assert change <= gap * lower + rounding
    if subject.is_matrix:
        values = np.linalg.svd(old / size, compute_uv=False)
        nearest = np.linalg.norm((values - limit / size).clip(0)) / np.linalg.norm(values)
        assert lower == pytest.approx(nearest, rel=1e-6)


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if not bool(s.weight.any())], ids=str)
def test_zero_weights_stay_zero(subject):
    made = clip([(subject.region, 1.0)], {"w": subject.weight}, 0.0)
    assert torch.equal(made.stored.edits["w"], subject.weight)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("excess", [0.0, 1e-9, 0.3])
@pytest.mark.parametrize("method", ["auto", "bundle"])
@pytest.mark.parametrize(
    "name",
    ["linear square", "conv2d 3x3", "conv1d depthwise", "conv2d circular", "conv2d bf16", "conv2d box zeros"],
)
def test_what_obeys_stays_bit_by_bit(name, method, excess, exact):
    subject = next(subject for subject in SUBJECTS if subject.name == name)
    limit = subject.sigma(subject.weight) * (1 + excess)
    made = clip(
        [(subject.region, limit)], {"w": subject.weight}, 1 / (1 + excess), exact=exact, method=method
    )
    assert torch.equal(made.stored.edits["w"], subject.weight)
    assert made.projected.change == 0.0
    assert made.projected.lower in (None, 0.0)


def test_conv1d_of_kernel_9_is_finite_at_any_level():
    from clip_tools import conv_dense, conv_node, geometry, region

    weight = torch.randn(6, 6, 9, generator=torch.Generator().manual_seed(3))
    g = geometry(1, pad=4)
    alone = region([conv_node(g)], ["w"], (6, 24), (6, 24))
    before = np.linalg.norm(conv_dense(weight.double().numpy(), (24,), g), 2)
    for limit in (0.9 * before, 0.5 * before, 1e-3 * before, 1e-12):
        stored = clip([(alone, limit)], {"w": weight}, before / limit).stored.edits["w"]
        after = np.linalg.norm(conv_dense(stored.double().numpy(), (24,), g), 2)
        assert limit * (1 - 3e-4) <= after <= limit * (1 + 1e-9)
