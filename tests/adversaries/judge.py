"""What must hold of every result, and how close it came to failing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from adversaries.base import Adversary, Draw
from spectool.errors import SpectoolError
from spectool.linear import InfiniteConv
from spectool.spectrum import Spectrum, supremum, svds

PROMISE = 1e-6
METHODS = ("auto", "exact", "lanczos", "power", "powerqr")
CAPS = (None, None, None, 1, 40, 400)


@dataclass(frozen=True)
class Run:
    """How an adversary is solved."""

    dtype: torch.dtype
    method: str
    k: int
    certify: bool
    seed: int
    cap: int | None
    vectors: bool

    @staticmethod
    def drawn(draw: Draw, adversary: Adversary) -> Run:
        methods = METHODS if adversary.iterate else METHODS[:3:2]
        method, k = draw.choice(methods), draw.choice((1, 1, 2, 3, 5, 8, 13, 20))
        cap = draw.choice(CAPS)
        if cap is None and method.startswith("power"):
            cap = 1500
        dtype = draw.choice((torch.float32, torch.float64))
        return Run(dtype, method, k, draw.chance(0.4), draw.integer(0, 9), cap, draw.chance(0.15))


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    failures: What does not hold, in words.
    pressure: How much of the interval around an estimate its error took, the most of all; above 1 is a failure.
    spectrum: What was judged; None if the operator was refused.
    """

    failures: tuple[str, ...]
    pressure: float
    spectrum: Spectrum | None


def judged(adversary: Adversary, run: Run) -> Verdict:
    """Solve and judge."""
    built = adversary.build(run.dtype)
    try:
        found = (
            supremum(built)
            if isinstance(built, InfiniteConv)
            else svds(
                built,
                run.k,
                method=run.method,
                certify=run.certify,
                seed=run.seed,
                max_matvecs=run.cap,
                vectors=run.vectors,
            )
        )
    except SpectoolError as error:
        allowed = "range" in str(error) or "overflow" in str(error) or "in float32" in str(error)
        return Verdict(() if allowed else (f"refused: {error}",), 0.0, None)
    except Exception as error:
        return Verdict((f"{type(error).__name__}: {error}",), 0.0, None)
    return Verdict(tuple(failures(found, adversary, run)), pressure(found, adversary), found)


def failures(found: Spectrum, adversary: Adversary, run: Run) -> list[str]:
    """Return what does not hold, in words."""
    wrong: list[str] = []
    k = min(run.k, len(adversary.sigma))
    sigma, low, high = adversary.sigma[:k], adversary.low[:k], adversary.high[:k]
    values, lower, upper = (np.array(x) for x in (found.values, found.lower, found.upper))
    if not len(values) == len(lower) == len(upper) == k:
        return [f"{len(values)} values, {k} wanted"]
    for name, ends in (("values", values), ("lower", lower)):
        if not np.isfinite(ends).all():
            wrong.append(f"{name} are not finite")
    if np.isnan(upper).any():
        wrong.append("upper is NaN")
    for i in np.flatnonzero(~(lower <= high)):
        wrong.append(f"lower[{i}] = {lower[i]!r} > {sigma[i]!r}")
    for i in np.flatnonzero(~(low <= upper)):
        wrong.append(f"upper[{i}] = {upper[i]!r} < {sigma[i]!r}")
    if not ((lower <= values) & (values <= upper)).all():
        wrong.append("a value lies outside its own interval")
    for name, ends in (("values", values), ("lower", lower), ("upper", upper)):
        if (ends[1:] > ends[:-1]).any():
            wrong.append(f"{name} ascend")
    if found.converged:
        off = np.maximum(values - high, low - values)
        if (off > PROMISE * sigma[0]).any():
            wrong.append(f"converged, but off by {off.max() / sigma[0]:.1e} of σ₁")
    wrong += _multiplicity(found, adversary)
    if found.fro is not None:
        fro = math.hypot(*adversary.sigma)
        if abs(found.fro - fro) > PROMISE * fro + 1e-320:
            wrong.append(f"fro = {found.fro!r}, not {fro!r}")
    wrong += _residuals(found, adversary)
    limit = None if run.cap is None else max(run.cap + 2, 4 * k + 44) + (800 if found.upper_kind else 0)
    if limit and run.method != "exact" and found.method != "dense" and found.matvecs > limit:
        wrong.append(f"{found.matvecs} matvecs under a cap of {run.cap}")
    return wrong


def _multiplicity(found: Spectrum, adversary: Adversary) -> list[str]:
    first = adversary.low[0]
    # Values that agree to 1e-10 (1e-9 where iterated, from vectors that leave them off by 4e-10) count as equal.
    gap = 1.01e-10 if found.multiplicity_exact else 2e-9
    most = int((adversary.high >= first * (1 - gap)).sum())
    least = int((adversary.low == adversary.high[0]).sum()) if found.multiplicity_exact else 1
    if least <= found.multiplicity <= most:
        return []
    return [f"multiplicity {found.multiplicity}, true {least} to {most}, converged {found.converged}"]


def _residuals(found: Spectrum, adversary: Adversary) -> list[str]:
    if found.left is None or found.right is None or adversary.matrix is None or not found.residuals:
        return []
    u, v = (x.flatten(1).double().numpy() for x in (found.left, found.right))
    s, first = np.array(found.values[: len(u)])[:, None], adversary.sigma[0]
    if not first:
        return []
    ahead = np.linalg.norm(v @ adversary.matrix.T - s * u, axis=1)
    back = np.linalg.norm(u @ adversary.matrix - s * v, axis=1)
    true = np.maximum(ahead, back) / first
    # A theorem may have sharpened the value after the vectors were found; the rest is rounding.
    claimed = np.array(found.residuals[: len(u)]) + np.abs(s[:, 0] - adversary.sigma[: len(u)]) / first + 1e-9
    return (
        [f"residual {true.max():.1e} said to be {max(found.residuals):.1e}"]
        if (true > 2 * claimed).any()
        else []
    )


def pressure(found: Spectrum, adversary: Adversary) -> float:
    """Return the largest share of an interval's half that the error of its estimate takes."""
    worst = 0.0
    truth = zip(adversary.low, adversary.high, strict=True)
    for value, low, high, (least, most) in zip(found.values, found.lower, found.upper, truth, strict=False):
        excess = max(value - most, least - value)
        room = (high - value) if least > value else (value - low)
        if excess > 0 and math.isfinite(room):
            worst = max(worst, min(10.0, excess / room) if room > 0 else 10.0)
    return worst
