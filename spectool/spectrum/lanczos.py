"""Thick-restart (block) Lanczos for the largest singular triplets, verified and polished."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectool.linear import exact_arithmetic
from spectool.progress import Progress, silent
from spectool.spectrum.finish import exhaust, finish, zero_estimate
from spectool.spectrum.gram import Gram, wide
from spectool.spectrum.hochstenbach import FAILURE
from spectool.spectrum.rounding import begin, reserve
from spectool.spectrum.search import SPARE, Aim, Search, search
from spectool.spectrum.starts import Stream, fingerprint, generator
from spectool.spectrum.verify import MARGIN, Verdict, verify

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spectool.linear import LinearMap
    from spectool.spectrum.estimate import Estimate

ROUNDS = 16
"""Most rounds of search and verification."""

FLOAT32_ROUNDS = 3
"""Rounds after which float64 goes on: the errors of float32's values, 1e-7, can be what the verification sees. A
cluster 1e-7 wide took eleven rounds without an end."""

COPIES = 4
"""Rows per block of the rounds after the first where few distinct values have many copies each, of which a single
vector finds one a round. Else a single vector takes half the applications of such a block, because what was missed
is often one copy, and mostly far fewer than k. The first round is single-vector everywhere: even on a 4096 × 4096
matrix, where a block of 4 reads the weight half as often, it took the same time, twice the applications, and its
coefficients certify nothing."""

PATIENCE = 800
"""Most pairs of a verification that is to see what was missed: a cluster 1e-7 wide at σ_k takes up to 500."""

CLOSING = 48
"""Pairs set aside for a verification."""

SAFETY = (0.7, 0.5)
"""Part of the tolerance that the recurrence's residuals must meet in the first and in later rounds: what two or
three rounds found is mixed at the end, and the explicit residuals of the mixture must meet the whole."""


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
    verification from a fresh random vector on the complement of what was found, until it would have seen what
    was missed with probability 1 − 1e-4 (given that there is such a thing). If it sees anything above the k-th
    value, the next round searches the complement and merges. At last one Rayleigh–Ritz
    step in float64. What float32 cannot resolve (σ_k below about 5 % of σ₁ at the default tolerance) continues
    in float64.

    Costs 60–400 pairs for k ≤ 8 on most layers, 2 matvecs each, of which the verification takes 30–90 (about
    twice that where the (k+1)-th value is a copy of the k-th) and the polish k + 4. Does not decide convergence by
    residuals alone: they do not reveal a missed copy. Computes no small singular values.

    Args:
        A: The operator.
        k: How many, with multiplicity; clamped to min(m, n).
        tol: Bound on ‖r‖/σ₁ of every pair for ``converged``.
        max_matvecs: Most applications of A plus of Aᵀ; default 2·(200 + 100k). At least about 4k + 20 are spent,
            for a function 24 more.
        seed: Enters the start vectors beside the operator itself.
        progress: Told about every convergence test.
        excess: Iterate on until the upper bound of σ₁ is within this of it, relatively. Costs nothing from about
            k = 3 on; at k = 1, where convergence comes first, 1e-2 takes up to 20 pairs more on most layers, 1e-3
            up to 60.
    """
    with exact_arithmetic(), torch.no_grad():
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

    def source(self, purpose: str) -> Stream:
        return generator(self.digest, self.seed, purpose)

    def left(self) -> int:
        """Pairs that may still be spent, the polish set aside."""
        return self.pairs - self.gram.applications // 2 - self.k - reserve(self.gram)

    def estimate(self) -> Estimate:
        gram, k = self.gram, self.k
        if not begin(gram, self.source("scale")):
            return zero_estimate(gram, k)
        if gram.size <= max(2 * k, 32):
            return exhaust(gram, k, self.tol)
        values: NDArray[np.float64] = np.empty(0)
        vectors = torch.empty(0, gram.size, dtype=gram.dtype, device=gram.device)
        few = False
        ceiling, converged, verdict = math.inf, False, Verdict(math.inf, False, False, False)
        for number in range(ROUNDS):
            few |= verdict.few
            if number >= FLOAT32_ROUNDS and self.gram.double() is not self.gram:
                values, vectors = self._refined(vectors)
            block = min(k, COPIES) if few else 1
            found = self._search(vectors, values, number, block)
            ceiling, converged = min(ceiling, found.ceiling), found.converged
            values, vectors, spare = _merge(self.gram, values, vectors, found, k)
            if k == 1 and found.clear and ceiling <= MARGIN**2 * values[0]:
                # Nothing larger can have been missed, and copies do not matter. The ceiling alone would not do: of two
                # values 1e-5 apart the smaller can meet the tolerance first.
                verdict = Verdict(math.sqrt(ceiling), False, True, True, sure=0.0)
                spare = spare[:0]
                break
            verdict = self._verify(
                torch.cat([vectors, spare]), values, number, tight=math.isinf(ceiling), complete=converged
            )
            if not verdict.above or not converged or self.left() < 2 * k:
                break
        return finish(
            gram,
            torch.cat([vectors, spare]),
            k,
            self.tol,
            tau=verdict.tau,
            sure=verdict.sure,
            ceiling=math.sqrt(ceiling),
            converged=converged and verdict.proven and verdict.complete,
            note=_note(found, verdict, self.tol),
            most=2 * self.pairs,
        )

    def _search(self, known: torch.Tensor, values: NDArray[np.float64], number: int, block: int) -> Search:
        """Search the complement of ``known``; go on in float64 where this arithmetic does not reach."""
        excess = math.inf if number else self.excess
        safety = SAFETY[min(number, 1)]
        found = search(
            self.gram,
            known,
            values,
            self._aim(excess, safety),
            block,
            self.source(f"search {number}"),
            self.progress,
        )
        if found.stalled and self.gram.double() is not self.gram:
            self.gram = self.gram.double()
            start = self.gram.take(found.vectors).sum(dim=0, keepdim=True)
            again = search(
                self.gram,
                self.gram.take(known),
                values,
                self._aim(math.inf, safety),
                block,
                self.source(f"search {number} again"),
                self.progress,
                start=start,
            )
            found = replace(again, ceiling=found.ceiling)
        # On a complement the coefficients bound the complement only.
        return replace(found, ceiling=math.inf) if number else found

    def _refined(self, vectors: torch.Tensor) -> tuple[NDArray[np.float64], torch.Tensor]:
        """Go over to float64, and return the eigenvalues and vectors of the same span in it. Costs a matvec a row."""
        self.gram = self.gram.double()
        rows = torch.linalg.qr(wide(vectors).T).Q.T
        _, values, turn = torch.linalg.svd(
            wide(self.gram.forward(self.gram.take(rows))).T, full_matrices=False
        )
        return values.square().cpu().numpy(), self.gram.take(turn @ rows)

    def _aim(self, excess: float, safety: float) -> Aim:
        closing = max(8, min(CLOSING, self.pairs // 4))
        return Aim(self.k, safety * self.tol, max(self.left() - closing, self.k + 2), excess)

    def _verify(
        self,
        vectors: torch.Tensor,
        values: NDArray[np.float64],
        number: int,
        *,
        tight: bool,
        complete: bool,
    ) -> Verdict:
        # Where there are copies, some may be left on the complement at the level of σ_k itself: float64 tells them
        # from larger ones in half the pairs, and does not mistake amplified rounding for one.
        return verify(
            self.gram.double() if number else self.gram,
            vectors,
            float(values[0]),
            float(values[self.k - 1]),
            lambda suffix: self.source(f"verify {number}{suffix}"),
            pairs=max(8, min(PATIENCE if complete else 200, self.left() - (len(vectors) - self.k))),
            tight=tight,
            tol=self.tol,
            failure=0.7 * FAILURE / 4.0**number,
            complete=complete,
        )


def _merge(
    gram: Gram, values: NDArray[np.float64], vectors: torch.Tensor, found: Search, k: int
) -> tuple[NDArray[np.float64], torch.Tensor, torch.Tensor]:
    """Return the k largest of the known and the newly found pairs, and spare vectors, orthonormalised in float64."""
    joined = np.concatenate([values, found.values])
    order = np.argsort(-joined, kind="stable")[: k + SPARE]
    rows = torch.cat([gram.take(vectors), gram.take(found.vectors)])[torch.from_numpy(order.copy())]
    rows = gram.take(torch.linalg.qr(wide(rows).T).Q.T)
    return joined[order[:k]], rows[:k], rows[k:]


def _note(found: Search, verdict: Verdict, tol: float) -> str:
    """Say in words why a run did not converge; empty if it did."""
    if found.stalled:
        return (
            f"not converged: the map computes in float32 only, which does not resolve the tolerance {tol:.1e}"
        )
    if not found.converged:
        return f"not converged: residual {found.worst:.1e}, tolerance {tol:.1e}"
    if verdict.above:
        return "not converged: the verification saw a larger value than could be computed within the budget"
    if not verdict.proven or not verdict.complete:
        return "not converged: the verification could not bound what is left within the budget"
    return ""
