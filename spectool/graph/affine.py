"""Affine dataflow: every value is constant, affine in exactly one root, or a new root."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spectool.graph.rules import Rule
from spectool.graph.types import BatchNorm, Call, Conv, Embedding, Graph, Linear, Node, Opaque

_FLOATING = ("float", "bfloat", "double", "half")


@dataclass(frozen=True)
class Flow:
    """What the dataflow knows about a graph.

    Attributes:
        root: Value name → name of the one value it is affine in; itself for a root. Constants have no entry.
        producer: Value name → index of the node that writes it.
        users: Value name → indices of the nodes that read its data, each once, in order.
        leaving: Names of the values that some user makes something non-affine of, or that the graph puts out.
    """

    root: Mapping[str, str]
    producer: Mapping[str, int]
    users: Mapping[str, Sequence[int]]
    leaving: frozenset[str]

    def exits(self, graph: Graph) -> list[str]:
        """Return the values at which an affine region ends, in graph order; roots themselves are none."""
        return [
            name
            for node in graph.nodes
            for name in node.outputs
            if name in self.leaving and self.root.get(name, name) != name
        ]


def flow(graph: Graph, rules: Mapping[str, Rule]) -> Flow:
    """Follow affinity through a graph in one pass, linear in its nodes.

    Integers and booleans are never affine. Joins of different roots, products of two values that flow, and every
    operation without a rule start a new root.

    Args:
        graph: What to follow.
        rules: Operation name → rule, for ``Call`` records.
    """
    root: dict[str, str] = {name: name for name in graph.inputs if name not in graph.constants}
    producer: dict[str, int] = {}
    users: dict[str, list[int]] = {}
    leaving = {name for name in graph.outputs if name not in graph.constants}
    for index, node in enumerate(graph.nodes):
        flowing = [name for name in node.inputs if name and name not in graph.constants]
        for name in flowing:
            root.setdefault(name, name)
        common = _common_root(graph, node, root, rules)
        if node.outputs and not is_floating(graph, node.outputs[0]):
            common = None  # rounding to integers, or a comparison
        if not _reads_shape_only(node, rules):
            for name in dict.fromkeys(flowing):
                users.setdefault(name, []).append(index)
                if common is None:
                    leaving.add(name)
        for name in node.outputs:
            if name:
                producer[name] = index
                root[name] = common if common is not None and is_floating(graph, name) else name
    return Flow(root, producer, users, frozenset(leaving))


def region_nodes(graph: Graph, found: Flow, root: str, exit: str) -> list[int]:
    """Return the indices, ascending, of the nodes between ``root`` and ``exit``."""
    chosen: set[int] = set()
    pending = [exit]
    while pending:
        name = pending.pop()
        index = found.producer.get(name)
        if name == root or index is None or index in chosen:
            continue
        chosen.add(index)
        pending.extend(source for source in graph.nodes[index].inputs if source in found.root)
    return sorted(chosen)


def is_floating(graph: Graph, name: str) -> bool:
    """Return whether a value holds real floating-point numbers; an unknown type counts as one."""
    value = graph.values.get(name)
    return value is None or not value.dtype or value.dtype.startswith(_FLOATING)


def _reads_shape_only(node: Node, rules: Mapping[str, Rule]) -> bool:
    rule = rules.get(node.op.name) if isinstance(node.op, Call) else None
    return rule is not None and rule.how == "shape"


def _common_root(graph: Graph, node: Node, root: Mapping[str, str], rules: Mapping[str, Rule]) -> str | None:
    """Return the root that the node's outputs are affine in, or None if they are new roots."""
    flowing = [position for position, name in enumerate(node.inputs) if name and name not in graph.constants]
    if not flowing or not all(is_floating(graph, node.inputs[position]) for position in flowing):
        return None
    roots = {root[node.inputs[position]] for position in flowing}
    if len(roots) != 1:
        return None
    match node.op:
        case Opaque() | Embedding():
            allowed = False
        case Conv() | Linear() | BatchNorm():
            allowed = flowing == [0]
        case Call(name=name):
            allowed = name in rules and _allows(rules[name], flowing)
    return roots.pop() if allowed else None


def _allows(rule: Rule, flowing: list[int]) -> bool:
    match rule.how:
        case "first":
            return flowing == [0]
        case "either":
            return len(flowing) == 1
        case "join":
            return True
        case "mask":
            return 0 not in flowing
        case "shape":
            return False
