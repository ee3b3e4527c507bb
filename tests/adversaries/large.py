"""σ₁ in one coordinate out of 10⁵: what a random start vector hardly touches."""

from __future__ import annotations

import numpy as np
import torch

from adversaries.base import Adversary, Draw, exactly
from adversaries.spectra import spectrum
from spectool.linear import FunctionMap, LinearMap


def needles(draw: Draw) -> Adversary | None:
    """A permuted diagonal of 2 000 to 100 000 entries, given as a function."""
    n, rng = draw.choice((2000, 20000, 100000)), draw.rng()
    values = np.full(n, draw.choice((0.0, 1e-6, 0.3, 0.9, 0.999)))
    if draw.chance(0.4):
        values *= rng.random(n)
    head = spectrum(draw, draw.integer(1, 60) + 1)
    values[: len(head)] = np.maximum(head, values[: len(head)])
    weight = torch.from_numpy(values).float()
    order = torch.from_numpy(rng.permutation(n))
    back = torch.argsort(order)

    def make(working: torch.dtype, device: object = None) -> object:
        copy = weight.to(working)
        return lambda x: (x[:, back] * copy)[:, order]

    def build(working: torch.dtype) -> LinearMap:
        return FunctionMap(make(working), (n,), dtype=working, remake=make)

    return exactly(f"needle in {n}", build, weight.double().numpy(), iterate=False)


FAMILIES = (needles,)
