"""A small semidefinite quadratic programme by a primal–dual interior point method.

minimise ½ yᵀG y − bᵀy over y = (svec Y, α), Y ⪰ 0 of side p, α ≥ 0.

It is what is left of the projection when the dual variable is restricted to p directions: p ≤ 64, a dozen
factorisations of side p(p+1)/2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEPS = 60
_SHRINK = 0.95


def svec_index(p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rows, columns, factors) of the upper triangle; factors are 1 on the diagonal, √2 beside it."""
    rows, columns = torch.triu_indices(p, p)
    factors = torch.full(rows.shape, math.sqrt(2.0), dtype=torch.float64)
    factors[rows == columns] = 1.0
    return rows, columns, factors


def svec(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix as a vector of the same norm."""
    rows, columns, factors = svec_index(matrix.shape[-1])
    return matrix[rows, columns] * factors


def smat(vector: Tensor, p: int) -> Tensor:
    """Return the symmetric matrix of ``svec``."""
    rows, columns, factors = svec_index(p)
    matrix = vector.new_zeros(p, p)
    matrix[rows, columns] = vector / factors
    matrix[columns, rows] = vector / factors
    return matrix


def minimise(
    gram: Tensor, linear: Tensor, p: int, *, images: Tensor | None = None, tol: float = 1e-7
) -> Tensor:
    """Return the minimiser y ``(p(p+1)/2 + extra,)``, strictly inside the cone.

    Args:
        gram: G ``(d, d)``, positive semidefinite, float64, d = p(p+1)/2 + number of scalar unknowns.
        linear: b ``(d,)``.
        p: Side of Y.
        images: X ``(d, n)`` with G = XXᵀ, if known; where n is less than d, systems of side n are solved.
        tol: Complementarity ⟨Y, S⟩ relative to the objective at which to stop.

    **Source:** M. Todd, K. Toh, R. Tütüncü, "On the Nesterov–Todd direction in semidefinite programming", SIAM J.
    Optim. 8 (1998); predictor and corrector share one factorisation.
    """
    d, t = gram.shape[0], p * (p + 1) // 2
    # A start of the right size along the identity: the best multiple of (I, 1).
    unit = torch.cat([svec(torch.eye(p, dtype=torch.float64)), torch.ones(d - t, dtype=torch.float64)])
    strength = float(linear.abs().max()) + 1e-300
    along, bend = float(linear @ unit), float(unit @ (gram @ unit)) + 1e-300
    size = max(along / bend, strength / (float(gram.diagonal().max()) + 1e-300))
    y = unit * size
    s = unit * max(strength, float((gram @ y - linear).abs().max()))
    newton = _Newton(gram, images, p)
    for _ in range(_STEPS):
        # Invariant: mat(y) and mat(s) are positive definite.
        slope = gram @ y - linear
        gap = float(y @ s)
        error = float((slope - s).abs().max())
        scale = abs(0.5 * float(y @ (slope - linear))) + 1e-300
        if gap <= tol * scale and error <= 1e-9 * strength:
            break
        if not newton.at(y, s):
            break
        dy = newton.solve(-slope)
        ds = gram @ dy + slope - s
        reach = min(newton.longest(dy, ds), 1.0)
        after = float((y + reach * dy) @ (s + reach * ds))
        sigma = min(0.8, max(1e-6, (max(after, 0.0) / gap) ** 2))
        dy = newton.solve(sigma * gap / (p + d - t) * newton.centre - slope)
        ds = gram @ dy + slope - s
        step = min(1.0, _SHRINK * newton.longest(dy, ds))
        y, s = y + step * dy, s + step * ds
    return y


class _Newton:
    """The systems (G + W⁻¹ ⊗ W⁻¹) dy = r, where W = TTᵀ turns S into Y: WSW = Y, T⁻¹YT⁻ᵀ = TᵀST = diag(δ).

    With G = XXᵀ of small rank n they are (I + X̃X̃ᵀ) dỹ = r̃ in the coordinates ỹ = T⁻¹YT⁻ᵀ, and side n is enough.
    """

    def __init__(self, gram: Tensor, images: Tensor | None, p: int) -> None:
        self._p, self._t, self._index = p, p * (p + 1) // 2, svec_index(p)
        self._low = images is not None and images.shape[1] <= 0.75 * len(gram)
        if images is not None and self._low:
            self._matrices, self._others = self._smats(images[: self._t].T), images[self._t :].T
        self._gram = gram
        self._ridge = 1e-14 * float(gram.diagonal().max()) + 1e-300
        self.centre = gram.new_zeros(0)

    def at(self, y: Tensor, s: Tensor) -> bool:
        """Factor the system at a point; False where that fails."""
        t = self._t
        below, info = torch.linalg.cholesky_ex(smat(y[:t], self._p))
        under, more = torch.linalg.cholesky_ex(smat(s[:t], self._p))
        if int(info) or int(more):
            return False
        left, delta, right = torch.linalg.svd(under.T @ below)
        root = delta.sqrt()
        self._turn, self._back = below @ right.T / root, (left / root).T @ under.T  # T, T⁻¹
        self._roots = torch.sqrt(y[t:] / s[t:])
        self._delta, self._deltas = delta, torch.sqrt(y[t:] * s[t:])
        inverse = (self._back.T / delta) @ self._back
        self.centre = torch.cat([svec(inverse), 1.0 / y[t:]])
        if self._low:
            turned = self._turn.T @ self._matrices @ self._turn
            self._images = torch.cat([self._svecs(turned), self._others * self._roots], dim=1)
            system = self._images @ self._images.T
            system.diagonal().add_(1.0)
        else:
            system = self._gram.clone()
            system[:t, :t] += _sym_kron(self._back.T @ self._back, *self._index)
            system.diagonal().add_(self._ridge)
            system.diagonal()[t:].add_(1.0 / self._roots.square())
        self._factor, info = torch.linalg.cholesky_ex(system)
        return not int(info)

    def solve(self, r: Tensor) -> Tensor:
        """Return dy."""
        if not self._low:
            return torch.cholesky_solve(r[:, None], self._factor)[:, 0]
        turned = self._moved(r, self._turn.T, self._roots)
        inner = torch.cholesky_solve((self._images @ turned)[:, None], self._factor)[:, 0]
        return self._moved(turned - inner @ self._images, self._turn, self._roots)

    def longest(self, dy: Tensor, ds: Tensor) -> float:
        """Return the longest step along both that stays in the cones."""
        worst = 0.0
        for moved in (
            self._moved(dy, self._back, 1 / self._roots),
            self._moved(ds, self._turn.T, self._roots),
        ):
            scaled = smat(moved[: self._t], self._p) / self._delta.sqrt() / self._delta.sqrt()[:, None]
            worst = min(worst, float(torch.linalg.eigvalsh(scaled)[0]))
            if len(moved) > self._t:
                worst = min(worst, float((moved[self._t :] / self._deltas).min()))
        return math.inf if worst >= 0 else -1.0 / worst

    def _moved(self, vector: Tensor, turn: Tensor, roots: Tensor) -> Tensor:
        """Return turn·mat(vector)·turnᵀ as a vector, the scalars times ``roots``."""
        t = self._t
        return torch.cat([svec(turn @ smat(vector[:t], self._p) @ turn.T), vector[t:] * roots])

    def _smats(self, rows: Tensor) -> Tensor:
        r, c, factors = self._index
        made = rows.new_zeros(len(rows), self._p, self._p)
        made[:, r, c] = rows / factors
        made[:, c, r] = rows / factors
        return made

    def _svecs(self, matrices: Tensor) -> Tensor:
        r, c, factors = self._index
        return matrices.flatten(1).index_select(1, r * self._p + c) * factors


def _sym_kron(a: Tensor, rows: Tensor, columns: Tensor, factors: Tensor) -> Tensor:
    """Return the matrix of X ↦ A X A on svec coordinates."""
    # Outer products of whole rows, and one gather at the end: a fifth of the time of gathering every factor.
    made = a[rows][:, :, None] * a[columns][:, None, :]
    made = made + made.transpose(1, 2)
    made = made.flatten(1).index_select(1, rows * len(a) + columns)
    return made.mul_(0.5 * factors).mul_(factors[:, None])
