"""Thick-restart (block) Lanczos for the largest singular triplets, verified and polished."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectool.linear import MatrixMap, exact_arithmetic
from spectool.progress import Progress, Step, silent
from spectool.spectrum.finish import exhaust, finish, zero_estimate
from spectool.spectrum.gram import Gram
from spectool.spectrum.krylov import Krylov
from spectool.spectrum.polish import rounding_unit
from spectool.spectrum.probabilistic import FAILURE, log_inverse_delta
from spectool.spectrum.starts import fingerprint, gaussian, generator
from spectool.spectrum.verify import MARGIN, Verdict, verify

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spectool.linear import LinearMap
    from spectool.spectrum.estimate import Estimate

BASIS = 24
"""Fewest rows of the basis. Thick restarts make the count of pairs nearly independent of it (20…400 rows: within
3 % on 13 operators), so it is small, because the time of orthogonalisation is not."""

BASIS_MOST = 160
"""Rows the basis may grow to on a stall."""

ROUNDS = 16
"""Most rounds of search and verification."""

CEILING_SHARE = 0.05
"""Part of the failure probability spent on the ceiling; the rounds of verification share 0.7·(1 + ¼ + ¼² + …)."""

COPIES = 4
"""Rows per block of the rounds after the first: what a single vector missed are copies of equal values."""

LARGE = 1 << 22
"""Entries of a matrix beyond which it no longer fits a cache and a block reads it once for all its rows."""


@dataclass(frozen=True)
class Search:
    """What one run of the iteration found, largest first.

    Attributes:
        values: Ritz values of B, float64.
        vectors: Their Ritz vectors, rows.
        worst: Largest relative residual among the wanted ones.
        converged: Whether ``worst`` met the tolerance.
        stalled: Whether the arithmetic of this run cannot do better.
        ceiling: Bound on B's largest eigenvalue from this run's coefficients, inflated; inf if there is none.
    """

    values: NDArray[np.float64]
    vectors: torch.Tensor
    worst: float
    converged: bool
    stalled: bool
    ceiling: float


def lanczos(
    A: LinearMap,
    k: int,
    *,
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    excess: float = 1e-2,
) -> Estimate:
    """Compute the k largest singular triplets of A by thick-restart Lanczos, verified and polished.

    Rounds of: search on AᵀA or AAᵀ (whichever is smaller) in the map's own type, scaled to norm ~1; then a
    verification from a fresh random vector on the complement of what was found. If that sees anything above
    the k-th value, the next round searches the complement with a block and merges. At last one Rayleigh–Ritz
    step in float64. What float32 cannot resolve (σ_k below about 5 % of σ₁ at the default tolerance) continues
    in float64.

    Costs 60–400 pairs for k ≤ 8 on most layers, 2 matvecs each, of which the verification takes 30–60 and the
    polish k. Does not decide convergence by residuals alone: they do not reveal a missed copy. Computes no
    small singular values.

    Args:
        A: The operator.
        k: How many, with multiplicity; clamped to min(m, n).
        tol: Bound on ‖r‖/σ₁ of every pair for ``converged``.
        max_matvecs: Most applications of A plus of Aᵀ; default 2·(200 + 100k). At least about 4k + 20 are spent.
        seed: Enters the start vectors beside the operator itself.
        progress: Told about every convergence test.
        excess: Iterate on until the upper bound of σ₁ is within this of it, relatively. Costs nothing from about
            k = 3 on; at k = 1, where convergence comes first, 1e-2 takes up to 20 pairs more on most layers, 1e-3
            up to 60.
    """
    with exact_arithmetic():
        return _Run(A, k, tol, max_matvecs, seed, progress, excess).estimate()


class _Run:
    """The state of one call of ``lanczos``."""

    def __init__(
        self,
        A: LinearMap,
        k: int,
        tol: float,
        max_matvecs: int | None,
        seed: int,
        progress: Progress,
        excess: float,
    ) -> None:
        self.A, self.tol, self.seed, self.progress, self.excess = A, tol, seed, progress, excess
        self.gram = Gram(A)
        self.k = min(k, self.gram.size)
        self.pairs = (max_matvecs if max_matvecs is not None else 2 * (200 + 100 * k)) // 2
        self.digest = fingerprint(A)

    def source(self, purpose: str) -> torch.Generator:
        return generator(self.digest, self.seed, purpose)

    def left(self) -> int:
        """Pairs that may still be spent, the polish set aside."""
        return self.pairs - self.gram.applications // 2 - self.k

    def estimate(self) -> Estimate:
        gram, k = self.gram, self.k
        if not gram.prescale(gaussian(1, gram.size, self.source("scale"))):
            return zero_estimate(gram, k)
        if gram.size <= max(2 * k, 32):
            return exhaust(gram, k, self.tol)
        values: NDArray[np.float64] = np.empty(0)
        vectors = torch.empty(0, gram.size, dtype=gram.dtype, device=gram.device)
        ceiling, converged, verdict = math.inf, False, Verdict(math.inf, False, False)
        for number in range(ROUNDS):
            found = self._search(vectors, values, number)
            ceiling, converged = min(ceiling, found.ceiling), found.converged
            values, vectors = _merge(values, vectors, found, k)
            if k == 1 and ceiling <= MARGIN**2 * values[0]:
                # Nothing larger can have been missed, and copies do not matter.
                verdict = Verdict(math.sqrt(ceiling), False, True)
                break
            verdict = self._verify(vectors, values, number, tight=math.isinf(ceiling))
            if not verdict.above or not converged or self.left() < 2 * k:
                break
        return finish(
            gram,
            vectors,
            k,
            self.tol,
            tau=verdict.tau,
            ceiling=math.sqrt(ceiling),
            converged=converged and verdict.proven,
            note=_note(found, verdict, self.tol),
        )

    def _search(self, known: torch.Tensor, values: NDArray[np.float64], number: int) -> Search:
        block = 1
        if (
            isinstance(self.A, MatrixMap)
            and self.gram.size * max(*self.A.in_shape, *self.A.out_shape) > LARGE
        ):
            block = 4
        if number:
            block = max(block, min(self.k, COPIES))
        closing = min(48, self.pairs // 4)
        pairs = max(self.left() - closing, self.k + 2)
        found = search(
            self.gram,
            known,
            values,
            self.k,
            self.tol,
            pairs,
            block,
            self.source(f"search {number}"),
            self.progress,
            excess=math.inf if number else self.excess,
        )
        if found.stalled and self.gram.double().dtype != self.gram.dtype:
            self.gram = self.gram.double()
            start = found.vectors.double().sum(dim=0, keepdim=True)
            again = search(
                self.gram,
                known.double(),
                values,
                self.k,
                self.tol,
                max(self.left() - closing, self.k + 2),
                block,
                self.source(f"search {number} again"),
                self.progress,
                start=start,
            )
            found = replace(again, ceiling=found.ceiling)
        # On a complement the coefficients bound the complement only.
        return found if not number else replace(found, ceiling=math.inf)

    def _verify(self, vectors, values, number, *, tight: bool) -> Verdict:
        sources = (self.source(f"verify {number}"), self.source(f"verify {number} again"))
        return verify(
            self.gram,
            vectors,
            float(values[0]),
            float(values[self.k - 1]),
            sources,
            pairs=max(16, min(200, self.left())),
            tight=tight,
            failure=0.7 * FAILURE / 4.0**number,
        )


def search(
    gram: Gram,
    known: torch.Tensor,
    known_values: NDArray[np.float64],
    k: int,
    tol: float,
    pairs: int,
    block: int,
    source: torch.Generator,
    progress: Progress,
    *,
    excess: float = math.inf,
    start: torch.Tensor | None = None,
) -> Search:
    """Iterate on the complement of ``known`` until all of the k largest values, known ones included, converged.

    Args:
        gram: The operator B.
        known: Orthonormal rows found before ``(p, size)``, whose values are ``known_values``.
        known_values: Their eigenvalues of B, descending.
        k: How many values are wanted in all.
        tol: Bound on the relative residuals ‖By − θy‖/sqrt(θ·θ₁).
        pairs: Most pairs to spend.
        block: Rows per step.
        source: Generator for the start and for refills.
        progress: Told about every convergence test.
        excess: Go on after convergence until the ceiling is within this of σ̂₁, relatively.
        start: Start row instead of a random one; gives up the ceiling.
    """
    space = gram.size - len(known)
    capacity = min(max(2 * k + 6 * block, BASIS), space)
    most = min(max(2 * capacity, BASIS_MOST), space)
    krylov = Krylov(gram, known, capacity, block, source, start=start)
    level = log_inverse_delta(gram.size, CEILING_SHARE * FAILURE)
    noise, slack = 4.0 * torch.finfo(gram.dtype).eps, 2.0 * rounding_unit(gram)
    target = max((1.0 + excess) ** 2, 1.0 + 4.0 * slack)
    spent, tested, mark, since = 0, 0, math.inf, 0
    while True:
        # Invariant: spent pairs of this run; the basis has room for one more block, or a test comes first.
        width = krylov.frontier
        full, over = krylov.size + width > capacity or not width, spent + width > pairs
        if full or over or (krylov.size >= k and krylov.size - tested >= max(2, krylov.size // 16)):
            tested = krylov.size
            values, coordinates, errors = krylov.ritz()
            first = float(max([values[0], *known_values[:1]]))
            merged = np.sort(np.concatenate([values, known_values]))[::-1]
            kth = merged[min(k, len(merged)) - 1]
            # The first is always wanted: a later round only runs because something there was seen above the k-th.
            wanted = max(1, int(np.sum(values[:k] >= kth)))
            floor = np.maximum(values[:wanted], np.finfo(np.float64).eps * first)
            residuals = errors[:wanted] / np.sqrt(floor * first)
            worst = float(residuals.max()) if width else 0.0
            converged = worst <= tol and len(merged) >= k
            resolved = noise * math.sqrt(first / floor[-1])
            ceiling = krylov.certificate(values, level) + slack * first if converged or over else math.inf
            loose = math.isfinite(ceiling) and ceiling > target * first
            stalled = (
                not converged
                and resolved > 0.5 * tol
                and bool((errors[:wanted] <= 16.0 * noise * first).all())
            )
            progress(Step("lanczos", matvecs=gram.applications, residual=worst))
            if (converged and not loose) or stalled or over or not width:
                count = min(k, len(values))
                return Search(
                    values[:count].copy(),
                    krylov.vectors(coordinates[:, :count]),
                    worst,
                    converged,
                    stalled,
                    ceiling,
                )
            if full:
                if since > 2 * capacity:
                    if worst > 0.5 * mark and capacity < most:
                        capacity = min(2 * capacity, most)
                        krylov.grow(capacity)
                    mark, since = worst, 0
                keep = k + (krylov.size - k) // 3
                krylov.restart(values, coordinates, keep)
                tested = keep
        krylov.expand()
        spent += width
        since += width


def _merge(
    values: NDArray[np.float64], vectors: torch.Tensor, found: Search, k: int
) -> tuple[NDArray[np.float64], torch.Tensor]:
    """Return the k largest of the known and the newly found pairs, orthonormalised in float64."""
    joined = np.concatenate([values, found.values])
    order = np.argsort(-joined, kind="stable")[:k]
    rows = torch.cat([vectors.to(found.vectors), found.vectors])[torch.from_numpy(order.copy())]
    return joined[order], torch.linalg.qr(rows.double().T).Q.T.to(rows.dtype)


def _note(found: Search, verdict: Verdict, tol: float) -> str:
    """Say in words why a run did not converge; empty if it did."""
    if not found.converged:
        return f"not converged: residual {found.worst:.1e} of the tolerance {tol:.1e} when the budget ended"
    if verdict.above:
        return "not converged: the verification saw a larger value than could be computed within the budget"
    if not verdict.proven:
        return "not converged: the verification could not bound what is left within the budget"
    return ""
