"""Which constants of which regions are changed, and which of them hang together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spectool.clip.problem import Constraint, Problem
from spectool.errors import OperatorError
from spectool.graph.types import Call, Conv, Embedding, Linear, Region
from spectool.graph.writing import Writer
from spectool.lower.replay import Load, constant_names


def edited_constants(region: Region, writer: Writer | None) -> tuple[str, ...]:
    """Return the constants of a region that a clip may change: kernels and matrices that can be written back.

    Raises:
        OperatorError: If there is a matrix weight and none of them can be written back.
    """
    found: dict[str, None] = {}
    for node in region.nodes:
        if isinstance(node.op, (Conv, Linear, Embedding)):
            found[node.inputs[1]] = None
    if not found:
        constants = set(constant_names(region))
        for node in region.nodes:
            if isinstance(node.op, Call):
                found.update((name, None) for name in node.inputs if name in constants and name)
    if writer is None:
        raise OperatorError(f"{region.key}: nothing can be written back to this source")
    usable = tuple(name for name in found if writer.homes(name) is not None)
    if not usable:
        raise OperatorError(
            f"{region.key} cannot be written back: its weight is computed from stored tensors",
            hint="merge it into plain weights first",
        )
    return usable


def group(
    constraints: Sequence[Constraint], load: Load, writer: Writer | None
) -> tuple[list[Problem], dict[int, str]]:
    """Return problems of constraints that hang together, in order, and why some constraint has none.

    Args:
        constraints: Regions with their limits.
        load: Reads a constant.
        writer: The way back to stored tensors.

    Returns:
        The problems; index of a constraint that cannot be clipped → reason.
    """
    refused: dict[int, str] = {}
    names: dict[int, tuple[str, ...]] = {}
    for index, constraint in enumerate(constraints):
        try:
            names[index] = _floating(edited_constants(constraint.region, writer), load)
            if not names[index]:
                refused[index] = "it has no weight of a real type to change"
        except OperatorError as error:
            refused[index] = error.in_full
    usable = dict.fromkeys(name for index, found in names.items() if index not in refused for name in found)
    whole = {} if writer is None else _whole_tensors(list(usable), load, writer)
    tokens = _tokens(list(usable), writer, whole)
    homes = {
        index: {tokens[name] for name in found} for index, found in names.items() if index not in refused
    }
    problems: list[Problem] = []
    left = sorted(homes)
    while left:
        together, shared, grown = [left.pop(0)], set(), True
        shared = set(homes[together[0]])
        while grown:
            more = [index for index in left if homes[index] & shared]
            for index in more:
                left.remove(index)
                shared |= homes[index]
            together += more
            grown = bool(more)
        together.sort()
        edited = tuple(dict.fromkeys(name for index in together for name in names[index]))
        places = _places(edited, load, whole) if len(edited) > 1 else None
        problems.append(Problem(tuple(constraints[index] for index in together), edited, load, places))
    return problems, refused


def coupled(problems: Sequence[Problem], writer: Writer | None) -> list[list[Problem]]:
    """Return the problems, those together that change parts of one parametrised weight.

    They are independent but for what is stored: a length, a divisor or roundings that all parts share.
    """
    units: list[list[Problem]] = []
    at: dict[str, int] = {}
    for problem in problems:
        made = [weight for name in problem.names if writer is not None and (weight := writer.derived(name))]
        homes = [weight.name for weight in made]
        index = next((at[home] for home in homes if home in at), len(units))
        if index == len(units):
            units.append([])
        units[index].append(problem)
        at.update(dict.fromkeys(homes, index))
    return units


def joined(problems: Sequence[Problem]) -> Problem:
    """Return problems with the same reader as one."""
    if len(problems) == 1:
        return problems[0]
    constraints = tuple(constraint for problem in problems for constraint in problem.constraints)
    names = tuple(dict.fromkeys(name for problem in problems for name in problem.names))
    return Problem(constraints, names, problems[0].load)


_LARGEST = 1 << 26
"""Entries of a tensor times its views up to which the views are compared; beyond, all are one problem."""

Whole = tuple[str, int, Tensor]
"""A stored tensor by its key, the number of its entries, and which of them a constant is, flat."""


def _whole_tensors(names: Sequence[str], load: Load, writer: Writer) -> dict[str, Whole]:
    """Return, for constants that are parts or views of one stored tensor with others, which entries they are."""
    by_home: dict[str, list[str]] = {}
    for name in names:
        homes = writer.homes(name) or ()
        if len(homes) == 1 and writer.derived(name) is None:
            by_home.setdefault(homes[0], []).append(name)
    found: dict[str, Whole] = {}
    for sharing in by_home.values():
        # Parts by name, gates and experts, are apart; of those there may be hundreds.
        if len(sharing) > 1 and not all("[" in name for name in sharing):
            found.update(_whole_tensor(sharing, load, writer))
    return found


def _whole_tensor(names: Sequence[str], load: Load, writer: Writer) -> dict[str, Whole]:
    """Return which entries of one stored tensor some constants are; nothing where to find out is too much work."""
    found: dict[str, Whole] = {}
    for name in names:
        shape, count = load(name).shape, load(name).numel()
        # What is written tells: the entries that differ for two different sets of values.
        marks = torch.arange(count, dtype=torch.float64).reshape(shape)
        ((home, made),) = writer.edits({name: marks}).items()
        if made.numel() * len(names) > _LARGEST:
            return {}
        ((_, other),) = writer.edits({name: marks + count}).items()
        where = (other - made == count).flatten().nonzero()[:, 0]
        places = torch.full((count,), -1)
        places[made.flatten()[where].long()] = where
        if bool((places < 0).any()):  # one entry at two places of the constant
            return {}
        found[name] = home, made.numel(), places
    return found


def _tokens(names: Sequence[str], writer: Writer | None, whole: Mapping[str, Whole]) -> dict[str, str]:
    """Return for every constant a word that it shares with those that it hangs together with."""
    clusters: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        if name in whole:
            home, size, places = whole[name]
            cluster = clusters.setdefault(home, torch.full((size,), -1))
            for met in torch.unique(cluster[places]).tolist():
                if met >= 0:
                    cluster[cluster == met] = number
            cluster[places] = number
    found = {}
    for name in names:
        if name in whole:
            home, _, places = whole[name]
            found[name] = f"{home}#{int(clusters[home][places[0]])}" if len(places) else name
        else:
            # Different parts of one tensor are independent; one constant is itself wherever it is read.
            homes = None if writer is None else writer.homes(name)
            found[name] = name if "[" in name or not homes else homes[0]
    return found


def _places(names: Sequence[str], load: Load, whole: Mapping[str, Whole]) -> dict[str, Tensor] | None:
    """Return where the entries of constants are in a row of the distinct ones; None where no two are the same."""
    used: dict[str, Tensor] = {}
    for name in names:
        if name in whole:
            home, size, places = whole[name]
            used.setdefault(home, torch.zeros(size, dtype=torch.bool))[places] = True
    begin, entries, ranks = 0, 0, {}
    for home, marks in used.items():
        ranks[home] = marks.cumsum(0) - 1 + begin
        begin += int(marks.sum())
    found = {}
    for name in names:
        count = load(name).numel()
        entries += count
        if name in whole:
            found[name] = ranks[whole[name][0]][whole[name][2]]
        else:
            found[name] = torch.arange(begin, begin + count)
            begin += count
    return found if entries > begin else None


def _floating(names: Sequence[str], load: Load) -> tuple[str, ...]:
    return tuple(name for name in names if load(name).is_floating_point() and load(name).dim() >= 1)
