"""The dual of the projection on the symbol's values, factored and minimised by L-BFGS, all groups at once.

Constraints ‖H_f(w)‖ ≤ c for the frequencies f of a grid have multipliers Z_f = P_f Q_fᴴ, and ½(‖P‖² + ‖Q‖²) is
the nuclear norm of Z at its smallest. Left to minimise is

    F(P, Q) = ½‖w₀ − L*Z‖² + ½c(‖P‖² + ‖Q‖²),   w = w₀ − L*Z,

smooth, without constraints, and along a line a polynomial of degree 4, so that the best step is a root of a
cubic. Any (P, Q) gives a lower bound on the distance to the nearest w.

**Source:** S. Burer, R. D. C. Monteiro, "A nonlinear programming algorithm for solving semidefinite programs via
low-rank factorization", Math. Program. 95 (2003).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectool.clip.symbol_map import SymbolMap

_MEMORY = 12
_MEMORY_BYTES = 1 << 29
_TINY = 1e-30
_UNUSED = 1e-3  # of the largest singular value of Z


class Factored:
    """(P, Q) of every group, and the descent on F.

    Args:
        made: The symbol's map.
        components: w₀ ``(groups, taps, out, in)``, in the type to iterate in.
        limit: c.
        left: P ``(groups, F, out, r)``, complex.
        right: Q ``(groups, F, in, r)``, complex.
    """

    def __init__(
        self, made: SymbolMap, components: Tensor, limit: float, left: Tensor, right: Tensor
    ) -> None:
        self._map, self._start, self._limit = made, components, limit
        self.groups = len(components)
        both = torch.cat([left, right], dim=2)
        x = torch.cat([both.real, both.imag], dim=3).to(components.dtype)  # (groups, F, out + in, 2r)
        self._out = left.shape[2]
        self._steps: list[Tensor] = []
        self._turns: list[Tensor] = []
        self._unit = components.new_ones(len(components))  # inverse curvature along the last good step
        each = 2 * x.numel() * x.element_size()
        self._memory = max(3, min(_MEMORY, _MEMORY_BYTES // max(1, each)))
        self._x, self._rest = self._rescaled(x)
        self._gradient = self._slope()
        self.iterations = 0

    def dual(self) -> tuple[Tensor, Tensor]:
        """Return L*Z and ½(‖P‖² + ‖Q‖²) ≥ ‖Z‖_* per group, in float64."""
        x = self._x.double()
        return self._image(x), 0.5 * _inner(x, x)

    def error(self) -> Tensor:
        """Return ‖∇F‖ / (c‖(P, Q)‖) ``(groups,)``."""
        return _norm(self._gradient) / (self._limit * _norm(self._x) + _TINY)

    def keep(self, chosen: Tensor) -> None:
        """Go on with some of the groups."""
        self._start, self._x, self._rest = self._start[chosen], self._x[chosen], self._rest[chosen]
        self._gradient = self._gradient[chosen]
        self._steps = [step[chosen] for step in self._steps]
        self._turns = [turn[chosen] for turn in self._turns]
        self._unit = self._unit[chosen]
        self.groups = len(self._x)

    def compress(self) -> bool:
        """Drop directions that no Z_f uses; says whether that was worth it.

        The singular value decomposition Z = UΣVᴴ gives the balanced factors U√Σ and V√Σ. Curvature learnt so far
        refers to the old ones and is forgotten.
        """
        half = self._x.shape[3] // 2
        both = torch.complex(self._x[..., :half], self._x[..., half:])
        left, right = torch.linalg.qr(both[:, :, : self._out]), torch.linalg.qr(both[:, :, self._out :])
        turn, values, back = torch.linalg.svd(left.R @ right.R.mH)
        used = values > _UNUSED * values.amax(dim=(1, 2), keepdim=True)
        count = int(used.sum(dim=2).max()) + 1
        if count > 0.75 * half:
            return False
        root = values[:, :, None, :count].sqrt()
        sides = (left.Q @ turn[..., :count]) * root, (right.Q @ back.mH[..., :count]) * root
        both = torch.cat(sides, dim=2)
        x = torch.cat([both.real, both.imag], dim=3)
        self._steps, self._turns = [], []
        self._x, self._rest = self._rescaled(x)
        self._gradient = self._slope()
        return True

    def run(self, iterations: int, tol: float) -> None:
        """Take steps until every group's ``error`` is at most ``tol``."""
        for _ in range(iterations):
            if float(self.error().max()) <= tol:
                break
            self._step()
            self.iterations += 1

    def _rescaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (P, Q) times the best factor, and w₀ − L*Z; in closed form, F being quadratic in its square."""
        image = self._image(x)
        gain = _inner(image, self._start) - 0.5 * self._limit * _inner(x, x)
        square = _inner(image, image)
        factor = (gain / square.clamp_min(_TINY)).clamp_min(1e-6)  # zero would be a saddle point
        return x * _wide(factor.sqrt(), x), self._start - image * _wide(factor, image)

    def _image(self, x: Tensor) -> Tensor:
        """Return L*(PQᴴ)."""
        return self._map.pull(_stacked(x[:, :, : self._out]), x[:, :, self._out :])

    def _slope(self) -> Tensor:
        slope = self._limit * self._x
        both = self._map.times(self._rest, self._x[:, :, self._out :])
        slope[:, :, : self._out] -= both[:, :, : self._out] - _turned(both[:, :, self._out :])
        slope[:, :, self._out :] -= self._map.transposed_times(
            self._rest, _stacked(self._x[:, :, : self._out])
        )
        return slope

    def _direction(self) -> Tensor:
        """Return −(inverse Hessian)·gradient by the two-loop recursion, group by group at once."""
        q = -self._gradient
        if not self._steps:
            return q
        weights = []
        inner = [_inner(s, y).clamp_min(_TINY) for s, y in zip(self._steps, self._turns, strict=True)]
        for s, y, sy in zip(reversed(self._steps), reversed(self._turns), reversed(inner), strict=True):
            weight = _inner(s, q) / sy
            weights.append(weight)
            q = q - _wide(weight, y) * y
        q = q * _wide(self._unit, q)
        for s, y, sy, weight in zip(self._steps, self._turns, inner, reversed(weights), strict=True):
            q = q + _wide(weight - _inner(y, q) / sy, s) * s
        # Where rounding spoilt it: steepest descent.
        bad = _inner(q, self._gradient) >= 0
        return torch.where(_wide(bad, q), -self._gradient, q) if bool(bad.any()) else q

    def _step(self) -> None:
        d = self._direction()
        left, right = _stacked(self._x[:, :, : self._out]), self._x[:, :, self._out :]
        d_left, d_right = _stacked(d[:, :, : self._out]), d[:, :, self._out :]
        along = self._map.pull(torch.cat([d_left, left], dim=3), torch.cat([right, d_right], dim=3))
        bend = self._map.pull(d_left, d_right)
        # F(t) − F(0) = a₁t + a₂t² + a₃t³ + a₄t⁴
        a1 = _inner(self._gradient, d)
        a2 = 0.5 * _inner(along, along) - _inner(self._rest, bend) + 0.5 * self._limit * _inner(d, d)
        a3, a4 = _inner(along, bend), 0.5 * _inner(bend, bend)
        t = best_step(a1, a2, a3, a4).to(along.dtype)
        step = d * _wide(t, d)
        self._x = self._x + step
        self._rest = self._rest - along * _wide(t, along) - bend * _wide(t * t, bend)
        old = self._gradient
        if self.iterations % 32 == 31:  # the sum of steps drifts
            self._rest = self._start - self._image(self._x)
        self._gradient = self._slope()
        turn = self._gradient - old
        # A pair that bends the wrong way counts for nothing in its group.
        bend_along, square = _inner(step, turn), _inner(turn, turn)
        fine = (bend_along > 1e-12 * _norm(step) * square.sqrt()) & (bend_along > _TINY)
        self._unit = torch.where(fine, bend_along / square.clamp_min(_TINY), self._unit)
        if not bool(fine.all()):
            step, turn = step * _wide(fine, step), turn * _wide(fine, turn)
        self._steps, self._turns = self._steps[1 - self._memory :], self._turns[1 - self._memory :]
        self._steps.append(step)
        self._turns.append(turn)


def best_step(a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor) -> Tensor:
    """Return the t > 0 at which a₁t + a₂t² + a₃t³ + a₄t⁴ is least, float64; 0 where there is none.

    Args:
        a1: Negative where a step helps.
        a2: Factor of t².
        a3: Factor of t³.
        a4: Factor of t⁴; not negative.
    """
    a1, a2, a3, a4 = (a.double() for a in (a1, a2, a3, a4))
    # In units of the step t₁ of a bound: |a₁| = the largest of the other terms there, so that all is of order 1.
    size = a1.abs().clamp_min(1e-300)
    unit = torch.stack([size / a2.abs(), (size / a3.abs()).sqrt(), (size / a4).pow(1 / 3)]).nan_to_num(
        posinf=1e30
    )
    scale = unit.amin(dim=0)
    b1, b2 = a1 / size, 2 * a2 * scale / size
    b3, b4 = 3 * a3 * scale**2 / size, 4 * a4 * scale**3 / size
    # b₁ + b₂u + b₃u² + b₄u³ = 0 with v = 1/u: b₁v³ + b₂v² + b₃v + b₄ = 0 has a leading coefficient of −1.
    companion = torch.zeros(len(a1), 3, 3, dtype=torch.float64)
    companion[:, 0, 0], companion[:, 0, 1], companion[:, 0, 2] = -b2 / b1, -b3 / b1, -b4 / b1
    companion[:, 1, 0] = companion[:, 2, 1] = 1.0
    companion = companion.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    roots = torch.linalg.eigvals(companion)
    real = (roots.imag.abs() <= 1e-6 * roots.abs()) & (roots.real > 0)
    t = torch.where(real, scale[:, None] / roots.real, 0.0)
    worth = ((a4[:, None] * t + a3[:, None]) * t + a2[:, None]) * t * t + a1[:, None] * t
    best = worth.nan_to_num(nan=0.0).argmin(dim=1, keepdim=True)
    chosen = t.gather(1, best)[:, 0].nan_to_num(nan=0.0, posinf=0.0)
    return torch.where(a1 < 0, chosen, 0.0)


def _turned(a: Tensor) -> Tensor:
    """Return (Im, −Re) of columns that hold (Re, Im): the product with −i."""
    half = a.shape[-1] // 2
    return torch.cat([a[..., half:], -a[..., :half]], dim=-1)


def _stacked(a: Tensor) -> Tensor:
    """Return [[Re, Im], [Im, −Re]] of columns (Re, Im): times (Re, Im)ᵀ of b it is a·bᴴ, real over imaginary."""
    return torch.cat([a, _turned(a)], dim=-2)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return ⟨a, b⟩ per group."""
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1)).reshape(-1)


def _norm(a: Tensor) -> Tensor:
    return _inner(a, a).sqrt()


def _wide(a: Tensor, like: Tensor) -> Tensor:
    return a.reshape(-1, *(1,) * (like.ndim - 1))
