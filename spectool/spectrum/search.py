"""The iteration of ``lanczos``: expand, test, restart, until the wanted values have converged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectool.progress import Progress, Step
from spectool.spectrum.hochstenbach import FAILURE, log_inverse_delta
from spectool.spectrum.krylov import Krylov
from spectool.spectrum.polish import PROMISE
from spectool.spectrum.rounding import application_error
from spectool.spectrum.verify import CLOSE, FINE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spectool.spectrum.gram import Gram
    from spectool.spectrum.starts import Stream

BASIS = 24
"""Fewest rows of the basis. Thick restarts make the count of pairs nearly independent of it (20…400 rows: within
3 % on 13 operators), so it is small, because the time of orthogonalisation is not."""

BASIS_MOST = 160
"""Rows the basis may grow to on a stall."""

BASIS_BYTES = 1 << 31
"""Memory it may grow to then."""

SPARE = 4
"""Most Ritz vectors beyond the k-th that a search hands on. Each costs a pair in the polish."""

CLEAR = 0.2
"""Part of the tolerance that residuals are taken down to where rounding allows: between values 1e-5 apart, vectors that
just meet the tolerance can be mixtures, with values that are off by as much. A few pairs more here spare a block step
of the polish."""

LINGER = 40
"""Pairs after convergence in which a run for one value may become sure that none is larger."""

NOISY = 64.0
"""Multiple of the rounding of one application below which a residual that has stopped falling will not fall again."""

CEILING_SHARE = 0.05
"""Part of the failure probability spent on the ceiling; the verifications share 0.7·(1 + ¼ + ¼² + …)."""


@dataclass(frozen=True)
class Search:
    """What one run of the iteration found, largest first.

    Attributes:
        values: Ritz values of B: the k wanted ones, then those of ``_spare``.
        vectors: Their Ritz vectors, rows.
        worst: Largest relative residual among the wanted ones.
        converged: Whether ``worst`` met the tolerance.
        stalled: Whether the arithmetic of this run cannot do better.
        ceiling: Bound on B's largest eigenvalue on the complement of the known rows, from this run's
            coefficients, inflated by rounding; inf if there is none.
        clear: Whether (k = 1) nothing is larger than the first value by more than is promised, with probability
            1 − ``CLOSE``.
    """

    values: NDArray[np.float64]
    vectors: torch.Tensor
    worst: float
    converged: bool
    stalled: bool
    ceiling: float
    clear: bool = False


@dataclass(frozen=True)
class Aim:
    """What a run is to reach.

    Attributes:
        k: How many values are wanted in all, known ones included.
        tol: Bound on the relative residuals ‖By − θy‖/sqrt(θ·θ₁).
        pairs: Most pairs to spend.
        excess: Go on after convergence until the ceiling is within this of σ̂₁, relatively.
    """

    k: int
    tol: float
    pairs: int
    excess: float = math.inf


def search(
    gram: Gram,
    known: torch.Tensor,
    known_values: NDArray[np.float64],
    aim: Aim,
    block: int,
    source: Stream,
    progress: Progress,
    *,
    start: torch.Tensor | None = None,
) -> Search:
    """Iterate on the complement of ``known`` until the k largest values, known ones included, have converged.

    Args:
        gram: The operator B.
        known: Orthonormal rows found before ``(p, size)``, whose values are ``known_values``.
        known_values: Their eigenvalues of B, descending.
        aim: What to reach.
        block: Rows per step.
        source: Generator for the start and for refills.
        progress: Told about every convergence test.
        start: Start row instead of a random one; gives up the ceiling.
    """
    space = gram.size - len(known)
    capacity = min(max(2 * aim.k + 6 * block, BASIS), space)
    room = BASIS_BYTES // (gram.size * torch.finfo(gram.dtype).bits // 8)
    most = max(capacity, min(max(2 * capacity, BASIS_MOST), space, room))
    krylov = Krylov(gram, known, capacity, block, source, start=start)
    level = log_inverse_delta(gram.size, CEILING_SHARE * FAILURE)
    target = (1.0 + aim.excess) ** 2
    spent, due, before = 0, aim.k, (0, math.inf)
    mark, best = 0, math.inf
    settled, clear = 0, False
    close = log_inverse_delta(gram.size, CLOSE)
    while True:
        # Invariant: ``spent`` pairs so far; a test comes when it is due, or when no block fits any more.
        width = krylov.frontier
        full, over = krylov.size + width > capacity or not width, spent + width > aim.pairs
        if full or over or (krylov.size >= aim.k and spent >= due):
            state = _test(krylov, known_values, aim)
            progress(Step("lanczos", matvecs=gram.applications, residual=state.worst))
            done = state.converged or state.stalled
            ceiling = math.inf
            if done and aim.k == 1 and aim.excess < math.inf:
                # At k = 1 these coefficients also tell whether a larger value is near: no other run has to.
                likely = krylov.certificate(state.values, close)
                clear = likely <= (1.0 + max(PROMISE, 0.1 * aim.tol)) ** 2 * state.first
                settled = settled or spent
                done &= clear or state.stalled or math.isinf(likely) or spent > settled + LINGER
            if done or over:
                slack = 2.0 * application_error(gram, math.sqrt(state.first)) * math.sqrt(state.first)
                ceiling = krylov.certificate(state.values, level) + slack
                # Rounding alone may keep the ceiling up: more pairs would not help.
                goal = max(target * state.first, state.first + 4.0 * slack)
                done &= state.stalled or ceiling <= goal or math.isinf(ceiling)
            # No progress at this level is rounding: a cluster 1e-7 wide keeps float32 at residuals of 1e-5.
            stuck = full and spent - mark > 4 * capacity and state.worst <= NOISY * state.noise
            stuck &= gram.double() is not gram
            if done or over or stuck or not width:
                chosen = _spare(krylov, state, aim)
                vectors = krylov.vectors(state.coordinates[:, chosen])
                values = state.values[chosen].copy()
                stalled = state.stalled or stuck
                return Search(values, vectors, state.worst, state.converged, stalled, ceiling, clear)
            due = spent + _wait(spent, before, state.worst, aim.tol)
            before = (spent, state.worst)
            if state.worst < 0.5 * best:
                mark, best = spent, state.worst
            if full:
                if spent - mark > 4 * capacity and capacity < most:
                    capacity, mark = min(2 * capacity, most), spent
                    krylov.grow(capacity)
                keep = aim.k + (krylov.size - aim.k) // 3
                krylov.restart(state.values, state.coordinates, keep)
        krylov.expand()
        spent += width


@dataclass(frozen=True)
class _State:
    values: NDArray[np.float64]
    coordinates: NDArray[np.float64]
    first: float
    worst: float
    converged: bool
    stalled: bool
    noise: float  # what one application's rounding makes of a relative residual


def _test(krylov: Krylov, known_values: NDArray[np.float64], aim: Aim) -> _State:
    """Compute the Ritz pairs and say how far the wanted ones are."""
    values, coordinates, errors = krylov.ritz()
    first = float(max([values[0], *known_values[:1]]))
    merged = np.sort(np.concatenate([values, known_values]))[::-1]
    kth = merged[min(aim.k, len(merged)) - 1]
    # The first is wanted in any case: a later run is made because something there was seen above the k-th.
    wanted = max(1, int(np.sum(values[: aim.k] >= kth)))
    floor = np.maximum(values[:wanted], np.finfo(np.float64).eps * first)
    worst = float((errors[:wanted] / np.sqrt(floor * first)).max()) if krylov.frontier else 0.0
    # B is applied with an error of about noise·θ₁, which ``errors`` do not see; relative to a small θ that can be
    # more than the tolerance.
    noise = 4.0 * torch.finfo(krylov.gram.dtype).eps
    # Far below σ₁ the tolerance says little about a value: there its own size counts, down to the promise.
    vague = (errors[:wanted] > np.maximum(0.01 * values[:wanted], 4.0 * noise * first)) & (
        values[:wanted] > 0.1 * PROMISE**2 * first
    )
    reach = noise * math.sqrt(first / floor[-1])
    small = (
        worst <= min(aim.tol, max(CLEAR * aim.tol, 4.0 * reach))
        and len(merged) >= aim.k
        and not (krylov.frontier and vague.any())
    )
    hopeless = reach > 0.5 * aim.tol
    stalled = hopeless and (small or bool((errors[:wanted] <= 16.0 * noise * first).all()))
    return _State(values, coordinates, first, worst, small and not hopeless, stalled, reach)


def _spare(krylov: Krylov, state: _State, aim: Aim) -> list[int]:
    """Return the places of the k wanted Ritz values, and of up to ``SPARE`` more that are good enough to verify with.

    They come free, and a verification that has them out of the way tells what was missed from what comes next in
    fewer pairs. In bases that begin with the Ritz vectors, B is [[Θ, C], [Cᵀ, D]]; where D ≤ t, no more
    eigenvalues of B exceed x = t + w than eigenvalues of Θ + CCᵀ/w do. So with C small enough for the next one to
    stay below x at w = ``FINE``·tol·θ₁, a half-converged vector hides nothing that matters.
    """
    chosen = list(range(min(aim.k, len(state.values))))
    if not state.converged or not krylov.frontier:
        return chosen
    width = FINE * aim.tol * state.first
    coupling = krylov.link @ state.coordinates
    limit = state.values[chosen[-1]] + width
    for place in range(aim.k, min(aim.k + SPARE, len(state.values))):
        trial = [*chosen, place]
        part = coupling[:, trial]
        schur = np.diag(state.values[trial]) + part.T @ part / width
        if np.linalg.eigvalsh(schur)[-aim.k] <= limit:
            chosen = trial
    return chosen


def _wait(spent: int, before: tuple[int, float], worst: float, tol: float) -> int:
    """Return after how many pairs to test again: half of what the last two tests extrapolate to."""
    if not 0.0 < worst < before[1] < math.inf:
        return 4
    slope = math.log(before[1] / worst) / max(1, spent - before[0])
    return int(min(6.0, max(2.0, 0.5 * math.log(max(1.0, worst / tol)) / slope)))
