"""One problem during training: its operators followed from step to step, and brought back when they exceed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spectool.clip.family import ConvFamily, flat
from spectool.clip.leading import leading
from spectool.clip.problem import Constraint, Problem, closed_form, coordinates_of, family_of, is_matrix
from spectool.clip.project import Options
from spectool.clip.solve import solve
from spectool.clip.store import store
from spectool.clip.warm import first_rows, follow, thorough, warm_bundle, warm_svd
from spectool.errors import OperatorError
from spectool.graph.types import Region
from spectool.graph.writing import Writer
from spectool.linear import InfiniteConv, LinearMap
from spectool.lower import lower
from spectool.lower.replay import Load

Write = Callable[[Mapping[str, Tensor]], None]

GAP = 0.05
"""Relative distance to the nearest weights at which a clip during training stops."""

_CLOSE = 2e-5
_LOOSE = 0.3
_LARGE = 512
_TRIES = 4
_TOL = 1e-3


@dataclass
class Followed:
    """One operator and its leading singular rows.

    Attributes:
        region: The operator.
        limit: Its limit; None where it is only watched.
        rows: Kept right singular rows ``(b, size)``, float32, on the CPU; None before the first look.
        sigma: Latest estimate of σ₁; NaN before the first look and where the weights are not finite.
    """

    region: Region
    limit: float | None
    rows: Tensor | None = None
    sigma: float = float("nan")

    def step(self, load: Load, count: int, steps: int, source: torch.Generator) -> int:
        """Follow the operator as it is now; return the applications spent."""
        A = self.map(load)
        rows = first_rows(A, count, source) if self.rows is None else self.rows
        values, self.rows = follow(A, rows, steps)
        self.sigma = float(values[0])
        return 2 * steps * len(rows)

    def verify(self, load: Load, count: int, source: torch.Generator) -> int:
        """Find σ₁ of the operator as it is now, from the kept rows and random ones; return the applications."""
        A = self.map(load)
        rows = first_rows(A, count, source) if self.rows is None else self.rows
        if not bool(torch.isfinite(A.matvec(rows.reshape(-1, *A.in_shape))).all()):
            self.sigma = float("nan")
            return len(rows)
        found = thorough(A, rows, source, len(rows))
        self.rows = flat(found.right).contiguous()
        self.sigma = float(found.values[0])
        return found.applications + len(rows)

    def map(self, load: Load) -> LinearMap:
        """Return the operator as it is now, in float32.

        Raises:
            OperatorError: If it cannot be built.
        """
        A = lower(self.region, load, dtype=torch.float32)
        if isinstance(A, InfiniteConv):
            raise OperatorError(f"{self.region.key}: its input size is not known", hint="give input_shape")
        return A

    @property
    def ratio(self) -> float:
        """σ₁ over the limit; 0 where either is not known."""
        return self.sigma / self.limit if self.limit and not math.isnan(self.sigma) else 0.0


@dataclass
class Tracked:
    """A problem and its operators.

    Attributes:
        problem: Constraints; its ``load`` reads what is there now.
        members: Its operators, parallel to the constraints.
        writer: The way back to stored tensors.
        count: How many rows are kept per operator.
        how: What made the last projection.
        applications: Operator applications so far.
    """

    problem: Problem
    members: tuple[Followed, ...]
    writer: Writer
    count: int
    how: str = field(default="", init=False)
    applications: int = field(default=0, init=False)

    def excess(self, source: torch.Generator) -> float:
        """Verify every operator and return the largest σ₁ over limit."""
        for member in self.members:
            self.applications += member.verify(self.problem.load, self.count, source)
        return max(member.ratio for member in self.members)

    def clip(self, read: Load, write: Write, options: Options, source: torch.Generator) -> bool:
        """Bring the operators within their limits, to 1e-4; return whether anything was changed.

        Args:
            read: Reads a stored tensor as it is now.
            write: Puts values into stored tensors.
            options: How; ``auto`` starts from the kept rows.
            source: Of random rows.

        Raises:
            OperatorError: If no weights obey the limits; nothing is changed then.
        """
        ratio = self.excess(source)
        if ratio <= 1.0 + _CLOSE or any(math.isnan(member.sigma) for member in self.members):
            return False
        # What is there now must not change under a projection that reads it.
        homes = {home for name in self.problem.names for home in self.writer.homes(name) or ()}
        before = {home: read(home).clone() for home in homes}
        frozen = replace(self.problem, load=_copies(self.problem.load))
        wanted = self._project(frozen, ratio, options, source)
        types = {home: value.dtype for home, value in before.items()}
        if all(kind.itemsize >= 4 for kind in types.values()):
            factor = 1.0
            for _ in range(_TRIES):
                scaled = {name: value * factor for name, value in wanted.items()}
                write(self._edits(scaled, before))
                ratio = self.excess(source)
                if ratio <= 1.0 + _CLOSE:
                    return True
                factor /= ratio
        # Half types need their roundings repaired; anything else that is still above, a cold start.
        write(before)
        made = store(frozen, wanted, self.writer, types.__getitem__, before.__getitem__, seed=options.seed)
        write(made.edits)
        self.excess(source)
        return True

    def _edits(self, wanted: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = self.writer.edits(wanted, before.__getitem__)
        return {key: value.to(before[key].dtype) for key, value in made.items()}

    def _project(
        self, problem: Problem, ratio: float, options: Options, source: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return new values of the edited constants, from the kept rows where that can be done."""
        if options.method == "auto" and len(problem.names) == 1:
            warm = self._warm(problem, options, source)
            if warm is not None:
                return warm
        made = solve(problem, ratio, options)
        self.applications += made.applications
        self.how = made.method
        return made.weights

    def _warm(
        self, problem: Problem, options: Options, source: torch.Generator
    ) -> Mapping[str, Tensor] | None:
        """Return new values from the kept rows, or None where a cold start is the better or the only way."""
        (name,) = problem.names
        forms = [closed_form(c.region, name, problem.load) for c in problem.constraints]
        coordinates = coordinates_of(problem, forms)
        form = forms[0] if len(forms) == 1 else None
        if form is not None and is_matrix(form, coordinates.weight):
            rows = self.members[0].rows
            if form.kind != "matrix" or min(coordinates.weight.shape) < _LARGE or rows is None:
                return None
            start = coordinates.start.T if form.transposed else coordinates.start
            made = warm_svd(start, problem.constraints[0].limit, rows, source)
            if made is None:
                return None
            self.how, self.applications = "svd of kept triplets", self.applications + made[1]
            return {name: coordinates.to_weight(made[0].T if form.transposed else made[0])}
        if any(f is not None and f.geometry is not None and f.geometry.groups > 1 for f in forms):
            return None
        family, limit = family_of(problem, coordinates, forms, options.device)
        if isinstance(family, ConvFamily) and form is not None and form.geometry and form.in_shape:
            # Float32 is enough for 1e-4, and two to four times as fast.
            family = ConvFamily(coordinates.start.float(), form.in_shape, form.geometry)
        if not family.homogeneous:
            fixed = leading(family.at(torch.zeros_like(family.start)), 2, source, tol=_TOL)
            self.applications += fixed.applications
            if float(fixed.values[0]) >= limit:
                share = float(fixed.values[0]) / limit
                raise OperatorError(
                    f"{problem.key}: {share:.4g} times the limit does not depend on the weight",
                    hint="raise the limit",
                )
            return None
        found = warm_bundle(family, limit, self._joined_rows(), source, gap=GAP)
        self.applications += family.applications if found is None else found.applications
        if found is None or found.gap > _LOOSE:
            return None
        self.how = f"bundle from kept triplets, {found.rounds} rounds"
        return {name: coordinates.to_weight(found.weight.reshape(coordinates.weight.shape))}

    def _joined_rows(self) -> Tensor:
        """Return the kept rows as rows of the direct sum of the operators."""
        kept = [member.rows for member in self.members if member.rows is not None]
        total = sum(rows.shape[1] for rows in kept)
        made, begin = [], 0
        for rows in kept:
            made.append(torch.nn.functional.pad(rows, (begin, total - begin - rows.shape[1])))
            begin += rows.shape[1]
        return torch.cat(made)


def tracked(problem: Problem, writer: Writer, count: int, followed: Mapping[int, Followed]) -> Tracked:
    """Return a problem with its operators.

    Args:
        problem: The problem.
        writer: The way back to stored tensors.
        count: How many rows are kept per operator.
        followed: id of a region → its operator.
    """
    return Tracked(problem, tuple(followed[id(c.region)] for c in problem.constraints), writer, count)


def _copies(load: Load) -> Load:
    return lambda name: load(name).clone()


__all__ = ["GAP", "Constraint", "Followed", "Tracked", "tracked"]
