"""Several edited weights that hang together: a chain of layers, or regions that share a weight.

The operators are then products of the weights, the set of weights that obey is no longer convex, and there is no
lower bound. Around the present weights each operator is replaced by its linear part in all weights at once; that
problem is convex and solved by the bundle; its solution is the next point. What comes out is scaled to the limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spectool.clip.bundle import bundle
from spectool.clip.coordinates import Coordinates
from spectool.clip.family import Family
from spectool.clip.leading import leading
from spectool.clip.problem import Problem, family_in, operator_of, uses
from spectool.clip.project import Options, Projected
from spectool.errors import OperatorError
from spectool.linear import LinearMap
from spectool.progress import Progress, Step, silent

_OUTER = 8
_ROUNDS = 10
_BETTER = 0.01


def project_several(
    problem: Problem, before: float, options: Options, progress: Progress = silent
) -> Projected:
    """Return values of several constants whose operators obey their limits.

    Args:
        problem: Constraints with more than one edited constant.
        before: Largest σ₁ over limit, as it is.
        options: How; only ``auto``, ``bundle`` and ``scale`` make sense.
        progress: Receives steps.

    Raises:
        OperatorError: If no such values were found, or the method cannot do it.
    """
    if options.method not in ("auto", "bundle", "scale"):
        raise OperatorError(
            f"{options.method} cannot change several weights at once", hint="use --method auto"
        )
    start = {name: problem.load(name).double() for name in problem.names}
    joint = _Joint(problem, start, options.device)
    if options.method == "scale":
        scaled = joint.scaled(start)
        return _projected(start, scaled, joint, before, "scale", 1, joint.applications, "")
    convex = joint.is_affine(start)
    best: dict[str, Tensor] | None = None
    present, change, lower, count = start, math.inf, 0.0, 0
    for count in range(1, _OUTER + 1):
        family = joint.linearised(present)
        gap, rounds = (options.gap, 40) if convex else (0.05, _ROUNDS)
        made = bundle(
            family, 1.0, gap=gap, rounds=rounds, seed=options.seed, feasible=False, progress=progress
        )
        joint.applications += made.applications
        reached = joint.parts(made.weight)
        # A full step may overshoot where the product bends; half of it then.
        if joint.norm(reached) > max(1.0, joint.norm(present)) * 1.02:
            reached = {name: torch.lerp(present[name], reached[name], 0.5) for name in start}
        candidate = joint.scaled(reached)
        moved = joint.distance(candidate)
        progress(Step(problem.key, matvecs=joint.applications, message=f"pass {count}"))
        done = convex or moved > change * (1 - _BETTER)
        lower = made.lower if convex else 0.0
        if moved < change:
            best, change = candidate, moved
        if done:
            break
        present = reached
    if best is None:
        raise OperatorError(f"{problem.key}: no weights were found that obey the limits")
    together = f"{len(problem.names)} weights at once"
    if convex:
        length = float(torch.linalg.vector_norm(joint.flat(start)))
        how, spent = f"bundle ({together})", joint.applications
        found = _projected(start, best, joint, before, how, made.iterations, spent, "")
        return replace(found, lower=lower / length if lower > 0 else None)
    note = f"{together}: not convex, no lower bound"
    return _projected(start, best, joint, before, "bundle, linearised", count, joint.applications, note)


def bends(problem: Problem) -> bool:
    """Return whether a problem with one constant is not affine in it: it is used twice in a row."""
    (name,) = problem.names
    for constraint in problem.constraints:
        region = constraint.region
        if sum(node.inputs.count(name) for node in region.nodes) < 2 or region.in_shape is None:
            continue
        make = operator_of(region, problem.load, torch.float64, torch.device("cpu"))
        weight, source = problem.load(name).double(), torch.Generator().manual_seed(0)
        other = weight * torch.randn(weight.shape, generator=source, dtype=torch.float64)
        x = torch.randn(1, *region.in_shape, generator=source, dtype=torch.float64)
        with torch.no_grad():
            ends = make({name: weight}).matvec(x) + make({name: other}).matvec(x)
            middle = 2.0 * make({name: 0.5 * (weight + other)}).matvec(x)
        if float((ends - middle).abs().max()) > 1e-9 * float(ends.abs().max()):
            return True
    return False


def scale_bent(problem: Problem, before: float, options: Options) -> Projected:
    """Return the one constant of a problem that ``bends``, scaled to the limit."""
    if options.method not in ("auto", "scale"):
        raise OperatorError(
            f"{options.method} needs operators affine in the weight", hint="use --method auto"
        )
    start = {name: problem.load(name).double() for name in problem.names}
    joint = _Joint(problem, start, options.device)
    note = "a weight used twice in a row: not convex, no lower bound, scaled"
    return _projected(start, joint.scaled(start), joint, before, "scale", 1, joint.applications, note)


def _projected(
    start: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
    joint: _Joint,
    before: float,
    method: str,
    count: int,
    spent: int,
    note: str,
) -> Projected:
    plain = joint.distance(joint.scaled(start)) if joint.degree else None
    return Projected(
        weights=best,
        metric="weights",
        change=joint.distance(best),
        lower=None,
        scaling=plain,
        method=method,
        iterations=count,
        applications=spent,
        distance=joint.distance,
        note=note,
    )


def distance(start: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> float:
    """Return ‖w − w₀‖/‖w₀‖ over several constants together."""
    moved = sum(float((values[name].double() - start[name]).square().sum()) for name in start)
    return math.sqrt(moved / max(sum(float(value.square().sum()) for value in start.values()), 1e-300))


class _Joint:
    """The operators of a problem as functions of all edited constants."""

    def __init__(self, problem: Problem, start: Mapping[str, Tensor], device: torch.device) -> None:
        self._problem, self._start, self._device = problem, start, device
        self._shapes = {name: tuple(value.shape) for name, value in start.items()}
        self._places: dict[str, Tensor] = dict(problem.places or {})
        begin = 0
        for name in problem.names if problem.places is None else ():
            self._places[name] = torch.arange(begin, begin + start[name].numel())
            begin += start[name].numel()
        self._size = 1 + max(int(places.max()) for places in self._places.values() if len(places))
        self.applications = 0
        zero = {name: torch.zeros_like(value) for name, value in start.items()}
        self.fixed = self.norm(zero)
        self.degree = self.fixed == 0.0

    def families(self, values: Mapping[str, Tensor]) -> list[list[tuple[str, Family]]]:
        """Return for each constraint its operator as a function of each constant, the others as given."""
        load = self._problem.load
        made = []
        for constraint in self._problem.constraints:
            names = [name for name in self._problem.names if uses(constraint.region, name)]
            made.append(
                [
                    (
                        name,
                        family_in(
                            constraint.region,
                            name,
                            Coordinates(values[name], None, "weights"),
                            None,
                            lambda wanted: values[wanted] if wanted in values else load(wanted),
                            torch.float64,
                            self._device,
                        ),
                    )
                    for name in names
                ]
            )
        return made

    def linearised(self, values: Mapping[str, Tensor]) -> Family:
        """Return the operators, linear in the joint weight around ``values``, whose start is w₀."""
        start = self.flat(self._start)
        return _Linearised(start, self.families(values), self._shapes, self._places, self._limits())

    def distance(self, values: Mapping[str, Tensor]) -> float:
        """Return ‖w − w₀‖/‖w₀‖ over the distinct entries of all constants."""
        return distance({"": self.flat(self._start)}, {"": self.flat(values)})

    def is_affine(self, values: Mapping[str, Tensor]) -> bool:
        """Return whether the operators are affine in all constants at once: branches, not chains."""
        source = torch.Generator().manual_seed(0)
        other = {
            name: value * torch.randn(value.shape, generator=source, dtype=torch.float64)
            for name, value in values.items()
        }
        other = self.parts(self.flat(other))
        claimed = self.linearised(values).at(self.flat(other))
        x = torch.randn(1, *claimed.in_shape, generator=source, dtype=torch.float64)
        with torch.no_grad():
            said, begin = claimed.matvec(x), 0
            true = []
            for families, limit in zip(self.families(other), self._limits(), strict=True):
                A = families[0][1].at(families[0][1].start)
                size = math.prod(A.in_shape)
                true.append(A.matvec(x[:, begin : begin + size].reshape(1, *A.in_shape)).flatten(1) / limit)
                begin += size
            difference = float((torch.cat(true, dim=1) - said).abs().max())
        return difference <= 1e-9 * float(said.abs().max())

    def _limits(self) -> list[float]:
        return [constraint.limit for constraint in self._problem.constraints]

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the distinct entries of all constants in one row."""
        made = torch.zeros(self._size, dtype=torch.float64)
        for name, places in self._places.items():
            made[places] = values[name].double().flatten()
        return made

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the constants in one row as they are shaped."""
        wide = weight.double()
        return {name: wide[places].reshape(self._shapes[name]) for name, places in self._places.items()}

    def norm(self, values: Mapping[str, Tensor]) -> float:
        """Return the largest σ₁ over limit."""
        worst = 0.0
        for families, limit in zip(self.families(values), self._limits(), strict=True):
            family = families[0][1]
            found = leading(family.at(family.start), 4, torch.Generator().manual_seed(0), tol=1e-4)
            self.applications += found.applications
            worst = max(worst, float(found.values[0]) / limit)
        return worst

    def scaled(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return t·values with the largest σ₁ over limit at 1, 0 < t ≤ 1.

        Raises:
            OperatorError: If scaling cannot do it.
        """
        top = self.norm(values)
        if top <= 1.0:
            return dict(values)
        if self.fixed >= 1.0:
            raise OperatorError(
                f"{self._problem.key}: {self.fixed:.4g} times the limit does not depend on the weights",
                hint="raise the limit",
            )
        low, high = 0.0, 1.0
        t = top ** (-1.0 / len(values))
        for _ in range(50):
            value = self.norm({name: tensor * t for name, tensor in values.items()})
            low, high = (t, high) if value <= 1.0 else (low, t)
            if 1.0 - 1e-5 <= value <= 1.0:
                break
            guess = t * value ** (-1.0 / len(values)) * (1 - 2e-6)
            t = guess if low < guess < high else 0.5 * (low + high)
        return {name: tensor * low for name, tensor in values.items()}


class _Linearised(Family):
    """Σᵢ Aᵢ(yᵢ) − (n−1)·A, where Aᵢ is the operator as a function of the i-th constant and A the present one."""

    def __init__(
        self,
        start: Tensor,
        families: Sequence[Sequence[tuple[str, Family]]],
        shapes: Mapping[str, tuple[int, ...]],
        places: Mapping[str, Tensor],
        limits: Sequence[float],
    ) -> None:
        self._families, self._shapes, self._places = families, shapes, places
        self._limits = limits

        def build(y: Tensor) -> LinearMap:
            maps = []
            for entries in families:
                parts = [family.at(self._part(y, name)) for name, family in entries]
                present = entries[0][1].at(entries[0][1].start)
                maps.append(_Affine(parts, present))
            from spectool.clip.sums import DirectSum

            return DirectSum(maps, [1.0 / limit for limit in limits])

        super().__init__(build, start, homogeneous=False)

    def _part(self, y: Tensor, name: str) -> Tensor:
        return y[self._places[name]].reshape(self._shapes[name])

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the gradients of all constants side by side."""
        p = len(left)
        made = left.new_zeros(p * (p + 1) // 2, self.start.numel())
        out = size = 0
        for entries, limit in zip(self._families, self._limits, strict=True):
            A = entries[0][1].at(entries[0][1].start)
            m, n = math.prod(A.out_shape), math.prod(A.in_shape)
            u = left[:, out : out + m].reshape(p, *A.out_shape) / limit
            v = right[:, size : size + n].reshape(p, *A.in_shape)
            for name, family in entries:
                made.index_add_(1, self._places[name], family.pairs(u, v))
            out, size = out + m, size + n
        return made


class _Affine:
    """The sum of some maps less (n−1) times another."""

    def __init__(self, maps: Sequence[LinearMap], present: LinearMap) -> None:
        self._maps, self._present, self._less = tuple(maps), present, len(maps) - 1
        self.in_shape, self.out_shape = present.in_shape, present.out_shape
        self.dtype, self.device = present.dtype, present.device

    def matvec(self, x: Tensor) -> Tensor:
        """Apply the sum."""
        y = self._maps[0].matvec(x)
        for A in self._maps[1:]:
            y = y + A.matvec(x)
        return y - self._less * self._present.matvec(x) if self._less else y

    def rmatvec(self, y: Tensor) -> Tensor:
        """Apply its adjoint."""
        x = self._maps[0].rmatvec(y)
        for A in self._maps[1:]:
            x = x + A.rmatvec(y)
        return x - self._less * self._present.rmatvec(y) if self._less else x

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> _Affine:
        """Return itself: its parts hold their weights in one type."""
        return self
