"""Verification: is anything left outside the vectors found, and how large can it be?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from spectool.spectrum.gram import inner, length
from spectool.spectrum.hochstenbach import Sturm, hochstenbach, log_inverse_delta
from spectool.spectrum.polish import PROMISE
from spectool.spectrum.rounding import application_error

if TYPE_CHECKING:
    from spectool.spectrum.gram import Gram
    from spectool.spectrum.starts import Stream

BREAKDOWN = 1e-8
"""A β below this times the largest Ritz value ends a certifying run; what follows would be rounding noise."""

SMALL = 1e-2
"""The same in float32 where float64 can be had: few distinct values are left, what follows is amplified rounding
(of up to 2e-5 in a Ritz value), and float64 goes on without it."""

MARGIN = 1.05
"""A verification is content when what is left is at most this times the k-th value."""

TIGHT = 1.001
"""... and prefers, while that is cheap, what is left to be at most this times the first value."""

STUCK = 12
"""Pairs after which a Ritz value that has reached σ_k's level and not passed it counts as a copy of σ_k. float32 then
takes up ghosts of the copy as fast as it learns about the rest; float64 does not."""

SOON = 8
"""Pairs within which only a value with very many copies is seen."""

MISSED = 1e-4
"""Probability that a verification which is content has overlooked a value that was missed. Half the pairs of what
the intervals' 1e-9 would take: a miss is rare, and this counts only once there is one."""

CLOSE = 1e-2
"""Probability that the bound does not hold by which vectors are judged: whether they may be mixtures with something
outside. Where nothing is near, a run that is content has this bound half-way down to the next value."""

FINE = 0.05
"""Part of the tolerance by which a value may be off, relative to σ₁, for what was missed to count as a copy of it: at
the default tolerance half the accuracy that is promised. The other half is for what a run does not see at once."""

SHARP = 0.02
"""Rounding, relative to the k-th eigenvalue, above which the run is done in float64."""


@dataclass(frozen=True)
class Check:
    """What a verification run saw.

    Attributes:
        bound: Upper bound on the largest eigenvalue of B on the complement (not yet inflated by rounding).
        above: Whether a Ritz value on the complement lies above the level that was given.
        broke: Whether the run ended by breakdown.
        steps: Pairs it took.
        complete: Whether a value above the level of ``Content`` would have been seen.
        few: Whether there are few distinct values, because a run broke down or saw something within ``SOON`` pairs.
        sure: As ``bound``, wrong with probability ``CLOSE``; inf without a ``Content``.
    """

    bound: float
    above: bool
    broke: bool
    steps: int
    complete: bool
    few: bool = False
    sure: float = math.inf


@dataclass(frozen=True)
class Content:
    """When a run may say that nothing was missed.

    Attributes:
        level: An eigenvalue of the complement above this one ...
        failure: ... is overlooked with at most this probability.
    """

    level: float
    failure: float


def complement_run(
    gram: Gram,
    vectors: torch.Tensor,
    source: Stream,
    *,
    above: float,
    goals: tuple[tuple[float, int], ...],
    failure: float,
    content: Content | None = None,
    floor: float = BREAKDOWN,
    near: float = math.inf,
) -> Check:
    """Run single-vector Lanczos on (I−VᵀV)B(I−VᵀV) from a fresh random vector, coefficients in float64.

    Unrestarted, unrefilled and without reorthogonalisation: by Greenbaum's theorem its coefficients are those of
    an exact run on an operator whose eigenvalues lie within rounding of B's, which is all the bound needs. No
    basis is stored.

    Args:
        gram: The operator.
        vectors: V, orthonormal rows ``(p, size)``.
        source: Generator no earlier vector came from.
        above: A Ritz value above this eigenvalue ends the run at once (something was missed).
        goals: (eigenvalue, pairs) in order: the run stops when its bound is ≤ eigenvalue; from ``pairs`` on
            the next goal counts, after the last the run ends.
        failure: Probability that the bound does not hold.
        content: What the run has to make sure of before it stops at a goal; None if nothing.
        floor: A β below this times the largest Ritz value is a breakdown ...
        near: ... and so is a Ritz value between this eigenvalue and ``above`` for ``STUCK`` pairs.
    """
    size, level = gram.size - len(vectors), log_inverse_delta(gram.size, failure)
    if size <= 0:
        return Check(0.0, False, False, 0, True, sure=0.0)
    vectors = gram.take(vectors)
    q = gram.random(1, source)
    for _ in range(2):
        q = q - (q @ vectors.T) @ vectors
        q = q / torch.linalg.vector_norm(q)
    previous, last = torch.zeros_like(q), 0.0
    alphas: list[float] = []
    betas: list[float] = []
    watch, copy, stuck = Sturm(above), Sturm(near), 0
    marks = [Sturm(value) for value, _ in goals]
    sure = Sturm(content.level if content else math.inf)
    due = log_inverse_delta(gram.size, content.failure) if content else -math.inf
    budget, broke, scale = goals[-1][1], False, 0.0
    # Without reorthogonalisation rounding lets a run go on beyond the dimension of the space.
    for step in range(1, min(3 * size, budget) + 1):
        # Invariant: q is a unit row of the complement, previous the one before it, last their coupling.
        w = gram(q)
        w.addmm_(w @ vectors.T, vectors, alpha=-1)
        alpha = float(inner(q, w))
        w.sub_(q, alpha=alpha).sub_(previous, alpha=last)
        beta = length(w)
        scale = max(scale, alpha + last + beta)
        noise = torch.finfo(gram.dtype).eps * scale
        alphas.append(alpha)
        betas.append(max(beta, noise, 1e-300))
        for sturm in (watch, *marks, *([sure] if content else []), *([copy] if near < above else [])):
            sturm.push(alphas[-1], betas[-1])
        if watch.passed:
            break
        stage = next((i for i, (_, pairs) in enumerate(goals) if step < pairs), len(goals) - 1)
        reached = any(not mark.passed and mark.log >= level for mark in marks[: stage + 1])
        if reached and sure.log >= due:
            break
        stuck += copy.passed
        if beta <= max(floor * scale, 64.0 * noise) or stuck > STUCK:
            broke = True
            break
        previous, q, last = q, w / beta, beta
    bound = hochstenbach(alphas, betas, level)
    certain = not sure.passed and sure.log >= due
    few = (broke and stuck <= STUCK) or len(alphas) <= SOON
    # A run that is one of four has a fourth of the logarithm to show, here as in ``due``.
    part = math.log(content.failure) / math.log(MISSED) if content else 1.0
    likely = hochstenbach(alphas, betas, due - part * math.log(CLOSE / MISSED)) if content else math.inf
    return Check(bound, watch.passed, broke, len(alphas), complete=certain, few=few, sure=likely)


def bounded_run(
    gram: Gram,
    vectors: torch.Tensor,
    source: Callable[[str], Stream],
    *,
    above: float,
    goals: tuple[tuple[float, int], ...],
    failure: float,
    content: Content | None = None,
    near: float = math.inf,
) -> tuple[Check, Gram]:
    """Do a ``complement_run``; where it breaks down, more in float64. Return (what was seen, operator used).

    First one in float64 from another vector, if this one was not. Where that breaks down too, the bound is about
    β/δ above the largest Ritz value, and β, which ought to be 0, is rounding: a loose bound. Four independent runs,
    each with failure probability ε^¼, all fail with probability ε only; so the largest of their bounds holds, and
    1/δ is the fourth root of what it was. Such runs are a few pairs long.
    """
    check = complement_run(
        gram,
        vectors,
        source(""),
        above=above,
        goals=goals,
        failure=0.9 * failure,
        content=content,
        **({} if gram.double() is gram else {"floor": SMALL, "near": near}),
    )
    if check.broke and not check.above and gram.double() is not gram:
        spent, few = check.steps, check.few
        gram = gram.double()
        check = complement_run(
            gram,
            vectors,
            source(" in float64"),
            above=above,
            goals=tuple((value, max(1, pairs - spent)) for value, pairs in goals),
            failure=0.9 * failure,
            content=content,
        )
        check = replace(check, few=few)
    if not check.broke or check.above:
        return check, gram
    part = (0.1 * failure) ** 0.25
    each = content and Content(content.level, content.failure**0.25)
    runs = [
        complement_run(
            gram, vectors, source(f" {name}"), above=above, goals=goals, failure=part, content=each
        )
        for name in range(4)
    ]
    return Check(
        bound=max(run.bound for run in runs),
        above=any(run.above for run in runs),
        broke=True,
        steps=sum(run.steps for run in runs),
        complete=all(run.complete for run in runs),
        few=True,
        sure=max(run.sure for run in runs),
    ), gram


@dataclass(frozen=True)
class Verdict:
    """The outcome of a verification.

    Attributes:
        tau: Bound on the norm of f·M on the complement, rounding included; holds with probability
            ≥ 1 − ``failure``.
        above: Whether something larger than the k-th value was seen on the complement.
        proven: Whether tau ≤ 1.05·(k-th value), or tau is below what the arithmetic resolves.
        complete: Whether a larger value than the k-th would have been seen, with probability 1 − 1e-4.
        few: Whether there are few distinct values, each with many copies.
        sure: As ``tau`` without the rounding, and wrong with probability 1e-2.
    """

    tau: float
    above: bool
    proven: bool
    complete: bool
    few: bool = False
    sure: float = math.inf


def verify(
    gram: Gram,
    vectors: torch.Tensor,
    first: float,
    last: float,
    source: Callable[[str], Stream],
    *,
    pairs: int,
    tight: bool,
    tol: float,
    failure: float,
    complete: bool = True,
) -> Verdict:
    """Look for something above ``last`` on the complement of ``vectors``, and bound what is there.

    Args:
        gram: The operator.
        vectors: Orthonormal rows ``(p, size)``.
        first: Largest eigenvalue of B found.
        last: k-th largest eigenvalue of B found.
        source: Makes the generator of a run from a suffix.
        pairs: Most pairs to spend.
        tight: Whether to go on, for up to 100 pairs, until ``tau`` bounds the first value well too.
        tol: Relative residuals of the vectors: their values are accurate to about its square, and what they
            missed by that much is left on the complement.
        failure: Probability that ``tau`` does not hold.
        complete: Whether to go on until a larger value than the k-th would have been seen.
    """
    slack = _slack(gram, first)
    if slack > SHARP * last:
        gram = gram.double()
        slack = _slack(gram, first)
    # What is below the promised accuracy, or below the rounding of a Gram operator, is zero for all that is said.
    accept = max(MARGIN**2 * last, PROMISE**2 * first, 4.0 * slack)
    goal = max(min(accept, TIGHT**2 * first), 2.0 * slack) if tight else accept
    # Rounding of a Ritz value; inaccuracy of the values (second order); what inaccurate vectors leave behind.
    margin = 8.0 * torch.finfo(gram.dtype).eps * first + tol**2 * (30.0 * last + 2.0 * first)
    fine = (math.sqrt(max(last, 0.0)) + FINE * tol * math.sqrt(first)) ** 2
    above = max(last + margin, fine)
    check, gram = bounded_run(
        gram,
        vectors,
        source,
        above=above,
        goals=((goal - slack, min(pairs, 100)), (accept - slack, pairs)),
        failure=failure,
        content=Content(max(above, PROMISE**2 * first), MISSED) if complete else None,
        near=last - 4.0 * (above - last) if complete else math.inf,
    )
    bound = check.bound + _slack(gram, first)
    proven = not check.above and bound <= accept
    # Not inflated: it is a measure of accuracy, which is a thousand times that of the worst rounding.
    sure = check.sure**0.5
    return Verdict(bound**0.5, check.above, proven, check.complete, check.few, sure)


def _slack(gram: Gram, first: float) -> float:
    """Bound the error of f²·MᵀM·x for a unit vector x, ``first`` being its largest eigenvalue: two applications."""
    norm = math.sqrt(max(first, 0.0))
    return 2.0 * application_error(gram, norm) * norm
