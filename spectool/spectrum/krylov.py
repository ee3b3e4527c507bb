"""A restartable (block) Lanczos basis of a Gram operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from spectool.spectrum.starts import gaussian

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spectool.spectrum.gram import Gram

_CHUNK = 1 << 15
"""Columns rotated at a time at a restart: bounds the copy of the basis that a rotation needs."""


class Krylov:
    """Orthonormal rows Q with T = Q B Qᵀ, and the frontier F: the rows that come next.

    Invariant after every method: Q Qᵀ = I, F Fᵀ = I, Q Fᵀ = 0 and Q B = T Q + linkᵀ F, to rounding; ``link`` is
    F B Qᵀ. B is (I−KᵀK)B(I−KᵀK) throughout, K the ``known`` rows; Q and F are orthogonal to K.

    Args:
        gram: B.
        known: Orthonormal rows K ``(p, size)`` to stay away from.
        capacity: Most rows Q may have.
        block: Rows of F.
        source: Generator of the start rows and of the rows that replace a breakdown.
    """

    def __init__(
        self, gram: Gram, known: torch.Tensor, capacity: int, block: int, source: torch.Generator
    ) -> None:
        self.gram, self.known, self._source = gram, known, source
        self._rows = torch.empty(capacity + block, gram.size, dtype=gram.dtype, device=gram.device)
        self._block = block
        self.T: NDArray[np.float64] = np.zeros((0, 0))
        self.link: NDArray[np.float64] = np.zeros((0, 0))
        self.refills = 0

    @property
    def size(self) -> int:
        """Rows of Q."""
        return self.T.shape[0]

    @property
    def frontier(self) -> int:
        """Rows of F; 0 when Q spans the whole space."""
        return self.link.shape[0]

    @property
    def room(self) -> int:
        """Dimensions of the space outside K, Q and F."""
        return self.gram.size - len(self.known) - self.size - self.frontier

    def start(self, rows: torch.Tensor | None = None) -> None:
        """Begin with Q empty and F = ``rows`` orthonormalised, filled up with random rows."""
        self.T = np.zeros((0, 0))
        self.link = np.zeros((0, 0))
        w = torch.empty((0, self.gram.size), dtype=self.gram.dtype, device=self.gram.device)
        self._advance(w if rows is None else rows.to(w), 1.0)

    def expand(self) -> None:
        """Move F into Q and find the next F. Costs a pair per row of F."""
        old, b = self.size, self.frontier
        front = self._rows[old : old + b]
        w = self.gram(front)
        scale = float(torch.linalg.vector_norm(w)) / b**0.5
        if len(self.known):
            w -= (w @ self.known.T) @ self.known
        # The local recurrence first: what is known of W's components is subtracted exactly once.
        first = int(np.argmax(np.any(self.link != 0.0, axis=0))) if old else 0
        if old and np.any(self.link):
            w -= self._tensor(self.link[:, first:]) @ self._rows[first:old]
        alpha = w @ front.T
        w -= alpha @ front
        alpha_ = alpha.double().cpu().numpy()
        T = np.zeros((old + b, old + b))
        T[:old, :old] = self.T
        T[old:, :old], T[:old, old:] = self.link, self.link.T
        T[old:, old:] = 0.5 * (alpha_ + alpha_.T)
        self.T = T
        self.link = np.zeros((0, old + b))
        self._project(w)
        self._advance(w, scale)

    def ritz(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return Ritz values (descending), their coordinates (columns) and residual norms ‖B y − θ y‖."""
        values, vectors = np.linalg.eigh(self.T)
        values, vectors = values[::-1], vectors[:, ::-1]
        return values, vectors, np.linalg.norm(self.link @ vectors, axis=0)

    def restart(self, vectors: NDArray[np.float64], values: NDArray[np.float64], keep: int) -> None:
        """Shrink Q to its first ``keep`` Ritz vectors; F stays."""
        old, b = self.size, self.frontier
        turn = self._tensor(vectors[:, :keep].T)
        for begin in range(0, self.gram.size, _CHUNK):
            part = self._rows[:, begin : begin + _CHUNK]
            part[:keep] = turn @ part[:old]
        self._rows[keep : keep + b] = self._rows[old : old + b].clone()
        self.link = self.link @ vectors[:, :keep]
        self.T = np.diag(values[:keep])

    def vectors(self, coordinates: NDArray[np.float64]) -> torch.Tensor:
        """Return the rows with these coordinates (columns) in Q."""
        return self._tensor(coordinates.T) @ self._rows[: self.size]

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` rows of Q."""
        rows = torch.empty(
            capacity + self._block, self.gram.size, dtype=self._rows.dtype, device=self._rows.device
        )
        used = self.size + self.frontier
        rows[:used] = self._rows[:used]
        self._rows = rows

    def _tensor(self, array: NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype=self._rows.dtype, device=self._rows.device)

    def _project(self, w: torch.Tensor) -> None:
        """Take out of ``w`` what lies in Q, in place; twice where the first pass took most of it."""
        q = self._rows[: self.size]
        before = torch.linalg.vector_norm(w, dim=1)
        w -= (w @ q.T) @ q
        after = torch.linalg.vector_norm(w, dim=1)
        if bool((after < 0.7 * before).any()):
            w -= (w @ q.T) @ q

    def _advance(self, w: torch.Tensor, scale: float) -> None:
        """Orthonormalise ``w`` into the next F; dependent rows are replaced by random ones."""
        old, b = self.size, w.shape[0]
        tiny = 32.0 * torch.finfo(w.dtype).eps * scale
        want = min(self._block, self.gram.size - len(self.known) - old)
        R = np.zeros((want, b))
        count = 0
        for i in range(b):
            v = w[i : i + 1]
            for _ in range(2):
                if count:
                    front = self._rows[old : old + count]
                    c = v @ front.T
                    v = v - c @ front
                    R[:count, i] += c[0].double().cpu().numpy()
            norm = float(torch.linalg.vector_norm(v))
            if norm > tiny and count < want:
                self._rows[old + count] = v[0] / norm
                if norm < 1e-2 * scale:
                    # what is left is mostly rounding: clean it before it becomes a basis row
                    self._clean(old + count)
                R[count, i] = norm
                count += 1
        while count < want:
            self._rows[old + count] = gaussian(1, self.gram.size, self._source)[0].to(self._rows)
            self._clean(old + count)
            self.refills += 1
            count += 1
        self.link = np.zeros((want, old))
        if b:
            self.link[:, old - b :] = R[:, :]

    def _clean(self, index: int) -> None:
        row = self._rows[index : index + 1]
        q = self._rows[:index]
        for _ in range(2):
            row -= (row @ self.known.T) @ self.known
            row -= (row @ q.T) @ q
            row /= torch.linalg.vector_norm(row)
