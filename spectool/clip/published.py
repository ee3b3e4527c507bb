"""Published ways to clip, to compare with: scaling, FastClip; and the exact one for matrices, ``svd_clip``.

Each ends with σ₁ measured in float64 at a tight tolerance and one rescale to the limit, so that what is compared is
what they change, not how far they miss. None of them has a lower bound to offer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectool.clip.bundle import Projection
from spectool.clip.family import Family
from spectool.clip.leading import leading
from spectool.clip.sedghi import sedghi
from spectool.clip.svd import svd_clip
from spectool.errors import OperatorError

__all__ = ["fastclip", "rescaled", "scale", "sedghi", "svd_clip", "top_value"]

_TIGHT = 1e-6  # residual; the value's error is its square
_CLOSE = 1e-7
_BLOWN = 1e3  # growth of a weight in one deflation that is divergence


def top_value(family: Family, weight: Tensor, *, seed: int = 0) -> float:
    """Return σ₁ of A(w), from a cold start, in the type of ``weight``; its error is about 1e-10 in float64."""
    found = leading(family.at(weight), 6, torch.Generator().manual_seed(seed), tol=_tight(weight), blocks=400)
    family.applications += found.applications
    return float(found.values[0])


def rescaled(family: Family, weight: Tensor, limit: float, *, top: float | None = None) -> Tensor:
    """Return t·w with σ₁(A(t·w)) = ``limit``: one division if scaling w scales A, else the root in 0 < t ≤ 1.

    Args:
        family: The operators.
        weight: w; not zero.
        limit: c.
        top: σ₁(A(w)) if known.

    Raises:
        OperatorError: If part of the operator does not depend on the weight and alone exceeds the limit.
    """
    top = top_value(family, weight) if top is None else top
    if top == 0.0 or not math.isfinite(top):
        return weight
    if family.homogeneous:
        return weight * (limit / top)
    if top <= limit:
        return weight
    if top_value(family, torch.zeros_like(weight)) > limit:
        raise OperatorError(
            f"no weight brings the norm below {limit:g}",
            hint="a part of the operator does not depend on it",
        )
    low, high, t = 0.0, 1.0, limit / top
    # σ₁(A(t·w)) is convex in t: a secant from an infeasible point stays infeasible, so halve as well.
    for _ in range(60):
        value = top_value(family, weight * t)
        low, high = (t, high) if value <= limit else (low, t)
        if limit * (1 - _CLOSE) <= value <= limit or high - low < 1e-12:
            break
        t = 0.5 * (low + high)
    return weight * low


def scale(family: Family, limit: float, top: float | None = None) -> Projection:
    """Return the weight divided by σ₁/c; as it is if it obeys.

    Args:
        family: The operators.
        limit: c.
        top: σ₁(A(w₀)) if known.
    """
    spent = family.applications
    top = top_value(family, family.start) if top is None else top
    weight = family.start if top <= limit else rescaled(family, family.start, limit, top=top)
    return Projection(weight, 0.0, "scale", 1, family.applications - spent)


def fastclip(
    family: Family,
    limit: float,
    *,
    deflations: int = 100,
    power_steps: int = 10,
    gradient_steps: int = 5,
    step: float | None = None,
    seed: int = 0,
) -> Projection:
    """Return what FastClip finds: one singular value after the other lowered to c, then one rescale.

    A deflation takes (σ, v) from ``power_steps`` power steps and lowers ½‖A(w′)v − (c/σ)·A(w)v‖² by
    ``gradient_steps`` gradient steps. With a constant step, as published (.35; .01 for compositions), these diverge
    where the curvature ‖L(g)v‖²/‖g‖² exceeds 2/step: a Conv1d of kernel 9 ends in NaN. *Here the step is the exact
    line search of that quadratic*, ‖g‖²/‖L(g)v‖², which cannot diverge; ``step`` brings the constant back, and what
    is rescaled is then the last weight before it blows up. Unlike the published code it never raises a weight whose
    σ₁ is at most c, a power iteration that says so is checked by a cold start, and v is drawn anew per deflation.

    It does not find the nearest weight: it stops at the first that obeys, and has no bound.

    Args:
        family: The operators.
        limit: c.
        deflations: Most singular values lowered.
        power_steps: Power steps per deflation.
        gradient_steps: Gradient steps per deflation.
        step: Constant step in place of the line search.
        seed: Of the start vectors.

    **Source:** A. Ebrahimpour Boroojeny, M. Telgarsky, H. Sundaram, "Spectrum extraction and clipping for
    implicitly linear layers", AISTATS 2024.
    """
    spent, source = family.applications, torch.Generator().manual_seed(seed)
    weight, done, note = family.start, 0, "step by exact line search" if step is None else f"step {step:g}"
    top = top_value(family, weight)
    if top <= limit:
        return Projection(weight, 0.0, "fastclip", 0, family.applications - spent, note)
    for done in range(1, deflations + 1):
        sigma, v = _power(family, weight, power_steps, source)
        if sigma <= limit:
            found = leading(family.at(weight), 6, source, level=limit, tol=1e-3)
            family.applications += found.applications
            if float(found.values[0]) <= limit:
                break
            sigma, v = float(found.values[0]), found.right[:1]
        lowered = _deflate(family, weight, v, limit / sigma, gradient_steps, step)
        if not float(torch.linalg.vector_norm(lowered)) <= _BLOWN * float(torch.linalg.vector_norm(weight)):
            note += f", diverged in deflation {done}"
            break
        weight = lowered
    weight = rescaled(family, weight, limit)
    return Projection(weight, 0.0, "fastclip", done, family.applications - spent, note)


def _power(family: Family, weight: Tensor, steps: int, source: torch.Generator) -> tuple[float, Tensor]:
    """Return (‖A(w)v‖, v) after some power steps from a random row."""
    A = family.at(weight)
    v = torch.randn(1, *A.in_shape, generator=source, dtype=torch.float64).to(weight)
    for _ in range(steps):
        v = A.rmatvec(A.matvec(v))
        v = v / torch.linalg.vector_norm(v).clamp_min(1e-300)
    family.applications += 2 * steps + 1
    return float(torch.linalg.vector_norm(A.matvec(v))), v


def _deflate(
    family: Family, weight: Tensor, v: Tensor, factor: float, steps: int, constant: float | None
) -> Tensor:
    """Lower ½‖A(w′)v − factor·A(w)v‖² by gradient steps on w′."""
    image = family.at(weight).matvec(v)
    goal = factor * image
    family.applications += 1
    for _ in range(steps):
        gradient = family.pull(image - goal, v)
        along = family.at(weight + gradient).matvec(v) - image  # L(g)v
        family.applications += 1
        square, bend = float(gradient.square().sum()), float(along.square().sum())
        if constant is None and (square == 0.0 or bend == 0.0):
            break
        size = square / bend if constant is None else constant
        weight, image = weight - size * gradient, image - size * along
    return weight


def _tight(weight: Tensor) -> float:
    return _TIGHT if weight.dtype == torch.float64 else 1e-4
