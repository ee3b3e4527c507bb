"""Where entries go: index arrays sent through the nodes of a region that do no arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from spectool.graph.roles import Context
from spectool.graph.types import Call, Node

if TYPE_CHECKING:
    import numpy as np

_LARGEST = 1 << 23
"""Entries up to which positions are followed one by one."""
CONSTANT = -1
"""Index of an entry that comes from a constant."""


def follow(context: Context, nodes: Sequence[Node], start: str, exit: str) -> np.ndarray | None:
    """Return, for each entry of ``exit``, the flat index of the entry of ``start`` that it comes from.

    Entries that come from a constant have the index ``CONSTANT``. Factors that are single numbers are passed over.
    None where a node mixes entries, or where shapes are unknown or too large to follow.
    """
    import numpy as np

    shape = context.shape(start)
    if shape is None or context.known.move is None:
        return None
    sizes = tuple(size for size in shape if size is not None)
    if len(sizes) < len(shape) or prod(sizes) > _LARGEST:
        return None
    arrays = {start: np.arange(prod(sizes), dtype=np.int64).reshape(sizes)}
    for node in nodes:
        sources = context.flowing(node)
        if len(sources) != 1 or sources[0] not in arrays:
            return None
        role = context.role(node)
        if role == "neutral" or (role == "scale" and scalars(context, node) is not None):
            arrays[node.outputs[0]] = arrays[sources[0]]
        elif role in ("move", "select"):
            moved = _moved(context, node, arrays)
            if moved is None:
                return None
            arrays.update(zip(node.outputs, moved, strict=False))
        else:
            return None
    return arrays.get(exit)


def picked(indices: np.ndarray) -> np.ndarray:
    """Return the flat indices that are no constants'; empty if one of them occurs twice."""
    flat: np.ndarray = indices[indices != CONSTANT]
    return flat if distinct(flat).size == flat.size else flat[:0]


def distinct(indices: np.ndarray) -> np.ndarray:
    """Return the different values of non-negative integers, ascending, in linear time.

    ``np.unique`` hashes or sorts; on the half million entries of a transformer's activations it took 90 % of a
    survey.
    """
    import numpy as np

    if indices.size == 0:
        return indices
    seen = np.zeros(int(indices.max()) + 1, dtype=bool)
    seen[indices] = True
    found: np.ndarray = np.flatnonzero(seen)
    return found


def scalars(context: Context, node: Node) -> list[tuple[float, bool]] | None:
    """Return the (value, divides) pairs of a scale node that multiplies by single numbers only, else None."""
    if context.role(node) != "scale":
        return None
    attributes = node.op.attributes if isinstance(node.op, Call) else {}
    divides = context.known.rules[getattr(node.op, "name", "")].how == "first"
    # A recorded call holds Python's numbers among its arguments.
    found = [
        (float(value), divides) for value in attributes.get("args", ())[1:] if isinstance(value, (int, float))
    ]
    for position, name in enumerate(node.inputs):
        if not name or not context.is_constant(name):
            continue
        if prod(context.constant_shape(name)) != 1:
            return None
        found.append((float(context.known.load(name).reshape(())), divides and position > 0))
    return None if any(by and not value for value, by in found) else found


def product(numbers: Sequence[tuple[float, bool]]) -> float:
    """Return the product of (value, divides) pairs."""
    result = 1.0
    for value, divides in numbers:
        result = result / value if divides else result * value
    return result


def _moved(context: Context, node: Node, arrays: dict[str, np.ndarray]) -> Sequence[np.ndarray] | None:
    """Run one node on indices; constants that it joins to the value that flows count as ``CONSTANT``."""
    import numpy as np

    how = context.known.rules[getattr(node.op, "name", "")].how
    inputs: list[np.ndarray | None] = []
    for position, name in enumerate(node.inputs):
        if name in arrays:
            inputs.append(arrays[name])
        elif name and (how == "join" or (how == "mask" and position > 0)):
            inputs.append(np.full(context.constant_shape(name), CONSTANT, np.int64))
        else:
            inputs.append(None)
    if context.known.move is None:
        return None
    try:
        return context.known.move(node, inputs)
    except (ValueError, IndexError, RuntimeError, TypeError, KeyError, AttributeError):
        return None  # the row is then replayed as a whole
