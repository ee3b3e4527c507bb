"""From an affine dataflow to rows: one per stored operator, one per pair with a batch norm, one per maximal region."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spectool.graph.affine import flow, region_nodes
from spectool.graph.narrow import Narrow, is_lone, known_shape, narrow, operator_shapes
from spectool.graph.parts import with_parts
from spectool.graph.roles import BATCHNORM, FREE, OPERATOR, Context, Known
from spectool.graph.types import BatchNorm, Conv, Embedding, Graph, Linear, Node, Region, Skipped, Survey
from spectool.graph.writing import TracedWriter

_TOO_MANY_NODES = 1_000_000
"""Nodes of all regions together after which no further composed row is made (regions of one root overlap)."""
_TOO_LONG_NAMES = 1 << 25
"""Characters of the names in all of them together, likewise: a row repeats the name of every operator in it."""


@dataclass(frozen=True)
class _Placed:
    """A row and where it belongs: behind the node ``at``, layers before compositions, small before large.

    Parts of one operator stand in the order of the channels they ``start`` at.
    """

    at: int
    composed: bool
    size: int
    item: Region | Skipped
    start: int = 0

    @property
    def order(self) -> tuple[int, bool, int, int]:
        return self.at, self.composed, self.size, self.start


def survey_graph(graph: Graph, known: Known, *, source: str, notes: Sequence[str] = ()) -> Survey:
    """Cut a graph into rows.

    Every stored operator gets a row of its own. An operator with a batch norm directly behind it, and every
    maximal affine region that is more than one operator, get composed rows. A value of unknown size makes
    ``in_shape`` None for a stored operator and a skip for a composition.

    Args:
        graph: Nodes in execution order.
        known: What the front-end knows beyond the graph.
        source: Name of the front-end.
        notes: What it wants to say.
    """
    context = Context(graph, flow(graph, known.rules), known)
    layers = _layers(context)
    pairs = _pairs(context)
    composed, more_notes = _maximal(context, layers, pairs)
    extras = [
        _Placed(index, False, 0, item)
        for index, node in enumerate(graph.nodes)
        for item in known.extras.get(node.name, ())
    ]
    placed = sorted([*extras, *layers.values(), *pairs.values(), *composed], key=lambda row: row.order)
    load = with_parts(known.load, context.parts)
    writer = None
    if known.plain is not None and known.provenance is not None:
        parts = {**known.parts, **context.parts}
        writer = TracedWriter(load, known.plain, known.provenance, parts, known.computed)
    items = tuple(_numbered([row.item for row in placed]))
    return Survey(items, load, source, (*notes, *more_notes), writer, graph)


def _layers(context: Context) -> dict[int, _Placed]:
    """Return the row of every stored operator and batch norm, by node index; not yet marked as maximal."""
    rows = {}
    for index, node in enumerate(context.graph.nodes):
        if context.role(node) in (OPERATOR, BATCHNORM) and context.flowing(node):
            rows[index] = _Placed(index, False, 0, _lone(context, node))
    return rows


def _lone(context: Context, node: Node) -> Region:
    """Return the region that is one node."""
    parameters = context.parameters(node)
    weights, shapes = context.stored(parameters)
    root, exit = context.flowing(node)[0], node.outputs[0]
    in_shape: tuple[int, ...] | None
    out_shape: tuple[int, ...] | None
    batched = True
    if isinstance(node.op, Embedding):
        rows, columns = context.constant_shape(node.inputs[1])
        in_shape, out_shape = (rows,), (columns,)
    elif isinstance(node.op, (Conv, Linear)):
        in_shape, out_shape = operator_shapes(context, node)
    else:
        in_shape, out_shape, batched = _shapes(context, root, exit, [node])
    operator = context.role(node) == OPERATOR
    kind = context.kind(node) or "region"
    return Region(
        key=context.label(parameters[0]) if parameters else f"{kind}:{exit}",
        level="layer",
        kind=kind,
        root=root,
        exit=exit,
        nodes=(node,),
        weights=weights,
        weight_shapes=shapes,
        in_shape=in_shape,
        out_shape=out_shape,
        batched=batched,
        assumed=context.assumptions(parameters),
        maximal=isinstance(node.op, Embedding),
        operators=int(operator),
    )


def _pairs(context: Context) -> dict[tuple[int, int], _Placed]:
    """Return the composed row of every operator with a batch norm directly behind it, its only user."""
    rows = {}
    for index, node in enumerate(context.graph.nodes):
        if not isinstance(node.op, BatchNorm) or node.outputs[0] not in context.flow.root:
            continue
        if context.flow.root[node.outputs[0]] == node.outputs[0]:
            continue
        path = [index]
        name = context.flowing(node)[0]
        while name in context.flow.producer:
            users = context.flow.users.get(name, ())
            before = context.flow.producer[name]
            source = context.graph.nodes[before]
            if len(users) != 1 or name in context.graph.outputs or len(context.flowing(source)) != 1:
                break
            path.append(before)
            role = context.role(source)
            if role == OPERATOR and not isinstance(source.op, Embedding):
                nodes = [context.graph.nodes[i] for i in reversed(path)]
                region = _composed(context, nodes, context.flowing(source)[0], node.outputs[0])
                if not isinstance(region, Region):
                    break
                rows[before, index] = _Placed(index, True, 2, replace(region, maximal=False))
                break
            if role not in FREE:
                break
            name = context.flowing(source)[0]
    return rows


def _maximal(
    context: Context, layers: dict[int, _Placed], pairs: dict[tuple[int, int], _Placed]
) -> tuple[list[_Placed], list[str]]:
    """Return a row for every maximal region that has none yet; mark those that are ``layers`` or ``pairs``."""
    rows: list[_Placed] = []
    seen: set[object] = set()
    budget, characters = _TOO_MANY_NODES, _TOO_LONG_NAMES
    exits = context.flow.exits(context.graph)
    for position, exit in enumerate(exits):
        root = context.flow.root[exit]
        indices = region_nodes(context.graph, context.flow, root, exit)
        budget -= len(indices)
        if budget < 0 or characters < 0:
            return rows, [
                f"{len(exits) - position} of {len(exits)} affine regions left out: they overlap too much"
            ]
        nodes = [context.graph.nodes[index] for index in indices]
        roles = [context.role(node) for node in nodes]
        content = [index for index, role in zip(indices, roles, strict=True) if role not in FREE]
        signature = (root, tuple(content), _used_outputs(context, content, indices, exit))
        if not content or signature in seen:
            continue
        seen.add(signature)
        stored = [index for index in content if index in layers]
        if not stored and (_single_number(context, root) or not any(context.kind(node) for node in nodes)):
            continue
        if len(content) == 2 and (content[0], content[1]) in pairs:
            key = (content[0], content[1])
            pairs[key] = replace(pairs[key], item=_as_maximal(pairs[key].item))
            continue
        start = 0
        found: Region | Skipped | Node
        if len(content) == 1 and stored:
            found = context.graph.nodes[content[0]]
        else:
            small = narrow(context, nodes, root, exit) if stored else None
            start = small.start if small is not None else 0
            found = _larger(context, nodes, small, root, exit)
        if isinstance(found, Node):
            at = next(index for index in stored if context.graph.nodes[index] is found)
            layers[at] = replace(layers[at], item=_as_maximal(layers[at].item))
            continue
        characters -= len(found.key) + sum(map(len, found.weights))
        composed = found.level == "composed" if isinstance(found, Region) else bool(stored)
        rows.append(_Placed(max(stored or content), composed, len(stored), found, start))
    return rows, []


def _single_number(context: Context, name: str) -> bool:
    """Return whether a value is one number, such as a scale: arithmetic on it is no part of the network's maps."""
    shape = context.shape(name)
    return shape is not None and all(size == 1 for size in shape)


def _as_maximal(item: Region | Skipped) -> Region | Skipped:
    return replace(item, maximal=True) if isinstance(item, Region) else item


def _used_outputs(
    context: Context, content: Sequence[int], indices: Sequence[int], exit: str
) -> frozenset[str]:
    """Return which outputs of the nodes that do something are read (a split has one for each of its regions)."""
    read = {name for index in indices for name in context.graph.nodes[index].inputs} | {exit}
    return frozenset(
        name
        for index in content
        if len(context.graph.nodes[index].outputs) > 1
        for name in context.graph.nodes[index].outputs
        if name in read
    )


def _larger(
    context: Context, nodes: Sequence[Node], small: Narrow | None, root: str, exit: str
) -> Region | Skipped | Node:
    """Return the row of a region that is more than a stored operator; its node if it turns out to be just that."""
    if small is not None:
        operator = is_lone(context, small, nodes)
        if operator is not None:
            return operator
    content = [node for node in nodes if context.role(node) not in FREE]
    if len(content) == 1 and context.kind(content[0]):
        # One pool, up-sampling or scale: it and the rearrangements around it.
        lone = _lone(context, content[0])
        if lone.in_shape is None or lone.out_shape is None:
            return _unsized(lone)
        return replace(lone, maximal=True)
    return _composed(context, nodes, root, exit, small)


def _composed(
    context: Context, nodes: Sequence[Node], root: str, exit: str, small: Narrow | None = None
) -> Region | Skipped:
    """Return the composed row of several nodes, as a narrow chain where it is one."""
    kinds = [kind for node in nodes if (kind := context.kind(node))]
    if small is not None:
        root, nodes = context.flowing(small.nodes[0])[0], small.nodes
    parameters = [name for node in nodes for name in context.parameters(node)]
    weights, shapes = context.stored(parameters)
    heads = [context.name(names[0]) for node in nodes if (names := context.parameters(node))]
    in_shape, out_shape, batched = _shapes(context, root, exit, nodes)
    if small is not None:
        in_shape, out_shape, batched = small.in_shape, small.out_shape, True
    region = Region(
        key=" + ".join(heads) or f"{'+'.join(kinds) or 'region'}:{exit}",
        level="composed",
        kind="+".join(kinds) or "region",
        root=root,
        exit=exit,
        nodes=tuple(nodes),
        weights=weights,
        weight_shapes=shapes,
        in_shape=in_shape,
        out_shape=out_shape,
        batched=batched,
        assumed=context.assumptions(parameters),
        maximal=True,
        operators=sum(context.role(node) == OPERATOR for node in nodes),
    )
    return _unsized(region) if in_shape is None or out_shape is None else region


def _unsized(region: Region) -> Skipped:
    reason = "its input size is not known"
    return Skipped(region.key, region.kind, region.weights, region.weight_shapes, reason, operators=0)


def _shapes(
    context: Context, root: str, exit: str, nodes: Sequence[Node]
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None, bool]:
    """Return input and output shape and whether a leading batch axis was taken off both."""
    before, after = context.shape(root), context.shape(exit)
    if before is None or after is None:
        return None, None, True
    single = before[:1] == (1,) and after[:1] == (1,)
    # These keep samples apart whatever the batch size is.
    separate = all(
        isinstance(node.op, Conv)
        or (isinstance(node.op, BatchNorm) and node.op.axis > 0)
        or (isinstance(node.op, Linear) and node.op.axis == -1 and len(before) > 1)
        for node in nodes
    )
    skip = 1 if single or separate else 0
    return known_shape(before, skip), known_shape(after, skip), bool(skip)


def _numbered(items: Sequence[Region | Skipped]) -> list[Region | Skipped]:
    """Return the items with equal keys of one level told apart by ``#2``, ``#3`` in their order."""
    counts: Counter[tuple[str, str]] = Counter()
    result: list[Region | Skipped] = []
    for item in items:
        level = item.level if isinstance(item, Region) else "layer"
        counts[level, item.key] += 1
        number = counts[level, item.key]
        result.append(item if number == 1 else replace(item, key=f"{item.key}#{number}"))
    return result
