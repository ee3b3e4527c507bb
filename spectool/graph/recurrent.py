"""Stacks of matrices in one tensor: the gates of recurrent layers and the experts of a mixture."""

from __future__ import annotations

from collections.abc import MutableMapping

from spectool.graph.parts import Derived, suffix
from spectool.graph.types import Linear, Node, Region, Shape

Parts = MutableMapping[str, Derived]


def gate_regions(constant: str, key: str, shape: Shape, gates: int, kind: str, parts: Parts) -> list[Region]:
    """Return one row per gate of a matrix that stacks them along its first axis.

    Args:
        constant: Name by which the stacked matrix is loaded.
        key: Its checkpoint key.
        shape: (gates · hidden, in).
        gates: How many are stacked.
        kind: ``lstm``, ``gru`` or ``rnn``.
        parts: Receives the parts, by the names that the regions load them by.
    """
    rows, columns = shape
    size = rows // gates
    regions = []
    for gate in range(gates):
        block = ((gate * size, (gate + 1) * size), (0, columns))
        derived = Derived(constant, (block,), 0, (size, columns))
        regions.append(_matrix(key + suffix(block, shape), constant, key, shape, kind, derived, parts))
    return regions


def expert_regions(constant: str, key: str, shape: Shape, kind: str, parts: Parts) -> list[Region]:
    """Return one row per expert of a stack of matrices (experts, ·, ·); arguments as for ``gate_regions``."""
    experts, rows, columns = shape
    regions = []
    for expert in range(experts):
        block = ((expert, expert + 1), (0, rows), (0, columns))
        derived = Derived(constant, (block,), 0, (rows, columns))
        regions.append(_matrix(f"{key}[{expert}]", constant, key, shape, kind, derived, parts))
    return regions


def _matrix(
    label: str, constant: str, key: str, shape: Shape, kind: str, derived: Derived, parts: Parts
) -> Region:
    name = f"{constant}|{label}"
    parts[name] = derived
    rows, columns = derived.shape
    return Region(
        key=label,
        level="layer",
        kind=kind,
        root="<x>",
        exit="<y>",
        nodes=(Node(label, Linear(), ("<x>", name), ("<y>",)),),
        weights=(key,),
        weight_shapes=(shape,),
        in_shape=(columns,),
        out_shape=(rows,),
    )
