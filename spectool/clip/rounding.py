"""Rounding to a half type without pushing σ₁ up: entries are rounded the other way where that pays most.

A cast moves every entry by up to half a unit in the last place and σ₁ by up to 1e-3 (bfloat16). Scaling down before
the cast wastes as much everywhere. Rounding a few entries to their other neighbour, those whose gradient of the
leading values is large and whose rounding error is near one half anyway, costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spectool.clip.coordinates import Coordinates
from spectool.clip.leading import leading
from spectool.clip.problem import Problem, family_in, uses
from spectool.errors import OperatorError

_ROUNDS = 12
_CLUSTER = 12
_NEAR = 3e-4
"""How far below the limit a value may be and still count: rounding others moves it."""


def repaired(problem: Problem, wanted: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return constants in ``dtype`` near the wanted ones, σ₁ of whose operators are within their limits if possible.

    Costs up to a dozen rounds of some hundred applications and one gradient each.

    Args:
        problem: The constraints.
        wanted: Constant → value, float64, at the limit.
        dtype: ``torch.float16`` or ``torch.bfloat16``.
    """
    values = {name: value.to(dtype) for name, value in wanted.items()}
    starts: dict[int, Tensor] = {}
    for _ in range(_ROUNDS):
        slopes, needed = _slopes(problem, values, starts)
        if needed <= 0.0:
            break
        _flip(values, wanted, slopes, needed)
    return values


def _slopes(
    problem: Problem, values: Mapping[str, Tensor], starts: dict[int, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Return a combined gradient of the values over the limit in every constant, and what it has to fall by."""
    load = problem.load
    wide = {name: value.double() for name, value in values.items()}
    slopes = {name: torch.zeros_like(value) for name, value in wide.items()}
    needed = 0.0
    source = torch.Generator().manual_seed(0)
    for number, constraint in enumerate(problem.constraints):
        region, limit = constraint.region, constraint.limit
        for name in problem.names:
            if not uses(region, name):
                continue
            family = family_in(
                region,
                name,
                Coordinates(wide[name], None, "weights"),
                None,
                lambda wanted: wide[wanted] if wanted in wide else load(wanted),
                torch.float64,
                torch.device("cpu"),
            )
            found = leading(
                family.at(family.start),
                _CLUSTER,
                source,
                start=starts.get(number),
                level=limit * (1 - _NEAR),
                tol=1e-4,
            )
            starts[number] = found.right.flatten(1)[: _CLUSTER - 2]
            excess = found.values / limit - 1.0
            if float(excess[0]) <= 0.0:
                continue
            share = (excess + _NEAR).clamp_min(0.0)
            share = share / share.sum()
            scaled = found.left * share.reshape(-1, *[1] * (found.left.dim() - 1))
            slopes[name] += family.pull(scaled, found.right) / limit
            needed += float((share * excess.clamp_min(0.0)).sum()) + 0.05 * float(excess[0])
    return slopes, needed


def _flip(
    values: dict[str, Tensor], wanted: Mapping[str, Tensor], slopes: Mapping[str, Tensor], needed: float
) -> None:
    """Move entries to their neighbour against the slope, the best bargains first, until the fall is ``needed``."""
    names = list(values)
    moves, gains, prices = [], [], []
    for name in names:
        other = _neighbour(values[name], -slopes[name].sign())
        gain = (slopes[name] * (values[name].double() - other.double())).clamp_min(0.0)
        here = (values[name].double() - wanted[name]).square()
        there = (other.double() - wanted[name]).square()
        moves.append(other)
        gains.append(gain.flatten())
        prices.append((there - here).flatten())
    gain, price = torch.cat(gains), torch.cat(prices)
    least = 1e-3 * float(price.abs().max()) + 1e-300
    order = (gain / price.clamp_min(least)).argsort(descending=True)
    falls = gain[order].cumsum(0)
    count = int((falls < 1.2 * needed).sum()) + 1
    chosen = torch.zeros_like(gain, dtype=torch.bool)
    chosen[order[:count]] = True
    begin = 0
    for name, other in zip(names, moves, strict=True):
        part = chosen[begin : begin + other.numel()].reshape(other.shape)
        values[name] = torch.where(part, other, values[name])
        begin += other.numel()


def _neighbour(value: Tensor, direction: Tensor) -> Tensor:
    """Return the next number of the same type upward or downward (by the sign of ``direction``; 0 keeps it)."""
    if value.dtype not in (torch.float16, torch.bfloat16):
        raise OperatorError(f"{value.dtype} has no neighbours here")
    bits = value.contiguous().view(torch.int16).to(torch.int32)
    # Sign and magnitude → a line of integers in the order of the numbers, and back.
    line = torch.where(bits >= 0, bits, -(bits & 0x7FFF))
    line = line + direction.to(torch.int32)
    back = torch.where(line >= 0, line, (-line) | 0x8000)
    moved = torch.where(back > 0x7FFF, back - 0x10000, back).to(torch.int16).view(value.dtype)
    return torch.where(moved.isfinite(), moved, value)
