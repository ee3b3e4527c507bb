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


def minimise(gram: Tensor, linear: Tensor, p: int, *, tol: float = 1e-8) -> Tensor:
    """Return the minimiser y ``(p(p+1)/2 + extra,)``, strictly inside the cone.

    Args:
        gram: G ``(d, d)``, positive semidefinite, float64, d = p(p+1)/2 + number of scalar unknowns.
        linear: b ``(d,)``.
        p: Side of Y.
        tol: Complementarity ⟨Y, S⟩ relative to the objective at which to stop.

    **Source:** C. Helmberg, F. Rendl, "A spectral bundle method for semidefinite programming", SIAM J. Optim. 10
    (2000); the direction is that of Helmberg, Kojima and Monteiro.
    """
    d, t = gram.shape[0], p * (p + 1) // 2
    rows, columns, factors = svec_index(p)
    gram = gram + torch.eye(d, dtype=torch.float64) * (1e-14 * float(gram.diagonal().max()) + 1e-300)
    # A start of the right size along the identity: the best multiple of (I, 1).
    unit = torch.cat([svec(torch.eye(p, dtype=torch.float64)), torch.ones(d - t, dtype=torch.float64)])
    strength = float(linear.abs().max()) + 1e-300
    along, bend = float(linear @ unit), float(unit @ (gram @ unit))
    size = max(along / bend, strength / float(gram.diagonal().max()))
    y = unit * size
    s = unit * max(strength, float((gram @ y - linear).abs().max()))
    order = p + (d - t)
    for _ in range(_STEPS):
        # Invariant: mat(y) and mat(s) are positive definite.
        y_matrix, s_matrix = smat(y[:t], p), smat(s[:t], p)
        slope = gram @ y - linear
        gap = float(y @ s)
        error = float((slope - s).abs().max())
        scale = abs(0.5 * float(y @ (slope - linear))) + 1e-300
        if gap <= tol * scale and error <= 1e-9 * float(linear.abs().max()):
            break
        mu = gap / order
        inverse = torch.linalg.inv(y_matrix)
        inverse = 0.5 * (inverse + inverse.T)
        system = gram.clone()
        system[:t, :t] += _sym_kron(inverse, s_matrix, rows, columns, factors)
        extra = range(t, d)
        for index in extra:
            system[index, index] += float(s[index] / y[index])
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info):
            break
        centre = torch.cat([svec(inverse), 1.0 / y[t:]])
        predictor = torch.cholesky_solve((-slope)[:, None], factor)[:, 0]
        ds = gram @ predictor + slope - s
        reach = min(_longest(y, predictor, p, t), _longest(s, ds, p, t), 1.0)
        after = float((y + reach * predictor) @ (s + reach * ds))
        sigma = min(0.8, max(1e-6, (max(after, 0.0) / gap) ** 2))
        dy = torch.cholesky_solve((sigma * mu * centre - slope)[:, None], factor)[:, 0]
        ds = gram @ dy + slope - s
        step_y, step_s = min(1.0, _SHRINK * _longest(y, dy, p, t)), min(1.0, _SHRINK * _longest(s, ds, p, t))
        step = min(step_y, step_s)
        y, s = y + step * dy, s + step * ds
    return y


def _longest(y: Tensor, dy: Tensor, p: int, t: int) -> float:
    """Return the longest step that stays in the cone."""
    factor = torch.linalg.cholesky(smat(y[:t], p))
    scaled = torch.linalg.solve_triangular(factor, smat(dy[:t], p), upper=False)
    scaled = torch.linalg.solve_triangular(factor, scaled.T, upper=False)
    worst = float(torch.linalg.eigvalsh(0.5 * (scaled + scaled.T))[0])
    if y.shape[0] > t:
        worst = min(worst, float((dy[t:] / y[t:]).min()))
    return math.inf if worst >= 0 else -1.0 / worst


def _sym_kron(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, factors: Tensor) -> Tensor:
    """Return the matrix of X ↦ ½(A X B + B X A) on svec coordinates."""
    ar, br = a[rows], b[rows]
    ac, bc = a[columns], b[columns]
    made = ar[:, rows] * bc[:, columns]
    made += ar[:, columns] * bc[:, rows]
    made += br[:, rows] * ac[:, columns]
    made += br[:, columns] * ac[:, rows]
    return 0.25 * made * (factors[:, None] * factors[None, :])
