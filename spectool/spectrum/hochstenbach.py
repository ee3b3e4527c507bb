"""An upper bound on the largest eigenvalue from Lanczos coefficients alone, wrong with a chosen probability.

Lanczos on a positive semidefinite B from a unit vector q₁ yields coefficients α, β and polynomials p_j with
p_j(B) q₁ = q_{j+1}, a unit vector; so |p_j(λ₁)|·|γ| ≤ 1, γ the component of q₁ along the first eigenvector. p_j
grows beyond its largest root, hence λ₁ ≤ the t > θ_max where p_j(t) = 1/δ, unless |γ| < δ. A uniformly random q₁
in n dimensions has |γ| < δ = ε·sqrt(π/(2n)) with probability at most ε, and that one event decides for every j at
once: stopping when the bound is good enough costs no probability.

**Source:** M. E. Hochstenbach, "Probabilistic upper bounds for the matrix two-norm", J. Sci. Comput. 57 (2013).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

FAILURE = 1e-9
"""Probability that the upper ends of one row's intervals are wrong."""


def log_inverse_delta(size: int, failure: float) -> float:
    """Return log(1/δ), δ = failure·sqrt(π/(2·size))."""
    return 0.5 * math.log(2.0 * size / math.pi) - math.log(failure)


@dataclass
class Sturm:
    """log p_j(t) at one fixed t, carried along as coefficients arrive (O(1) each).

    p_j(t) = Π r_i/β_i with r_1 = t − α_1, r_i = t − α_i − β_{i−1}²/r_{i−1}; every r_i > 0 exactly while t is
    above all Ritz values.

    Attributes:
        t: Where the polynomials are evaluated.
        log: log p_j(t); meaningless once ``passed``.
        passed: Whether a Ritz value is ≥ t.
    """

    t: float
    log: float = 0.0
    passed: bool = False
    _ratio: float = field(default=math.inf, repr=False)
    _beta: float = field(default=0.0, repr=False)

    def push(self, alpha: float, beta: float) -> None:
        """Take α_j and β_j (the norm of the residual after step j)."""
        if self.passed:
            return
        self._ratio = self.t - alpha - self._beta * self._beta / self._ratio
        if self._ratio <= 0.0:
            self.passed = True
            return
        self.log += math.log(self._ratio / beta)
        self._beta = beta


def reaches(alpha: list[float], beta: list[float], t: float, level: float) -> bool:
    """Whether t is above all Ritz values and log p_j(t) ≥ level, i.e. whether t is a valid bound."""
    sturm = Sturm(t)
    for a, b in zip(alpha, beta, strict=True):
        sturm.push(a, b)
    return not sturm.passed and sturm.log >= level


def hochstenbach(alpha: list[float], beta: list[float], level: float) -> float:
    """Return the smallest t with log p_j(t) ≥ level beyond the largest Ritz value, by bisection from above.

    The answer is rounded up: it is a bound itself.
    """
    # Gershgorin bounds the Ritz values; p_j(t) ≥ Π (t − top)/β_i then gives a first t that is large enough.
    top = max(a + (beta[i - 1] if i else 0.0) + beta[i] for i, a in enumerate(alpha))
    low = max(alpha)
    high = top + math.exp(min(700.0, (level + sum(math.log(b) for b in beta)) / len(beta)))
    while not reaches(alpha, beta, high, level):
        high = 2.0 * high
    for _ in range(200):
        middle = 0.5 * (low + high)
        if high - low <= 1e-14 * high or middle in (low, high):
            break
        if reaches(alpha, beta, middle, level):
            high = middle
        else:
            low = middle
    return high
