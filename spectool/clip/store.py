"""From a wanted weight to one that obeys the limit *as stored*: casts, rescales, repairs, and measures again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from spectool.clip.problem import Constraint, Problem
from spectool.clip.rounding import repaired
from spectool.errors import OperatorError
from spectool.graph.writing import Writer
from spectool.linear import InfiniteConv, size
from spectool.lower import lower
from spectool.lower.replay import Load
from spectool.spectrum import supremum, svds

LOWEST = 3e-4
"""How far below the limit σ₁ may end, relatively, where the stored type can come that close."""

_REPAIRED = 1 << 20
"""Entries up to which roundings to a half type are repaired; beyond, hundreds of values share the limit."""

_LARGE, _ENOUGH = 1 << 22, 240
"""Entries from which on σ₁ is measured in float32, with so many applications at most."""

_LOW = 1e-6
"""Relative amount by which an iterated estimate is raised: a single value is accepted within its tolerance."""

_WIDTH = 2e-4
"""Relative amount by which an estimate of a large matrix is raised that has not settled."""

_DENSE_SIDE, _DENSE_ENTRIES = 2048, 1 << 25
"""Operators up to this size are proven by a dense factorisation, as ``check`` does."""

_TRIES = 12

_SUMS = 16.0
"""Roundings by which a weight made of stored ones may differ from one machine to another (float32 and float64)."""

_COARSE = 1e-4
"""Rounding of half types: there no margin is taken, since it would cost per cents."""

_SAME = 1e-12
"""Relative excess, by rounding, at which weights that need not change do not."""


@dataclass(frozen=True)
class Stored:
    """Values of stored tensors that obey the limits.

    Attributes:
        edits: Stored tensor → value, in its stored type.
        load: Reads constants as they are with these values.
        ratio: Largest σ₁ over limit.
        matvecs: Operator applications spent on measuring.
    """

    edits: Mapping[str, Tensor]
    load: Load
    ratio: float
    matvecs: int


Types = Callable[[str], torch.dtype]


def worst_ratio(constraints: tuple[Constraint, ...], load: Load, *, seed: int = 0) -> tuple[float, int]:
    """Return (largest σ₁/limit of some regions, applications), each by a cold start in float64."""
    worst, spent = 0.0, 0
    for constraint in constraints:
        large = max(prod(shape) for shape in constraint.region.weight_shapes or ((1,),)) > _LARGE
        made = lower(constraint.region, load, dtype=torch.float32 if large else torch.float64)
        if isinstance(made, InfiniteConv):
            found = supremum(made)
            worst = max(worst, found.upper[0] / constraint.limit)
            continue
        if large:
            found = svds(made, 1, max_matvecs=_ENOUGH, seed=seed)
            # What is left of a clipped matrix is a cluster of hundreds of values: an estimate that has not settled is
            # low by less than the width of that cluster.
            settled = 3e-7 if found.converged else _WIDTH
            worst, spent = (
                max(worst, found.values[0] / constraint.limit * (1 + settled)),
                spent + found.matvecs,
            )
            continue
        found = svds(made, 1, tol=1e-6, seed=seed)
        # An iterated value may be a little low; a dense or structured one is not.
        low = _LOW if found.method == "lanczos" else 0.0
        worst, spent = max(worst, found.values[0] / constraint.limit * (1 + low)), spent + found.matvecs
    return worst, spent


def store(
    problem: Problem, wanted: Mapping[str, Tensor], writer: Writer, types: Types, read: Load, *, seed: int = 0
) -> Stored:
    """Return stored values near ``wanted`` whose operators obey their limits.

    Float32 and float64 are cast and rescaled by what the measurement is off. A half type moves σ₁ by up to 1e-3 when
    cast; there the roundings of single entries are repaired first (``_repaired``), and what is left is scaled.

    Args:
        problem: The constraints.
        wanted: Constant → value in float64, at the limit up to about 3e-4.
        writer: The way back to stored tensors.
        types: Stored type of a stored tensor.
        read: Reads a stored tensor.
        seed: Of the measurements.

    Raises:
        OperatorError: If no such values were found.
    """
    start = {name: problem.load(name).double() for name in wanted}
    half = _half_type(problem, wanted, writer, types, read)
    small = sum(value.numel() for value in wanted.values()) <= _REPAIRED
    current, factor, spent = dict(wanted), 1.0, 0
    best: Stored | None = None
    margin, loose = _first_margin(problem, writer, types), False
    for attempt in range(_TRIES):
        scaled = {name: value * factor for name, value in current.items()}
        if half is not None and small:
            rounded = repaired(problem, scaled, half)
            scaled = {name: value.double() for name, value in rounded.items()}
        made, ratio, cost = _measured(problem, scaled, writer, types, read, seed)
        spent += cost
        if attempt == 0 and ratio <= 1.0 + _SAME and all(torch.equal(wanted[n], start[n]) for n in start):
            return Stored(made, writer.reload(made), ratio, spent)
        if ratio <= 1.0 and (best is None or ratio > best.ratio):
            best = Stored(made, writer.reload(made), ratio, spent)
        if ratio > 1.0:
            # Of a half type the next attempt aims a little lower and is repaired again.
            if half is None:
                factor *= (1.0 - margin) / ratio
            else:
                factor *= 1.0 - 5e-5 * 2.0**attempt if small else (1.0 - 5e-5) / ratio
            margin *= 4.0
        elif half is None and ratio < 1.0 - LOWEST and not loose:
            # Too far below: back on the way to the start, which only comes nearer to it.
            current, cost = _towards(problem, scaled, start, seed)
            spent += cost
            factor, loose = 1.0, True
        else:
            break
    if best is None:
        raise OperatorError(f"{problem.key}: no stored value was found that obeys the limit")
    return Stored(best.edits, best.load, best.ratio, spent)


def _half_type(
    problem: Problem, wanted: Mapping[str, Tensor], writer: Writer, types: Types, read: Load
) -> torch.dtype | None:
    """Return the half type that all edited constants are stored in, entry by entry; else None."""
    values = {name: value.float() for name, value in wanted.items()}
    edits = writer.edits(values, read)
    kinds = {types(key) for key in edits}
    if len(kinds) != 1 or not kinds <= {torch.float16, torch.bfloat16}:
        return None
    (kind,) = kinds
    again = writer.reload({key: value.to(kind) for key, value in edits.items()})
    same = all(torch.equal(again(name).float(), value.to(kind).float()) for name, value in values.items())
    return kind if same else None


def _measured(
    problem: Problem, weights: Mapping[str, Tensor], writer: Writer, types: Types, read: Load, seed: int
) -> tuple[dict[str, Tensor], float, int]:
    edits = {key: value.to(types(key)) for key, value in writer.edits(weights, read).items()}
    ratio, spent = 0.0, 0
    for load in writer.readings(edits):
        found, cost = worst_ratio(problem.constraints, load, seed=seed)
        ratio, spent = max(ratio, found), spent + cost
    return edits, ratio * (1.0 + _margin(problem, writer, edits)), spent


def _first_margin(problem: Problem, writer: Writer, types: Types) -> float:
    """Return how far below the limit the second attempt aims: further where roundings to a half type are multiplied."""
    made = [weight for name in problem.names if (weight := writer.derived(name)) is not None]
    kinds = [types(key) for weight in made for key in weight.sources]
    rounding = max((torch.finfo(kind).eps for kind in kinds if kind.is_floating_point), default=0.0)
    return rounding / _SUMS if rounding > _COARSE else 1e-9


def _margin(problem: Problem, writer: Writer, edits: Mapping[str, Tensor]) -> float:
    """Return what σ₁ is raised by for weights that are made of stored ones: others sum in another order."""
    kinds = [value.dtype for value in edits.values() if value.is_floating_point()]
    if not kinds or all(writer.derived(name) is None for name in problem.names):
        return 0.0
    rounding = max(torch.finfo(kind).eps for kind in kinds)
    return _SUMS * rounding if rounding < _COARSE else 0.0


def _towards(
    problem: Problem, low: Mapping[str, Tensor], start: Mapping[str, Tensor], seed: int
) -> tuple[dict[str, Tensor], int]:
    """Return (weights between ``low`` and ``start`` at the limit, applications).

    σ₁ over limit is convex along the way where one constant is edited, so bisection finds it.
    """
    below, above, spent = 0.0, 1.0, 0
    for _ in range(25):
        # Invariant: at ``below`` the limits hold.
        middle = 0.5 * (below + above)
        mixed = {name: torch.lerp(low[name], start[name], middle) for name in low}
        found, cost = worst_ratio(problem.constraints, _replaced(problem.load, mixed), seed=seed)
        spent += cost
        below, above = (middle, above) if found <= 1.0 else (below, middle)
        if 1.0 - LOWEST / 10 <= found <= 1.0:
            break
    return {name: torch.lerp(low[name], start[name], below) for name in low}, spent


def _replaced(load: Load, values: Mapping[str, Tensor]) -> Load:
    return lambda name: values[name] if name in values else load(name)


def prove_limit(
    problem: Problem,
    wanted: Mapping[str, Tensor],
    stored: Stored,
    writer: Writer,
    types: Types,
    read: Load,
    *,
    seed: int = 0,
) -> Stored:
    """Return stored values whose *proven* bounds are within the limits, by scaling what is stored.

    A bound that scales with the operator (all do) exceeds the limit by some factor, usually below 1.02; the weights
    are divided by it and measured again.

    Raises:
        OperatorError: If there is no deterministic bound.
    """
    factor, spent = 1.0, stored.matvecs
    for _ in range(_TRIES):
        worst, cost = _proven_ratio(problem.constraints, stored.load, seed)
        spent += cost
        if worst <= 1.0:
            return Stored(stored.edits, stored.load, stored.ratio, spent)
        factor *= (1.0 - 1e-7) / worst
        scaled = {name: value * factor for name, value in wanted.items()}
        edits, ratio, cost = _measured(problem, scaled, writer, types, read, seed)
        spent += cost
        stored = Stored(edits, writer.reload(edits), ratio, spent)
    raise OperatorError(f"{problem.key}: no bound within the limit could be proven")


def _proven_ratio(constraints: tuple[Constraint, ...], load: Load, seed: int) -> tuple[float, int]:
    worst, spent = 0.0, 0
    for constraint in constraints:
        made = lower(constraint.region, load, dtype=torch.float32)
        if isinstance(made, InfiniteConv):
            worst = max(worst, supremum(made).upper[0] / constraint.limit)
            continue
        found = svds(made, 1, certify=True, seed=seed)
        spent += found.matvecs
        m, n = size(made)
        if found.upper_kind != "exact" and min(m, n) <= _DENSE_SIDE and m * n <= _DENSE_ENTRIES:
            # A factorisation proves σ₁ itself, where a bound by the symbol would cost a further shrink.
            found = svds(made, 1, method="exact", seed=seed)
            spent += found.matvecs
        if found.upper_kind in ("probabilistic", "none"):
            raise OperatorError(f"{constraint.region.key}: there is no deterministic bound")
        worst = max(worst, found.upper[0] / constraint.limit)
    return worst, spent
