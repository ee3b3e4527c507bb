"""Regions that are really one small operator: a part of a matrix, or the same operator at every position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from spectool.graph.parts import Block, Derived, block_of, ranges, suffix
from spectool.graph.roles import FREE, OPERATOR, Context
from spectool.graph.types import Conv, Linear, Node, Region, Shape

if TYPE_CHECKING:
    import numpy as np

_LARGEST = 1 << 23
"""Entries up to which positions are followed one by one."""


def chain(context: Context, nodes: Sequence[Node], root: str, exit: str) -> list[Node] | None:
    """Return the nodes on the way from root to exit if each reads only the one before it, once; else None."""
    previous = root
    for position, node in enumerate(nodes):
        if context.flowing(node) != [previous]:
            return None
        if position + 1 < len(nodes):
            following = context.flowing(nodes[position + 1])
            if len(following) != 1 or following[0] not in node.outputs:
                return None
            previous = following[0]
    return list(nodes) if nodes and exit in nodes[-1].outputs else None


def repeats(context: Context, nodes: Sequence[Node]) -> bool:
    """Return whether a selection among ``nodes`` reads an entry twice (a gather may); unknown sizes count as no."""
    for node in nodes:
        if context.role(node) == "select" and _moves_only(context, node):
            indices = follow(context, [node], context.flowing(node)[0], node.outputs[0])
            if indices is not None and not _distinct(indices):
                return True
    return False


def follow(context: Context, nodes: Sequence[Node], start: str, exit: str) -> np.ndarray | None:
    """Return, for each entry of ``exit``, the flat index of the entry of ``start`` that it comes from.

    None where a node mixes entries, or where shapes are unknown or too large to follow.
    """
    import numpy as np

    shape = context.shape(start)
    if shape is None or None in shape or context.known.move is None:
        return None
    sizes = tuple(size for size in shape if size is not None)
    if prod(sizes) > _LARGEST:
        return None
    arrays = {start: np.arange(prod(sizes), dtype=np.int64).reshape(sizes)}
    for node in nodes:
        role = context.role(node)
        sources = [name for name in node.inputs if name in arrays]
        if len(sources) != 1 or len(context.flowing(node)) != 1:
            return None
        if role == "neutral" or (role == "scale" and _scalars(context, node) is not None):
            arrays[node.outputs[0]] = arrays[sources[0]]
        elif role in ("move", "select") and _moves_only(context, node):
            try:
                moved = context.known.move(node, [arrays.get(name) for name in node.inputs])
            except (ValueError, IndexError, RuntimeError, TypeError, KeyError, AttributeError):
                return None  # the row is then replayed as a whole
            arrays.update(zip(node.outputs, moved, strict=False))
        else:
            return None
    return arrays.get(exit)


def _moves_only(context: Context, node: Node) -> bool:
    """Return whether all that a node puts out comes from its first argument (a concatenation adds constants)."""
    return context.known.rules[getattr(node.op, "name", "")].how == "first"


def _distinct(indices: np.ndarray) -> bool:
    import numpy as np

    return bool(np.unique(indices).size == indices.size)


def factor_of(context: Context, nodes: Sequence[Node]) -> float:
    """Return the product of the single numbers that scale nodes multiply by."""
    factor = 1.0
    for node in nodes:
        if context.role(node) == "scale":
            for value, divides in _scalars(context, node) or ():
                factor = factor / value if divides else factor * value
    return factor


def _scalars(context: Context, node: Node) -> list[tuple[float, bool]] | None:
    """Return the (value, divides) pairs of a scale node if it multiplies by single numbers only, else None."""
    found = []
    for position, name in enumerate(node.inputs):
        if not name or not context.is_constant(name):
            continue
        if prod(context.constant_shape(name)) != 1:
            return None
        value = float(context.known.load(name).reshape(()))
        divides = context.known.rules[getattr(node.op, "name", "")].how == "first" and position > 0
        if divides and value == 0:
            return None
        found.append((value, divides))
    return found


def part(context: Context, nodes: Sequence[Node], root: str, exit: str) -> Region | Node | None:
    """Recognise one operator among rearrangements and selections, with single factors behind it.

    Such a chain has the singular values of the operator's weight, restricted to the output channels that are
    selected, times the factor (a fused query–key–value projection gives three).

    Returns:
        The operator's node where its own row already says everything; a composed region that is one operator with
        a part of the weight, or with a factor; None where the chain is something else.
    """
    import numpy as np

    if chain(context, nodes, root, exit) is None:
        return None
    at = next(index for index, node in enumerate(nodes) if context.role(node) == OPERATOR)
    operator, tail = nodes[at], nodes[at + 1 :]
    if not isinstance(operator.op, (Conv, Linear)):
        return None
    head = nodes[:at]
    if any(context.role(node) not in FREE for node in head):
        # Selecting distinct entries before the operator leaves its singular values, too: S Sᵀ = I.
        taken = follow(context, head, root, context.flowing(operator)[0])
        if taken is None or not _distinct(taken) or abs(factor_of(context, head)) != 1.0:
            return None
    output = operator.outputs[0]
    indices = follow(context, tail, output, exit)
    if indices is None:
        return None
    shape = tuple(size for size in context.shape(output) or () if size is not None)
    axis = 1 if isinstance(operator.op, Conv) else len(shape) + operator.op.axis
    flat = indices.reshape(-1)
    places = np.unravel_index(flat, shape)
    channels = np.unique(places[axis])
    rest = np.delete(np.array(shape), axis)
    others = [place for index, place in enumerate(places) if index != axis]
    positions = np.unique(np.ravel_multi_index(others, tuple(rest))) if others else np.zeros(1, np.int64)
    if not _distinct(flat) or channels.size * positions.size != flat.size:
        return None
    if isinstance(operator.op, Conv) and positions.size != prod(rest.tolist()):
        return None
    factor = factor_of(context, tail)
    whole = channels.size == shape[axis]
    if whole and abs(factor) == 1.0:
        return operator
    if isinstance(operator.op, Conv) and (factor != 1.0 or operator.op.geometry.groups != 1):
        return None
    return _part_region(context, operator, tail, exit, channels.tolist(), factor)


def _part_region(
    context: Context, operator: Node, tail: Sequence[Node], exit: str, channels: list[int], factor: float
) -> Region:
    weight = operator.inputs[1]
    shape = context.constant_shape(weight)
    axis = _output_axis(operator)
    name = weight
    if len(channels) < shape[axis]:
        blocks: tuple[Block, ...] = tuple(
            (*((0, size) for size in shape[:axis]), run) for run in ranges(channels)
        )
        name = part_name(context, weight, blocks)
        cut_shape = tuple(len(channels) if index == axis else size for index, size in enumerate(shape))
        context.parts[name] = Derived(weight, blocks, axis, cut_shape)
    op = operator.op
    if isinstance(op, Linear) and factor != 1.0:
        op = replace(op, alpha=op.alpha * factor)
    node = Node(operator.name, op, (operator.inputs[0], name), (exit,))
    kinds = [context.kind(operator), *(["scale"] if factor != 1.0 else [])]
    weights, shapes = context.stored([weight])
    in_shape, out_shape = operator_shapes(context, node)
    return Region(
        key=name if name != weight else context.label(weight),
        level="composed",
        kind="+".join(kinds),
        root=operator.inputs[0],
        exit=exit,
        nodes=(node,),
        weights=weights,
        weight_shapes=shapes,
        in_shape=in_shape,
        out_shape=out_shape,
        assumed=context.assumptions([weight]),
        maximal=True,
        operators=1,
    )


def part_name(context: Context, constant: str, blocks: Sequence[Block]) -> str:
    """Return what a part of a constant is called: by the stored tensor where it only moved, as ``w[0:64]``."""
    shape = context.constant_shape(constant)
    origin = context.known.provenance(constant) if context.known.provenance is not None else None
    if origin is None:
        return context.label(constant) + "".join(suffix(block, shape) for block in blocks)
    key, stored_shape, indices = origin
    texts = []
    for block in blocks:
        found = block_of(indices[tuple(slice(start, stop) for start, stop in block)], stored_shape)
        if found is None:
            return context.label(constant) + "".join(suffix(block, shape) for block in blocks)
        texts.append(suffix(found, stored_shape))
    return key + "".join(texts)


def _output_axis(node: Node) -> int:
    """Return the axis of the weight that output channels run along."""
    if isinstance(node.op, Conv):
        return 1 if node.op.geometry.transposed else 0
    return 1 if isinstance(node.op, Linear) and node.op.transposed else 0


def operator_shapes(context: Context, node: Node) -> tuple[Shape | None, Shape | None]:
    """Return the shapes, without the batch axis, that a stored operator's own row shows."""
    if isinstance(node.op, Linear):
        shape = context.constant_shape(node.inputs[1])
        rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[-2], shape[-1])
        return ((rows,), (columns,)) if node.op.transposed else ((columns,), (rows,))
    before, after = context.shape(node.inputs[0]), context.shape(node.outputs[0])
    return known_shape(before, 1), known_shape(after, 1)


def known_shape(shape: Sequence[int | None] | None, skip: int = 0) -> Shape | None:
    """Return ``shape`` without its first ``skip`` axes, or None unless the rest is known."""
    if shape is None:
        return None
    sizes = tuple(size for size in shape[skip:] if size is not None)
    return sizes if len(sizes) == max(len(shape) - skip, 0) else None


def per_token(context: Context, nodes: Sequence[Node], root: str, exit: str) -> Region | None:
    """Recognise a chain that does the same to the last axis at every position, and return it for one position.

    Its singular values are those of the whole chain, less the copies that positions make. Only the nodes, shapes
    and names of the result are meant: key, kind and weights are the caller's.
    """
    way = chain(context, nodes, root, exit)
    shape = known_shape(context.shape(root))
    if way is None or shape is None or prod(shape[:-1]) <= 1:
        return None
    kept: list[Node] = []
    moved = False
    current = root
    for node in way:
        role = context.role(node)
        source = context.flowing(node)[0]
        if role in FREE:
            moved = moved or (bool(kept) and role == "move" and not _keeps_last_axis(context, node))
            continue
        if moved and (role != "scale" or not _scalars(context, node)):
            return None
        pointwise = _pointwise(context, node, source)
        if pointwise is None:
            return None
        if not kept:
            current = source
        kept.append(replace(pointwise, inputs=_renamed(pointwise.inputs, source, current)))
        current = node.outputs[0]
    first, last = context.shape(kept[0].inputs[_flow_index(context, kept[0])]), context.shape(current)
    if first is None or last is None or first[-1] is None or last[-1] is None:
        return None
    return Region(
        key="", level="composed", kind="", root=context.flowing(kept[0])[0], exit=current, nodes=tuple(kept),
        weights=(), weight_shapes=(), in_shape=(first[-1],), out_shape=(last[-1],),
    )  # fmt: skip


def _flow_index(context: Context, node: Node) -> int:
    return next(i for i, name in enumerate(node.inputs) if name and not context.is_constant(name))


def _renamed(inputs: Sequence[str], old: str, new: str) -> tuple[str, ...]:
    return tuple(new if name == old else name for name in inputs)


def _pointwise(context: Context, node: Node, source: str) -> Node | None:
    """Return the node as it acts on one position, a vector; None if it does not act on the last axis alone."""
    if isinstance(node.op, Linear):
        rank = len(context.constant_shape(node.inputs[1]))
        return node if node.op.axis == -1 and rank == 2 else None
    shape = context.shape(source)
    if context.role(node) != "scale" or shape is None or not shape:
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
    """Return whether a rearrangement leaves every vector along the last axis together and in order."""
    import numpy as np

    before, after = context.shape(node.inputs[0]), context.shape(node.outputs[0])
    if not before or not after or before[-1] is None or before[-1] != after[-1]:
        return False
    indices = follow(context, [node], node.inputs[0], node.outputs[0])
    return indices is not None and bool(np.all(indices % before[-1] == np.arange(before[-1])))
