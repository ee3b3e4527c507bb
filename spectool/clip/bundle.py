"""The nearest weight by a spectral bundle: exact, for any operator that is affine in the weight.

minimise ½‖w − w₀‖² subject to ‖A(w)‖₂ ≤ c, with A(w) = B + L(w), has the dual: maximise
⟨Z, A(w₀)⟩ − ½‖L*Z‖² − c‖Z‖_* over Z, where w = w₀ − L*Z. At the optimum Z = U Y Vᵀ with Y ⪰ 0 on the singular
pairs of A(w) whose value is c, and there is one of small rank r (r(r+1)/2 ≤ numel w). So the dual is solved on a
subspace of pairs, the leading pairs of what it leaves join the subspace, and so on until none is above c. Every
round improves the lower bound on the change of *any* feasible weight; nothing is ever raised.

**Source:** C. Helmberg, F. Rendl, "A spectral bundle method for semidefinite programming", SIAM J. Optim. 10
(2000), applied to the dilation [[0, A], [Aᵀ, 0]]; the primal is strongly convex and needs no proximal centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.clip.family import Family, flat
from spectool.clip.interior import minimise, smat, svec, svec_index
from spectool.clip.leading import Leading, leading
from spectool.errors import OperatorError
from spectool.progress import Progress, Step, silent

BLOCK = 16
"""Leading pairs that join per round."""

SUBSPACE = 32
"""Pairs the dual variable may live on at first: 528 unknowns."""

LARGEST = 64
"""... and where the gap stops falling: 2080 unknowns."""

_NEW = 4
"""Random rows in a block that otherwise starts from what is known: a direction that the known ones never reach
(another frequency of a circular convolution) is found."""

_SLOW = 0.7
"""Share of the gap of two rounds ago from which on a round counts as slow."""

_FAR = 30.0
"""Times ‖w₀‖ beyond which no weight is looked for."""

_UNSEEN = 4e-4
"""Relative excess of a weight that seemed to obey at which a round is taken back."""

_PAIR_BYTES = 1 << 29
_FEWEST = 24


@dataclass(frozen=True)
class Projection:
    """A weight that obeys the limit, and how near it is to the nearest.

    Attributes:
        weight: w; ‖A(w)‖ ≤ c to about 1e-4 (the caller measures and rescales).
        lower: Lower bound on ‖w′ − w₀‖ over all w′ that obey the limit; 0 where there is none.
        method: What made it.
        iterations: Rounds taken.
        applications: Operator applications and gradients.
        note: Anything worth saying in words.
    """

    weight: Tensor
    lower: float
    method: str
    iterations: int
    applications: int
    note: str = ""


def bundle(
    family: Family,
    limit: float,
    *,
    gap: float = 0.005,
    rounds: int = 40,
    seed: int = 0,
    block: int = BLOCK,
    subspace: int = SUBSPACE,
    feasible: bool = True,
    progress: Progress = silent,
) -> Projection:
    """Return the nearest weight with ‖A(w)‖₂ ≤ ``limit``.

    Costs 2–40 rounds of some hundred applications and p(p+1) gradients each, p ≤ ``subspace``.

    Args:
        family: The operators.
        limit: c, positive.
        gap: Relative distance between the change and its lower bound at which to stop.
        rounds: Most rounds.
        seed: Of the start vectors.
        block: Pairs that join per round.
        subspace: Pairs in the subspace at first; fewer where their images would not fit into 512 MB.
        feasible: Whether the result has to obey the limit; else the last weight will do.
        progress: Receives a step per round.

    Raises:
        OperatorError: If no weight obeys the limit.
    """
    source = torch.Generator().manual_seed(seed)
    start = family.start
    most = max(_FEWEST, int((2 * _PAIR_BYTES / (start.numel() * start.element_size())) ** 0.5))
    # No more than r pairs carry the solution, r(r+1)/2 ≤ numel w.
    rank = int((2.0 * start.numel()) ** 0.5) + 1
    block, subspace = min(block, max(6, rank + 4)), min(subspace, max(12, 2 * rank + 8))
    subspace, most = min(subspace, most), min(max(subspace, LARGEST), most)
    block = min(block, subspace // 2)
    found = leading(family.at(start), block, source, level=limit, tol=1e-2)
    spent = found.applications
    if float(found.values[0]) <= limit * (1 + 1e-3):
        found = leading(family.at(start), block, source, start=flat(found.right), level=limit, tol=1e-6)
        spent += found.applications
        if float(found.values[0]) <= limit:
            return Projection(start, 0.0, "bundle", 0, spent + family.applications)
    fixed = 0.0 if family.homogeneous else _norm(family, torch.zeros_like(start), source)
    best, nearest, lower, count = math.inf, start, family.floor(limit), 0
    if family.homogeneous:
        tight = leading(family.at(start), block, source, start=flat(found.right), level=math.inf, tol=1e-4)
        spent += tight.applications
        nearest = start * (limit / float(tight.values[0]))
        best = float(torch.linalg.vector_norm(nearest - start))
        if best <= lower * (1 + gap):
            return Projection(nearest, lower, "scaled", 0, spent + family.applications)
    dual = _Dual(family, limit)
    gaps: list[float] = []
    while count < rounds:
        count += 1
        dual.extend(found, subspace - block)
        weight, bound = dual.solve()
        lower = max(lower, bound)
        if math.isinf(best) and lower > _FAR * float(torch.linalg.vector_norm(start)):
            break
        known = flat(found.right)[: max(1, block - _NEW)]
        found = leading(family.at(weight), block, source, start=known, level=limit, tol=1e-4, excess=0.1)
        spent += found.applications
        top = float(found.values[0])
        # A feasible candidate: w itself, or w scaled down; σ₁ is convex on the way to the fixed part alone.
        shrink = 1.0 if top <= limit else (limit - fixed) / (top - fixed) if fixed < limit else 0.0
        if shrink > 0:
            candidate = weight * shrink
            change = float(torch.linalg.vector_norm(candidate - start))
            if change < best:
                best, nearest = change, candidate
        elif top <= limit * (1 + 2e-4) and lower < best:
            best, nearest = float(torch.linalg.vector_norm(weight - start)), weight
        residual = best / lower - 1.0 if lower > 0 else math.inf
        progress(
            Step("bundle", matvecs=spent + family.applications, residual=residual, message=f"round {count}")
        )
        if residual <= gap:
            # What a warm start did not see, a cold one does.
            cold = leading(family.at(nearest), block, source, level=limit, tol=1e-4, excess=0.1)
            spent += cold.applications
            if float(cold.values[0]) <= limit * (1 + _UNSEEN):
                break
            best, found = math.inf, cold
        gaps.append(residual)
        if len(gaps) > 2 and gaps[-1] > _SLOW * gaps[-3] and subspace < most:
            subspace, block, gaps = min(most, subspace + 16), min(block + 8, subspace // 2), []
    if math.isinf(best) and not feasible:
        nearest = weight
    elif math.isinf(best):
        raise OperatorError(
            f"no weight was found that brings σ₁ to {limit:g}: {fixed:g} of it does not depend on the weight",
            hint="raise the limit",
        )
    note = "" if best <= lower * (1 + gap) else f"stopped after {count} rounds"
    return Projection(nearest, lower, "bundle", count, spent + family.applications, note)


def _norm(family: Family, weight: Tensor, source: torch.Generator) -> float:
    found = leading(family.at(weight), 2, source, tol=1e-5)
    family.applications += found.applications
    return float(found.values[0])


class _Dual:
    """The dual on a subspace: Z = U Y Vᵀ + α·Z₀, Z₀ being what made way.

    Rows (uᵢ, vᵢ)/√2 are orthonormal in the joint space, so that the trace of Y bounds the nuclear norm of Z.
    """

    def __init__(self, family: Family, limit: float) -> None:
        self._family, self._limit = family, limit
        start = family.at(family.start)
        self._shapes = start.out_shape, start.in_shape
        self._left = self._right = torch.zeros(0, 0)
        self._y = self._slack = self._linear = self._images = torch.zeros(0)
        # L*Z₀ and ⟨Z₀, A(w₀)⟩ − c·tr, for Z₀ of trace 1; none at first.
        self._rest: Tensor | None = None
        self._rest_linear = 0.0

    def extend(self, found: Leading, room: int) -> None:
        """Let pairs join; of the old ones stay those the solution uses and those nearest to the limit."""
        left, right = flat(found.left), flat(found.right)
        used = found.values > 0
        left, right = left[used], right[used]
        if len(self._left):
            p = len(self._left)
            y = smat(self._y[: p * (p + 1) // 2], p)
            values, turn = torch.linalg.eigh(y)
            strong = values > 1e-3 * values.max()
            idle = turn[:, ~strong]
            idle = idle @ torch.linalg.eigh(idle.T @ self._slack @ idle).eigenvectors
            ordered = torch.cat([turn[:, strong].flip(1), idle], dim=1)
            stay, leave = ordered[:, :room], ordered[:, room:]
            self._put_aside(leave @ (leave.T @ y @ leave) @ leave.T)
            stay = stay.to(left.dtype)
            left, right = torch.cat([stay.T @ self._left, left]), torch.cat([stay.T @ self._right, right])
        joint = _orthonormal(torch.cat([left, right], dim=1)) * 2**0.5
        self._left, self._right = joint[:, : left.shape[1]], joint[:, left.shape[1] :]

    def _put_aside(self, y: Tensor) -> None:
        """Merge U y Vᵀ and α·Z₀ into a new Z₀."""
        t = len(self._linear)
        alpha = float(self._y[t:].sum())
        trace = float(y.trace()) + alpha
        if trace <= 1e-6 * float(self._y.abs().max()):
            self._rest = None
            return
        vector = svec(y)
        image = vector.to(self._images.dtype) @ self._images
        linear = float(vector @ self._linear)
        if self._rest is not None:
            image = image + alpha * self._rest
            linear += alpha * self._rest_linear
        self._rest, self._rest_linear = image / trace, linear / trace

    def solve(self) -> tuple[Tensor, float]:
        """Return (w₀ − L*Z, lower bound) of the best Z on the subspace."""
        family, start, p = self._family, self._family.start, len(self._left)
        left, right = self._left.reshape(p, *self._shapes[0]), self._right.reshape(p, *self._shapes[1])
        self._images = torch.zeros(0)  # makes room: they may be gigabytes
        self._images = family.pairs(left, right)
        moved = flat(family.at(start).matvec(right))
        family.applications += p
        block = (self._left @ moved.T).double()
        norms = 0.5 * (self._left @ self._left.T + self._right @ self._right.T).double()
        rows, columns, factors = svec_index(p)
        self._linear = (0.5 * (block + block.T) - self._limit * norms)[rows, columns] * factors
        linear, stack, rest = self._linear, self._images, self._images[:0]
        if self._rest is not None:
            rest = self._rest[None]
            linear = torch.cat([linear, torch.tensor([self._rest_linear], dtype=torch.float64)])
        images = None
        if stack.shape[1] < len(linear):
            # Where few weights span the images, gram and images must agree to the last digit.
            images = torch.cat([stack, rest]).double()
            gram = images @ images.T
        else:
            side, own = (stack @ rest.T).double(), (rest @ rest.T).double()
            gram = torch.cat([(stack @ stack.T).double(), side], dim=1)
            gram = torch.cat([gram, torch.cat([side.T, own], dim=1)])
        self._y = minimise(gram, linear, p, images=images)
        t = len(self._linear)
        self._slack = smat(gram[:t] @ self._y - self._linear, p)
        step = self._y[:t].to(stack.dtype) @ stack + self._y[t:].to(stack.dtype) @ rest
        length = float(torch.linalg.vector_norm(step))
        # The best multiple of Z: ⟨Z, A(w₀)⟩ − c‖Z‖_* over ‖L*Z‖.
        lower = max(0.0, float(self._y @ linear)) / length if length > 0 else 0.0
        return start - step.reshape(start.shape), lower


def _orthonormal(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows, the first ones first; what is dependent falls out."""
    basis = rows[:0]
    for row in rows:
        fresh = row
        for _ in range(2):
            fresh = fresh - (basis @ fresh) @ basis
        norm = torch.linalg.vector_norm(fresh)
        if norm > 1e-6 * torch.linalg.vector_norm(row):
            basis = torch.cat([basis, (fresh / norm)[None]])
    return basis
