"""Regions that are really one small operator: a part of a matrix, or the same operator at every position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from spectool.graph.follow import distinct, follow, picked, product, scalars
from spectool.graph.parts import Block, Derived, block_of, ranges, suffix
from spectool.graph.roles import FREE, OPERATOR, Context
from spectool.graph.types import Conv, Linear, Node, Shape

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Narrow:
    """A short chain with the singular values of a region, copies at equal positions left out.

    Attributes:
        nodes: The chain; weights may be parts of stored ones.
        in_shape: What it reads, without the batch axis.
        out_shape: What it writes.
        factor: Product of the single numbers that were folded into the last matrix.
        start: First output channel of its part of the last weight.
    """

    nodes: tuple[Node, ...]
    in_shape: Shape
    out_shape: Shape
    factor: float = 1.0
    start: int = 0


def narrow(context: Context, nodes: Sequence[Node], root: str, exit: str) -> Narrow | None:
    """Recognise a chain that is one convolution, or does the same to the last axis at every position.

    Around it there may be rearrangements, selections of distinct entries, and behind it factors that are single
    numbers. A selection of output channels restricts the last weight (a fused query–key–value projection gives
    three regions); a selection of positions changes nothing.

    Returns:
        The chain, or None if the region is something else.
    """
    if not _is_chain(context, nodes, root, exit):
        return None
    first = next(
        (index for index, node in enumerate(nodes) if context.role(node) not in (*FREE, "select")), None
    )
    if first is None:
        return None
    start = context.flowing(nodes[first])[0]
    if any(context.role(node) not in FREE for node in nodes[:first]):
        # Selecting distinct entries before the operator leaves its singular values: S Sᵀ = I.
        taken = follow(context, nodes[:first], root, start)
        if taken is None or picked(taken).size != taken.size:
            return None
    core, tail, factor = _core(context, nodes[first:])
    return _finished(context, core, tail, exit, factor) if core else None


def _is_chain(context: Context, nodes: Sequence[Node], root: str, exit: str) -> bool:
    """Return whether each node reads only the one before it, once."""
    previous = root
    for position, node in enumerate(nodes):
        if context.flowing(node) != [previous]:
            return False
        if position + 1 < len(nodes):
            following = context.flowing(nodes[position + 1])
            if len(following) != 1 or following[0] not in node.outputs:
                return False
            previous = following[0]
    return bool(nodes) and exit in nodes[-1].outputs


def _core(context: Context, nodes: Sequence[Node]) -> tuple[list[Node], Sequence[Node], float]:
    """Split a chain into nodes that act on one position and the rest.

    Dropped between them are rearrangements and selections of positions, and single numbers, whose product is the
    third value.
    """
    if isinstance(nodes[0].op, Conv):
        return [nodes[0]], nodes[1:], 1.0
    core: list[Node] = []
    factor, rest, before = 1.0, 0, ""
    for index, node in enumerate(nodes):
        source = context.flowing(node)[0]
        before = before or source
        role = context.role(node)
        if role in ("move", "select") and not _keeps_last_axis(context, node):
            break
        if role in (*FREE, "select"):
            continue
        number = scalars(context, node)
        if number is not None:
            factor *= product(number)
        else:
            pointwise = _pointwise(context, node, source)
            if pointwise is None:
                break
            inputs = tuple(before if name == source else name for name in pointwise.inputs)
            core.append(replace(pointwise, inputs=inputs))
            before = node.outputs[0]
        rest = index + 1
    return core, nodes[rest:], factor


def _pointwise(context: Context, node: Node, source: str) -> Node | None:
    """Return the node as it acts on one position, a vector; None if it does not act on the last axis alone."""
    if isinstance(node.op, Linear):
        rank = len(context.constant_shape(node.inputs[1]))
        return node if node.op.axis == -1 and rank == 2 else None
    shape = context.shape(source)
    if context.role(node) != "scale" or not shape:
        return None
    inputs = []
    for name in node.inputs:
        if not name or not context.is_constant(name):
            inputs.append(name)
            continue
        constant = context.constant_shape(name)
        size = prod(constant)
        if size != 1 and (size != shape[-1] or constant[-1] != size):
            return None
        flat = f"{name}#flat"
        context.parts[flat] = Derived(name, (), 0, (size,))
        inputs.append(flat)
    return replace(node, inputs=tuple(inputs))


def _keeps_last_axis(context: Context, node: Node) -> bool:
    """Return whether a node leaves every vector along the last axis that it keeps together and in order."""
    import numpy as np

    before, after = context.shape(node.inputs[0]), context.shape(node.outputs[0])
    if not before or not after or before[-1] is None or before[-1] != after[-1]:
        return False
    indices = follow(context, [node], node.inputs[0], node.outputs[0])
    if indices is None or picked(indices).size != indices.size:
        return False
    return bool(np.all(indices % before[-1] == np.arange(before[-1])))


def _finished(
    context: Context, core: list[Node], tail: Sequence[Node], exit: str, factor: float
) -> Narrow | None:
    """Return the core with what the tail selects of its output."""
    import numpy as np

    last = core[-1]
    output = last.outputs[0]
    sizes = known_shape(context.shape(output))
    indices = follow(context, tail, output, exit) if tail else None
    if sizes is None or (tail and indices is None):
        return None
    axis = 1 if isinstance(last.op, Conv) else len(sizes) - 1
    channels = list(range(sizes[axis])) if len(sizes) > axis else []
    if indices is not None:
        flat = picked(indices)
        places = np.unravel_index(flat, sizes)
        channels = distinct(places[axis]).tolist()
        others = [place for own, place in enumerate(places) if own != axis]
        around = tuple(size for own, size in enumerate(sizes) if own != axis)
        positions = distinct(np.ravel_multi_index(others, around)).size if others else 1
        if flat.size == 0 or len(channels) * positions != flat.size:
            return None
        if isinstance(last.op, Conv) and positions != prod(around):
            return None
    for node in tail:
        factor *= product(scalars(context, node) or ())
    shaped = _restricted(context, last, channels, factor)
    if shaped is None:
        return None
    nodes = (*core[:-1], replace(shaped, outputs=(exit,)))
    in_shape = operator_shapes(context, nodes[0])[0] if _stored(nodes[0]) else _last(context, nodes[0])
    out_shape = operator_shapes(context, nodes[-1])[1] if _stored(nodes[-1]) else _last(context, core[-1])
    if isinstance(last.op, Conv):
        before, after = known_shape(context.shape(last.inputs[0]), 1), known_shape(context.shape(output), 1)
        in_shape, out_shape = before, None if after is None else (len(channels), *after[1:])
    if in_shape is None or out_shape is None:
        return None
    return Narrow(nodes, in_shape, out_shape, factor, channels[0])


def _stored(node: Node) -> bool:
    return isinstance(node.op, Linear)


def _last(context: Context, node: Node) -> Shape | None:
    """Return the length of a vector that a node acts on."""
    shape = context.shape(context.flowing(node)[0])
    return None if not shape or shape[-1] is None else (shape[-1],)


def _restricted(context: Context, node: Node, channels: Sequence[int], factor: float) -> Node | None:
    """Return the last node of a chain with some of its output channels, times a factor; None if it cannot be."""
    op = node.op
    if isinstance(op, Linear):
        if abs(factor) != 1.0:
            op = replace(op, alpha=op.alpha * factor)
    elif abs(factor) != 1.0:
        return None
    if not isinstance(op, (Conv, Linear)):
        shape = context.shape(node.outputs[0])
        return node if shape and len(channels) == shape[-1] else None
    weight = node.inputs[1]
    sizes = context.constant_shape(weight)
    transposed = op.geometry.transposed if isinstance(op, Conv) else op.transposed
    axis = 1 if transposed else 0
    whole = sizes[axis] * (op.geometry.groups if isinstance(op, Conv) and transposed else 1)
    if len(channels) == whole:
        return replace(node, op=op)
    if max(channels, default=0) >= whole:
        return None  # the file states an output that is larger than its weight gives
    if isinstance(op, Conv) and op.geometry.groups != 1:
        return None
    blocks: tuple[Block, ...] = tuple(
        (*((0, size) for size in sizes[:axis]), run) for run in ranges(channels)
    )
    name = part_name(context, weight, blocks)
    cut = tuple(len(channels) if own == axis else size for own, size in enumerate(sizes))
    context.parts[name] = Derived(weight, blocks, axis, cut)
    return replace(node, op=op, inputs=(node.inputs[0], name))


def part_name(context: Context, constant: str, blocks: Sequence[Block]) -> str:
    """Return what a part of a constant is called: by the stored tensor where it only moved, as ``w[0:64]``."""
    shape = context.constant_shape(constant)
    origin: tuple[str, Shape, np.ndarray] | None = None
    if context.known.provenance is not None:
        origin = context.known.provenance(constant)
    if origin is not None:
        key, stored_shape, indices = origin
        found = [
            block_of(indices[tuple(slice(start, stop) for start, stop in block)], stored_shape)
            for block in blocks
        ]
        if all(block is not None for block in found):
            return key + "".join(suffix(block, stored_shape) for block in found if block is not None)
    return context.label(constant) + "".join(suffix(block, shape) for block in blocks)


def operator_shapes(context: Context, node: Node) -> tuple[Shape | None, Shape | None]:
    """Return the shapes, without the batch axis, that a stored operator's own row shows."""
    if isinstance(node.op, Linear):
        shape = context.constant_shape(node.inputs[1])
        rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[-2], shape[-1])
        return ((rows,), (columns,)) if node.op.transposed else ((columns,), (rows,))
    return known_shape(context.shape(node.inputs[0]), 1), known_shape(context.shape(node.outputs[0]), 1)


def known_shape(shape: Sequence[int | None] | None, skip: int = 0) -> Shape | None:
    """Return ``shape`` without its first ``skip`` axes, or None unless the rest is known."""
    if shape is None:
        return None
    sizes = tuple(size for size in shape[skip:] if size is not None)
    return sizes if len(sizes) == max(len(shape) - skip, 0) else None


def is_lone(context: Context, found: Narrow, nodes: Sequence[Node]) -> Node | None:
    """Return the stored operator among ``nodes`` that a narrow chain is, whole and without a factor, else None."""
    if len(found.nodes) != 1 or abs(found.factor) != 1.0:
        return None
    weight = found.nodes[0].inputs[1] if context.role(found.nodes[0]) == OPERATOR else ""
    return next((node for node in nodes if weight and context.matrix(node) == weight), None)
