"""Choose a solver for a problem with one constant, run it, and bring the result to the limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from spectool.clip.bundle import Projection, bundle
from spectool.clip.coordinates import Coordinates, Covariance, Metric
from spectool.clip.family import ConvFamily, Family
from spectool.clip.leading import leading
from spectool.clip.measure import covariance_of, not_by_data
from spectool.clip.problem import (
    Closed,
    Problem,
    closed_form,
    coordinates_of,
    family_of,
    is_matrix,
    is_row_matrix,
)
from spectool.clip.published import top_value
from spectool.clip.turned import TurnedFamily
from spectool.errors import OperatorError
from spectool.linear import ConvGeometry
from spectool.progress import Progress, silent

Method = Literal["auto", "svd", "bundle", "symbol", "scale", "fastclip", "sedghi"]

_MANY = 16
"""Values above the limit from which on the symbol is the quicker way."""

_SMALL = 500_000
"""Entries of a kernel times positions up to which the bundle is quick whatever the limit."""

_ROUNDS, _GOOD = 6, 0.03
"""Rounds of the bundle that accompany the symbol, and the gap at which they stop."""

_ORDINARY = 1e-6, 1e6
"""Limits between which nothing is rescaled."""

_GROUPS = 64
"""Groups above the limit from which on they are solved together, by the symbol."""


@dataclass(frozen=True)
class Options:
    """How to project.

    Attributes:
        method: Solver; ``auto`` chooses.
        exact: Whether to go on to within one percent of the lower bound, whatever it takes.
        all_sizes: Whether the bound is to hold for every input size.
        seed: Of the start vectors.
        device: Where to compute.
        covariances: Constant → H ``(groups, taps, taps)`` of what its rows see, by which its change is measured.
        uncovered: Constant → why there is none; ``""`` for any other. None where none was asked for.
    """

    method: Method = "auto"
    exact: bool = False
    all_sizes: bool = False
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    covariances: Mapping[str, Tensor] = field(default_factory=dict)
    uncovered: Mapping[str, str] | None = None

    @property
    def gap(self) -> float:
        """Relative distance to the lower bound at which to stop."""
        return 0.007 if self.exact else 0.03


@dataclass(frozen=True)
class Projected:
    """New values of the edited constants.

    Attributes:
        weights: Constant → value, float64.
        metric: In which the change was minimised.
        change: ‖x − x₀‖/‖x₀‖ of the result.
        lower: Lower bound on that of any weights that obey the limits; None where there is none.
        scaling: What plain scaling would have cost; None where scaling cannot reach the limit.
        method: What made it, and why where there was a choice.
        iterations: Rounds.
        applications: Operator applications.
        distance: Measures other values of the constants in the same metric.
        note: Anything worth saying in words.
    """

    weights: Mapping[str, Tensor]
    metric: Metric
    change: float
    lower: float | None
    scaling: float | None
    method: str
    iterations: int
    applications: int
    distance: Callable[[Mapping[str, Tensor]], float]
    note: str = ""

    def with_note(self, more: str) -> Projected:
        """Return the same with another remark, if there is one."""
        return replace(self, note="; ".join(text for text in (self.note, more) if text))


def project(problem: Problem, before: float, options: Options, progress: Progress = silent) -> Projected:
    """Return the nearest value of the one edited constant of a problem.

    Args:
        problem: Constraints with one edited constant.
        before: Largest σ₁ over limit of its constraints, as it is.
        options: How.
        progress: Receives steps.

    Raises:
        OperatorError: If no value of the constant obeys the limits, or a region cannot be built.
    """
    (name,) = problem.names
    forms = [closed_form(c.region, name, problem.load) for c in problem.constraints]
    coordinates = coordinates_of(problem, forms)
    covariance, reason = covariance_of(problem, forms, coordinates.weight, options)
    if covariance is not None:
        coordinates = replace(coordinates, metric="data", covariance=covariance)
    unit = _unit(problem, forms)
    made, factor = _solve(_divided(problem, unit), coordinates.divided(unit), forms, options, progress)
    made = replace(made, weight=made.weight.double().cpu() * unit, lower=made.lower * unit)
    weight = coordinates.to_weight(made.weight.reshape(coordinates.start.shape))
    length = float(torch.linalg.vector_norm(coordinates.start))
    return Projected(
        weights={name: weight},
        metric=coordinates.metric,
        change=coordinates.distance(weight),
        lower=made.lower / length if made.lower > 0 else None,
        scaling=max(0.0, 1.0 - 1.0 / before) if factor and before > 0 else None,
        method=made.method,
        iterations=made.iterations,
        applications=made.applications,
        distance=lambda values: coordinates.distance(values[name]),
        note=made.note,
    ).with_note(not_by_data(coordinates.metric, reason))


def _unit(problem: Problem, forms: Sequence[Closed | None]) -> float:
    """Return the power of two that weights and limits are divided by: 1 unless the limits are far from it."""
    limit = problem.constraints[0].limit
    if _ORDINARY[0] <= limit <= _ORDINARY[1] or any(form is None for form in forms):
        return 1.0
    return 2.0 ** round(math.log2(limit))


def _divided(problem: Problem, unit: float) -> Problem:
    if unit == 1.0:
        return problem
    (name,) = problem.names

    def load(wanted: str) -> Tensor:
        value = problem.load(wanted)
        return value.double() / unit if wanted == name else value

    constraints = tuple(replace(c, limit=c.limit / unit) for c in problem.constraints)
    return replace(problem, constraints=constraints, load=load)


def _solve(
    problem: Problem,
    coordinates: Coordinates,
    forms: list[Closed | None],
    options: Options,
    progress: Progress,
) -> tuple[Projection, bool]:
    """Return the projection in x, and whether scaling x scales the operators."""
    form = forms[0] if len(forms) == 1 else None
    limit = problem.constraints[0].limit
    if form is not None and (form.kind == "infinite" or (options.all_sizes and form.geometry is not None)):
        return _any_size(coordinates.start, _known(form), limit, options.seed), True
    if options.all_sizes:
        raise OperatorError(f"{problem.key}: a bound for every size needs a lone convolution")
    if coordinates.covariance is not None and form is not None and is_row_matrix(form, coordinates.weight):
        return _weighted(coordinates, coordinates.covariance, limit, options, progress), True
    family, limit = family_of(problem, coordinates, forms, options.device)
    method, why = _choose(family, form, limit, coordinates, options)
    if method == "svd":
        return _svd(coordinates.start, form, limit), True
    if method == "symbol":
        return _symbol(family, form, limit, coordinates.start, why, options.seed, progress), True
    if method in ("scale", "fastclip", "sedghi"):
        made = _published(method, family, form, limit, coordinates.start, options.seed)
        return made, family.homogeneous
    groups = form.geometry.groups if form is not None and form.geometry is not None else 1
    if groups > 1 and form is not None:
        return _grouped(coordinates, form, limit, options, progress), True
    made = bundle(family, limit, gap=options.gap, seed=options.seed, progress=progress)
    return replace(made, method=f"bundle ({why})"), family.homogeneous


def _known(form: Closed | None) -> ConvGeometry:
    if form is None or form.geometry is None:
        raise OperatorError("only a lone convolution has a symbol", hint="use --method auto")
    return form.geometry


def _choose(
    family: Family, form: Closed | None, limit: float, coordinates: Coordinates, options: Options
) -> tuple[str, str]:
    """Return (solver, why)."""
    if options.method != "auto":
        if options.method == "svd" and not is_matrix(form, coordinates.weight):
            raise OperatorError(
                "an SVD is the projection of matrices only",
                hint="for this operator use --method bundle, or auto",
            )
        return options.method, "asked for"
    if coordinates.covariance is not None:
        return "bundle", "the data metric"
    if is_matrix(form, coordinates.weight):
        return "svd", "a matrix"
    if form is None or form.geometry is None:
        return "bundle", "no lone operator"
    geometry = form.geometry
    if geometry.padding_mode == "circular" and geometry.groups == 1 and not options.exact:
        return "symbol", "circular padding"
    if geometry.padding_mode not in ("zeros", "circular") or options.exact:
        return "bundle", "exact" if options.exact else f"{geometry.padding_mode} padding"
    if geometry.groups > 1:
        above = _groups_above(coordinates.start, form, limit)
        return ("symbol" if len(above) > _GROUPS else "bundle"), f"{len(above)} groups above the limit"
    if coordinates.weight.numel() * _positions(form) <= _SMALL:
        return "bundle", "a small operator"
    found = leading(
        family.at(family.start), _MANY, torch.Generator().manual_seed(options.seed), level=limit, tol=0.1
    )
    family.applications += found.applications
    count = int((found.values > limit).sum())
    if count >= _MANY:
        return "symbol", f"{_MANY} or more values above the limit"
    return "bundle", f"{count} values above the limit"


def _positions(form: Closed) -> int:
    """Return the pixels of the input map, 1 where there is none."""
    return math.prod((form.in_shape or (1,))[1:])


def _weighted(
    coordinates: Coordinates, covariance: Covariance, limit: float, options: Options, progress: Progress
) -> Projection:
    from spectool.clip.weighted import nearest_matrix

    (start,), (root,) = covariance.rows.split(coordinates.plain.start), covariance.root
    made = nearest_matrix(start, root, limit, gap=options.gap, progress=progress)
    return replace(made, weight=(made.weight @ root)[None], method=f"{made.method} (the data metric)")


def _svd(start: Tensor, form: Closed | None, limit: float) -> Projection:
    from spectool.clip.svd import svd_clip

    # A convolution (out, in, *k) is a matrix (out, in·k) on every window, a transposed one (in, out·k).
    made = svd_clip(start.reshape(len(start), -1), limit)
    return replace(made, weight=made.weight.reshape(start.shape))


def _groups_above(start: Tensor, form: Closed, limit: float) -> list[int]:
    """Return the groups whose operator may exceed the limit (judged by a few steps of Lanczos)."""
    families = _group_families(start, form)
    source = torch.Generator().manual_seed(0)
    above = []
    for index, family in enumerate(families):
        found = leading(family.at(family.start), 2, source, level=limit, tol=1e-4)
        if float(found.values[0]) > limit * (1 - 1e-6):
            above.append(index)
    return above


def _group_families(start: Tensor, form: Closed) -> list[Family]:
    geometry, shape = _known(form), form.in_shape or ()
    groups = geometry.groups
    alone = replace(geometry, groups=1)
    return [ConvFamily(part, (shape[0] // groups, *shape[1:]), alone) for part in start.chunk(groups, dim=0)]


def _grouped(
    coordinates: Coordinates, form: Closed, limit: float, options: Options, progress: Progress
) -> Projection:
    """Project the groups one by one; they are independent problems."""
    start, covariance = coordinates.plain.start, coordinates.covariance
    above = set(_groups_above(start, form, limit))
    parts, squares, rounds, spent = [], 0.0, 0, 0
    for index, family in enumerate(_group_families(start, form)):
        if covariance is not None:
            family = TurnedFamily(family, covariance.group(index))
        if index not in above:
            parts.append(family.start)
            continue
        made = bundle(family, limit, gap=options.gap, seed=options.seed, progress=progress)
        parts.append(made.weight)
        squares += made.lower**2
        rounds += made.iterations
        spent += made.applications
    note = f"{len(above)} of {_known(form).groups} groups above the limit"
    return Projection(torch.cat(parts), math.sqrt(squares), "bundle, group by group", rounds, spent, note)


def _symbol(
    family: Family,
    form: Closed | None,
    limit: float,
    start: Tensor,
    why: str,
    seed: int,
    progress: Progress,
) -> Projection:
    """Project on the symbol: exactly for circular padding, else on a grid of frequencies and then to σ₁."""
    from spectool.clip.symbol import project_measured, project_symbol
    from spectool.clip.symbol_map import exact_grid

    geometry = _known(form)
    shape = form.in_shape if form is not None and form.in_shape is not None else ()
    grid = exact_grid(geometry, shape[1:], tuple(start.shape[2:]))
    if grid is not None:
        made = project_symbol(start, geometry, limit, grid=grid, seed=seed)
        lower = made.lower or 0.0
    else:
        made = project_measured(
            start, geometry, limit, lambda w: top_value(family, w.to(family.start)), seed=seed
        )
        # A few rounds of the bundle do not reach the limit, but their lower bound is good, and now and then so is
        # what they have reached.
        rough = bundle(family, limit, gap=_GOOD, rounds=_ROUNDS, seed=seed, feasible=False, progress=progress)
        lower = rough.lower
        change = float(torch.linalg.vector_norm(made.weight - start))
        if top_value(family, rough.weight) <= limit * (1 + 1e-4):
            other = float(torch.linalg.vector_norm(rough.weight.double().cpu() - start))
            if other < change:
                return replace(rough, method=f"bundle ({why}; better than the symbol)")
    return Projection(made.weight, lower, f"symbol ({why})", made.iterations, family.applications)


def _any_size(start: Tensor, geometry: ConvGeometry, limit: float, seed: int) -> Projection:
    from spectool.clip.symbol import project_any_size

    made = project_any_size(start, geometry, limit, seed=seed)
    return Projection(made.weight, made.lower or 0.0, "symbol (every input size)", made.iterations, 0)


def _published(
    method: str, family: Family, form: Closed | None, limit: float, start: Tensor, seed: int
) -> Projection:
    from spectool.clip.published import fastclip, scale, sedghi

    if method == "scale":
        return scale(family, limit)
    if method == "fastclip":
        return fastclip(family, limit, seed=seed)
    geometry = _known(form)
    if form is None or form.in_shape is None:
        raise OperatorError("the size of the input is not known", hint="give --input")
    return sedghi(start, geometry, form.in_shape, limit)
