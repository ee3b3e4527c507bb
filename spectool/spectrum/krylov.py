"""A restartable (block) Lanczos basis of a Gram operator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectool.spectrum.gram import inner, length, wide

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spectool.spectrum.gram import Gram
    from spectool.spectrum.starts import Stream

_CHUNK = 1 << 15
"""Columns rotated at a time at a restart: bounds the copy of the basis that a rotation needs."""


class Krylov:
    """Orthonormal rows Q with T = Q B Qᵀ, and the frontier F: the rows that come next.

    Invariant after every method: Q Qᵀ = I, F Fᵀ = I, Q Fᵀ = 0 and Q B = T Q + linkᵀ F, to rounding; ``link`` is
    F B Qᵀ. B stands for (I−KᵀK)B(I−KᵀK), K the ``known`` rows, and Q and F are orthogonal to K.

    Args:
        gram: B.
        known: Orthonormal rows K ``(p, size)`` to stay away from.
        capacity: Most rows Q may have.
        block: Rows of F.
        source: Generator of the start rows and of the rows that replace a breakdown.
        start: First row of F, if it is not to be random; it need not be normalised.

    **Source:** K. Wu and H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM
    J. Matrix Anal. Appl. 22 (2000); the second orthogonalisation pass only where needed: Daniel, Gragg, Kaufman
    and Stewart, Math. Comp. 30 (1976).
    """

    def __init__(
        self,
        gram: Gram,
        known: torch.Tensor,
        capacity: int,
        block: int,
        source: Stream,
        *,
        start: torch.Tensor | None = None,
    ) -> None:
        self.gram, self.known, self._source = gram, known, source
        self._block, self._largest = block, 0.0
        self._rows = torch.empty(capacity + block, gram.size, dtype=gram.dtype, device=gram.device)
        self._projection: NDArray[np.float64] = np.zeros((capacity + block, capacity + block))
        self._size, self._coupled = 0, 0
        self.link: NDArray[np.float64] = np.zeros((0, 0))
        # For ``certificate``: Ritz values dropped at restarts, and the logarithm of the product of all β.
        self._shed: list[float] = []
        self._log_beta = 0.0
        self._certifies = block == 1 and start is None
        first = torch.zeros((0, gram.size)) if start is None else start
        self._advance(gram.take(first))

    @property
    def size(self) -> int:
        """Rows of Q."""
        return self._size

    @property
    def T(self) -> NDArray[np.float64]:
        """Q B Qᵀ."""
        return self._projection[: self._size, : self._size]

    @property
    def frontier(self) -> int:
        """Rows of F; 0 when Q and K span the whole space."""
        return int(self.link.shape[0])

    def expand(self) -> None:
        """Move F into Q and find the next F. Costs a pair per row of F."""
        old, b = self.size, self.frontier
        front = self._rows[old : old + b]
        w = self.gram(front)
        # The local recurrence first: components that are known are subtracted once, by their known size.
        # Right after a restart F couples to every row of Q, later only to the last block.
        if old - self._coupled == b == 1:
            w.sub_(self._rows[old - 1 : old], alpha=float(self.link[0, -1]))
        elif old > self._coupled:
            w.addmm_(self._tensor(self.link[:, self._coupled :]), self._rows[self._coupled : old], alpha=-1)
        alpha = inner(w, front)
        if b == 1:
            w.sub_(front, alpha=float(alpha))
        else:
            w.addmm_(self.gram.take(alpha), front, alpha=-1)
        new = slice(old, old + b)
        self._projection[new, :old], self._projection[:old, new] = self.link, self.link.T
        self._projection[new, new] = 0.5 * (alpha + alpha.T).numpy()
        self._size = old + b
        reach = np.abs(self._projection[new, : old + b]).sum(axis=1).max()
        self._largest = max(self._largest, float(reach))
        self._project(w)
        self._advance(w)

    def ritz(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return Ritz values (descending), their coordinates (columns) and residual norms ‖B y − θ y‖."""
        # torch's, not numpy's: one setting for the number of threads, and no second pool fighting the first.
        ascending = torch.linalg.eigh(torch.from_numpy(self.T))
        values = ascending.eigenvalues.flip(0).numpy()
        vectors = ascending.eigenvectors.flip(1).numpy()
        return values, vectors, np.linalg.norm(self.link @ vectors, axis=0)

    def restart(self, values: NDArray[np.float64], coordinates: NDArray[np.float64], keep: int) -> None:
        """Shrink Q to its first ``keep`` Ritz vectors; F stays."""
        old, b = self.size, self.frontier
        turn = self._tensor(coordinates[:, :keep].T)
        for begin in range(0, self.gram.size, _CHUNK):
            part = self._rows[:, begin : begin + _CHUNK]
            part[:keep] = turn @ part[:old]
        self._rows[keep : keep + b] = self._rows[old : old + b].clone()
        self._shed.extend(values[keep:].tolist())
        self.link = self.link @ coordinates[:, :keep]
        self._projection[:keep, :keep] = np.diag(values[:keep])
        self._size, self._coupled = keep, 0

    def vectors(self, coordinates: NDArray[np.float64]) -> torch.Tensor:
        """Return the rows with these coordinates (columns) in Q."""
        return self._tensor(coordinates.T) @ self._rows[: self.size]

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` rows of Q."""
        shape = (capacity + self._block, self.gram.size)
        rows = torch.empty(shape, dtype=self._rows.dtype, device=self._rows.device)
        used = self.size + self.frontier
        rows[:used] = self._rows[:used]
        self._rows = rows
        projection = np.zeros((capacity + self._block, capacity + self._block))
        projection[: self._size, : self._size] = self.T
        self._projection = projection

    def certificate(self, values: NDArray[np.float64], level: float) -> float:
        """Return a bound on B's largest eigenvalue, or inf if blocks or refills spoil it. See ``probabilistic``.

        ``values`` are the present Ritz values, ``level`` is log(1/δ). Thick restarts do not spoil the bound: the
        row in F is still a polynomial of B applied to the random start row. Its roots are the present Ritz values
        and all those dropped at restarts (a restart only splits the roots into kept and dropped ones), and every
        step divides its leading coefficient by β. All roots lie below the bound, so beyond the largest one the
        polynomial grows, which is all that the argument needs. Not yet inflated by rounding.
        """
        if self.size and not self.frontier:
            return float(values[0])  # Q spans everything: these are the eigenvalues
        if not self._certifies or not self.size:
            return math.inf
        roots = np.concatenate([values, self._shed])
        top = float(roots.max())
        if top <= 0.0:
            return math.inf

        def enough(t: float) -> bool:
            return float(np.log(t - roots).sum()) - self._log_beta >= level

        low, high = top, 2.0 * top
        while not enough(high):
            low, high = high, 2.0 * high
        while high - low > 1e-10 * high:
            middle = 0.5 * (low + high)
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    def _tensor(self, array: NDArray[np.float64]) -> torch.Tensor:
        return self.gram.take(torch.from_numpy(np.ascontiguousarray(array)))

    def _project(self, w: torch.Tensor) -> None:
        """Take out of ``w`` what lies in K and Q, in place; twice where the first pass took much of it.

        After the local recurrence only rounding is left in Q, and in K what the residuals of its rows put there, so
        one pass is enough unless ``w`` itself is of that size. Without any pass, or with one that ignores
        cancellation, results are silently wrong; K has to come with the last pass, because normalising amplifies
        what is left of it from step to step (1e-7 became 0.2 in ten).
        """
        before = torch.linalg.vector_norm(w, dim=1)
        self._pass(w, self.size)
        if bool((torch.linalg.vector_norm(w, dim=1) < 0.7 * before).any()):
            self._pass(w, self.size)

    def _pass(self, w: torch.Tensor, count: int) -> None:
        """Subtract once from ``w``, in place, its components in the first ``count`` rows and in K."""
        q = self._rows[:count]
        w.addmm_(w @ q.T, q, alpha=-1)
        if len(self.known):
            w.addmm_(w @ self.known.T, self.known, alpha=-1)

    def _advance(self, w: torch.Tensor) -> None:
        """Make rows ``w``, orthogonal to Q, into the next F; what vanishes is replaced by random rows."""
        old, b = self.size, w.shape[0]
        noise = 32.0 * torch.finfo(w.dtype).eps * self._largest
        want = min(self._block, self.gram.size - len(self.known) - old)
        weights = np.zeros((want, b))
        count = 0
        for i in range(b):
            v = w[i : i + 1]
            front = self._rows[old : old + count]
            for _ in range(2 if count else 0):
                c = v @ front.T
                v = v - c @ front
                weights[:count, i] += wide(c[0]).cpu().numpy()
            norm = length(v)
            if norm <= noise or count == want:
                continue
            torch.div(v[0], norm, out=self._rows[old + count])
            if norm < 1e-2 * self._largest:
                self._clean(old + count)
            weights[count, i] = norm
            count += 1
        if self._block == 1 and b and count:
            self._log_beta += math.log(weights[0, 0])
        self._certifies &= not b or count == want
        for index in range(old + count, old + want):
            self._rows[index] = self.gram.random(1, self._source)[0]
            self._clean(index)
        self.link = np.zeros((want, old))
        self._coupled = max(0, old - b)
        # At the very start there is nothing F could couple to.
        if old:
            self.link[:, old - b :] = weights

    def _clean(self, index: int) -> None:
        """Make row ``index`` orthogonal to K and to the rows before it; it is mostly rounding or random."""
        row = self._rows[index : index + 1]
        for _ in range(2):
            self._pass(row, index)
            row /= torch.linalg.vector_norm(row)
