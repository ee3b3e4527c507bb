"""Convolutions of odd geometry, one group at a time known to its own precision."""

from __future__ import annotations

import numpy as np
import torch
from dense import Matrix, conv_matrix, conv_transpose_matrix

from adversaries.base import TYPES, Adversary, Draw, by_numpy
from adversaries.spectra import SCALES
from spectool.errors import OperatorError
from spectool.linear import ConvGeometry, ConvMap

_MOST = 1 << 16  # entries of a group's dense matrix


def kernel(draw: Draw, shape: tuple[int, ...]) -> Matrix:
    """One group's kernel ``(out, in, *k)``."""
    rng = draw.rng()
    values = rng.standard_normal(shape)
    match draw.choice(
        ("plain", "plain", "integers", "constant", "graded", "delta", "near identity", "rank one", "smooth")
    ):
        case "integers":
            values = rng.integers(-2, 3, shape).astype(float)
        case "constant":
            values = np.ones(shape)
        case "graded":
            values *= np.logspace(0, -draw.choice((6, 20, 40)), values.size).reshape(shape)
        case "delta":
            values = np.zeros(shape)
            values.flat[rng.integers(values.size)] = 1.0
        case "near identity":  # a symbol that hardly moves
            values *= 10.0 ** -draw.integer(3, 15)
            values[(slice(None), slice(None), *(k // 2 for k in shape[2:]))] += np.eye(*shape[:2])
        case "rank one":
            values = np.ones(())
            for size in shape:
                values = np.multiply.outer(values, rng.standard_normal(size))
            values = values * (1 + draw.choice((0.0, 1e-15, 1e-13, 1e-12)) * rng.standard_normal(shape))
        case "smooth":
            values = np.ones(shape) * rng.standard_normal(shape[:2]).reshape(
                *shape[:2], *[1] * (len(shape) - 2)
            )
    return np.asarray(values)


def convolutions(draw: Draw) -> Adversary | None:
    """Any stride, padding, dilation, mode, type and scale; groups of very different size."""
    dims = draw.choice((1, 1, 2, 2, 3))
    groups, ins, outs = draw.choice((1, 1, 2, 3, 5)), draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3))
    n = [draw.choice((1, 1, 2, 3, 5, 8) if dims > 1 else (1, 2, 5, 9, 30)) for _ in range(dims)]
    k = [draw.integer(1, 5) for _ in range(dims)]
    s = [draw.choice((1, 1, 2, 3, 7)) for _ in range(dims)]
    d = [draw.choice((1, 1, 2, 3, 9)) for _ in range(dims)]
    mode = draw.choice(("zeros",) * 5 + ("circular", "reflect", "replicate"))
    pads = []
    for axis in range(dims):
        reach = d[axis] * (k[axis] - 1)
        lead = draw.choice((0, 1, 2, reach // 2, reach, k[axis] + 4))
        most = n[axis] - (mode == "reflect") if mode != "zeros" else 99
        lead = min(lead, most)
        pads.append((lead, min(most, max(0, lead + draw.choice((0, 0, 0, -1, 1))))))
    transposed = mode == "zeros" and draw.chance(0.3)
    shape = (ins, outs, *k) if transposed else (outs, ins, *k)
    dtype = draw.choice(TYPES)
    exponent = draw.choice(SCALES)
    apart = draw.choice((0, 0, 10, 70, 300, 560)) if dtype == torch.float64 else draw.choice((0, 0, 10, 30))
    parts = [
        torch.from_numpy(np.ldexp(kernel(draw, shape), exponent - apart * g)).to(dtype) for g in range(groups)
    ]
    weight = torch.cat(parts)
    if not bool(torch.isfinite(weight).all()):
        return None
    geometry = ConvGeometry(tuple(s), tuple(pads), tuple(d), groups, mode, transposed, ())
    try:
        ConvMap(weight, (groups * ins, *n), geometry)
    except OperatorError:
        return None
    found = []
    for part in parts:
        single = part.double().numpy()
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # padding may add up what is at the end of the range
            matrix = (
                conv_transpose_matrix(single, n, s, pads, d)
                if transposed
                else conv_matrix(single, n, s, pads, d, 1, mode)
            )
        if not 0 < matrix.size <= _MOST or not np.isfinite(matrix).all():
            return None
        found.append(matrix)
    return by_numpy(
        f"conv{dims}d n{n} k{k} s{s} d{d} p{pads} {groups}×({outs}←{ins}) {mode} {dtype} 2^{exponent}"
        + " transposed" * transposed,
        lambda working: ConvMap(weight, (groups * ins, *n), geometry, dtype=working),
        found,
    )


FAMILIES = (convolutions,)
