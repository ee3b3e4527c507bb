"""From recorded ATen calls to operator records, with everything constant folded away by name."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from spectool.graph.aten import Slot, call, overload
from spectool.graph.aten_rules import ATEN_RULES, RANDOM, packet
from spectool.graph.types import (
    BatchNorm,
    Call,
    Conv,
    Embedding,
    Graph,
    Linear,
    Node,
    Op,
    Opaque,
    Shape,
    Value,
)
from spectool.linear.geometry import ConvGeometry

_CONVOLUTIONS = frozenset(
    {
        "aten.convolution",
        "aten._convolution",
        "aten.conv1d",
        "aten.conv2d",
        "aten.conv3d",
        "aten.conv_transpose1d",
        "aten.conv_transpose2d",
        "aten.conv_transpose3d",
    }
)
_BATCH_NORMS = frozenset(
    {
        "aten.native_batch_norm",
        "aten.batch_norm",
        "aten.cudnn_batch_norm",
        "aten.miopen_batch_norm",
        "aten._native_batch_norm_legit",
        "aten._native_batch_norm_legit_no_training",
        "aten._batch_norm_no_update",
    }
)
_NORMS = {
    "aten.native_layer_norm": "layernorm",
    "aten.layer_norm": "layernorm",
    "aten.native_group_norm": "groupnorm",
    "aten.group_norm": "groupnorm",
    "aten.instance_norm": "instancenorm",
    "aten._fused_rms_norm": "rmsnorm",
    "aten.rms_norm": "rmsnorm",
}


TABLE = "table"
"""Reason of the mark that a table looked up at fixed places leaves in the graph."""


@dataclass
class Constants:
    """Constants that a program makes of its parameters, evaluated when asked for.

    Attributes:
        nodes: Name → (node that makes it, which of its outputs).
        shapes: Value name → shape, for stand-ins of tensors whose data is not read.
        leaves: Tensors that the program captured.
    """

    nodes: dict[str, tuple[Node, int]] = field(default_factory=dict)
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    leaves: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def load(self, name: str, stored: Any) -> torch.Tensor:
        """Return constant ``name``; ``stored(name)`` reads a parameter or buffer."""
        if name in self.nodes:
            node, position = self.nodes[name]
            if not isinstance(node.op, Call):
                raise TypeError(f"{node.name} is no recorded call")
            arguments = [
                self.load(source, stored) if self._known(source) else torch.zeros(self.shapes[source])
                for source in node.inputs
            ]
            with torch.no_grad():
                result = call(node.op, arguments)
            tensor: torch.Tensor = result[position] if isinstance(result, tuple) else result
            return tensor
        if name in self.leaves:
            return self.leaves[name]
        found: torch.Tensor = stored(name)
        return found

    def _known(self, name: str) -> bool:
        return name in self.nodes or name in self.leaves or not name.startswith(("%", "input."))


def translate(graph: Graph, captured: Mapping[str, torch.Tensor]) -> tuple[Graph, Constants]:
    """Return the graph with operator records and folded constants.

    Args:
        graph: As recorded by the tape.
        captured: Tensors that the program captured or made for itself.
    """
    known: dict[str, Shape] = dict(graph.constants)
    origins = dict(graph.origins)
    constants = Constants(
        shapes={name: tuple(int(n or 0) for n in value.shape or ()) for name, value in graph.values.items()},
        leaves=captured,
    )
    nodes: list[Node] = []
    values = dict(graph.values)
    pending = deque(graph.nodes)
    # What is computed twice from the same constants is one constant: a weight that is used twice is one weight.
    same: dict[str, str] = {}
    made: dict[tuple[str, str, tuple[str, ...]], tuple[str, ...]] = {}
    while pending:
        node = pending.popleft()
        if not same.keys().isdisjoint(node.inputs):
            node = replace(node, inputs=tuple(same.get(name, name) for name in node.inputs))
        if _is_constant(node, known):
            nodes.extend(_table(node, known))
            if isinstance(node.op, Call):
                before = made.setdefault((node.op.name, repr(node.op.attributes), node.inputs), node.outputs)
                if before is not node.outputs:
                    same.update(zip(node.outputs, before, strict=True))
                    continue
            sources = tuple(dict.fromkeys(o for name in node.inputs for o in origins.get(name, ())))
            for position, output in enumerate(node.outputs):
                if output:
                    known[output] = tuple(int(n or 0) for n in values[output].shape or ())
                    origins[output] = sources
                    constants.nodes[output] = (node, position)
            continue
        steps = _simpler(node, known, values)
        if steps:
            pending.extendleft(reversed(steps))
        else:
            nodes.append(_record(node, known))
    outputs = tuple(same.get(name, name) for name in graph.outputs)
    translated = replace(
        graph, nodes=tuple(nodes), values=values, outputs=outputs, constants=known, origins=origins
    )
    return translated, constants


def _table(node: Node, known: Mapping[str, Shape]) -> list[Node]:
    """Return a mark for a table that is looked up at fixed places only (positions): still a stored operator."""
    if not isinstance(node.op, Call) or packet(node.op.name) != "aten.embedding":
        return []
    weight = _bind(node, node.op)["weight"]
    return [Node(node.name, Opaque(node.op.name, TABLE), (weight,), ())]


def _is_constant(node: Node, known: Mapping[str, Shape]) -> bool:
    if not isinstance(node.op, Call):
        return False
    name = node.op.name
    if name.partition(".")[2].startswith(RANDOM):
        return False
    rule = ATEN_RULES.get(packet(name))
    if rule is not None and rule.how == "shape":
        # Reads a shape, and at most constants besides it.
        return all(source in known for source in node.inputs[1:])
    return all(source in known for source in node.inputs)


def _record(node: Node, known: Mapping[str, Shape]) -> Node:
    """Return the node with the record of what it does."""
    op = node.op
    if not isinstance(op, Call):
        return node
    family = packet(op.name)
    if _is_rounded_or_random(node, op, family):
        return replace(node, op=Opaque(op.name))
    if family in _CONVOLUTIONS:
        return _convolution(node, op, known)
    if family in _BATCH_NORMS:
        return _batch_norm(node, op, known)
    if family in ("aten.mm", "aten.addmm", "aten.linear", "aten.matmul"):
        product = _product(node, op, known)
        if product is not None:
            return product
    if family == "aten.embedding":
        bound = _bind(node, op)
        if bound["weight"] in known:
            return replace(node, op=Embedding(), inputs=(bound["indices"], bound["weight"]))
    if family in _NORMS:
        return replace(node, op=Opaque(op.name, _NORMS[family]))
    return node if family in ATEN_RULES else replace(node, op=Opaque(op.name))


def _is_rounded_or_random(node: Node, op: Call, family: str) -> bool:
    """Return whether an argument takes its linearity from an operation that has it otherwise."""
    if family == "aten.div":
        return bool(_bind(node, op).get("rounding_mode"))
    return family == "aten.dropout" and bool(_bind(node, op)["train"]) and float(_bind(node, op)["p"]) > 0


def _bind(node: Node, op: Call) -> dict[str, Any]:
    """Return the call's arguments by name; tensors are names of values, absent ones ``""``."""
    schema = overload(op.name)._schema  # type: ignore[attr-defined]
    given = op.attributes["args"]
    bound: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(given):
            value = given[index]
        elif argument.name in op.attributes["kwargs"]:
            value = op.attributes["kwargs"][argument.name]
        else:
            value = argument.default_value
        tensor = "Tensor" in str(argument.type)
        if isinstance(value, Slot):
            value = node.inputs[value.index]
        elif tensor and value is None:
            value = ""
        bound[argument.name] = value
    return bound


def _convolution(node: Node, op: Call, known: Mapping[str, Shape]) -> Node:
    bound = _bind(node, op)
    x, weight, bias = bound["input"], bound["weight"], bound["bias"]
    if x in known or weight not in known or (bias and bias not in known):
        return replace(node, op=Call(op.name, op.attributes, op.opset))
    dims = len(known[weight]) - 2

    def per_axis(value: Any) -> tuple[int, ...]:
        sizes = (int(value),) if isinstance(value, int) else tuple(int(n) for n in value)
        return sizes * dims if len(sizes) == 1 else sizes

    transposed = bool(bound.get("transposed", "transpose" in op.name))
    dilation = per_axis(bound["dilation"])
    geometry = ConvGeometry(
        stride=per_axis(bound["stride"]),
        padding=_padding(bound["padding"], known[weight][2:], dilation, per_axis),
        dilation=dilation,
        groups=int(bound["groups"]),
        transposed=transposed,
        output_padding=per_axis(bound["output_padding"]) if transposed else (0,) * dims,
    )
    return replace(node, op=Conv(geometry), inputs=(x, weight, bias) if bias else (x, weight))


def _padding(
    value: Any, kernel: Shape, dilation: Shape, per_axis: Callable[[Any], Shape]
) -> tuple[tuple[int, int], ...]:
    """Return (leading, trailing) padding per axis, from numbers or from ``same`` and ``valid``."""
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        # torch puts the odd one behind.
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in per_axis(value))


def _batch_norm(node: Node, op: Call, known: Mapping[str, Shape]) -> Node:
    bound = _bind(node, op)
    training = bool(bound.get("training", False))
    mean, var = bound.get("running_mean", ""), bound.get("running_var", "")
    constant = all(not bound.get(key) or bound[key] in known for key in ("weight", "bias")) and {
        mean,
        var,
    } <= set(known)
    if training or not constant:
        return replace(node, op=Opaque(op.name, "instancenorm" if training else ""))
    eps = float(bound.get("eps", bound.get("epsilon", 1e-5)))
    inputs = (bound["input"], bound["weight"], bound["bias"], mean, var)
    return replace(node, op=BatchNorm(eps), inputs=inputs, outputs=node.outputs[:1])


_SUMS = {"aten.addmm": "aten.mm", "aten.baddbmm": "aten.bmm", "aten.addmv": "aten.mv"}


def _simpler(node: Node, known: Mapping[str, Shape], values: dict[str, Value]) -> list[Node]:
    """Return a weighted sum as scales, a product and a plain sum; empty for what is a single record or none.

    Args:
        node: As recorded.
        known: Constants by now.
        values: Every value; what lies between the nodes is added.
    """
    op = node.op
    if not isinstance(op, Call):
        return []
    family = packet(op.name)
    steps = _Steps(node, known, values)
    if family in ("aten.add", "aten.sub") and op.attributes["kwargs"].get("alpha", 1) != 1:
        bound = _bind(node, op)
        first, second = bound["self"], bound["other"]
        if first not in known or second in known or not isinstance(second, str):
            return []  # what flows has no factor
        steps.call(f"{family}.Tensor", (Slot(0), Slot(1)), first, steps.scaled(second, float(bound["alpha"])))
        return steps.finished()
    if family not in _SUMS:
        return []
    bound = _bind(node, op)
    bias, left, right = list(bound.values())[:3]
    alpha, beta = float(bound["alpha"]), float(bound["beta"])
    if left not in known and right not in known:
        return []  # a product of two values that flow is a boundary as it is
    if family == "aten.addmm" and _product(node, op, known) is not None:
        return []
    rows, columns = steps.shape(left), steps.shape(right)
    name = steps.call(
        f"{_SUMS[family]}.default", (Slot(0), Slot(1)), left, right, shape=(*rows[:-1], *columns[1:][-1:])
    )
    last = steps.made[-1]
    matrix = _product(last, last.op, known) if family == "aten.addmm" else None
    if matrix is not None and isinstance(matrix.op, Linear):
        steps.made[-1] = replace(matrix, op=replace(matrix.op, alpha=alpha))
    else:
        name = steps.scaled(name, alpha)
    if beta != 0.0:
        steps.call("aten.add.Tensor", (Slot(0), Slot(1)), name, steps.scaled(bias, beta))
    return steps.finished()


@dataclass
class _Steps:
    """Nodes that take the place of one.

    Attributes:
        node: The one.
        known: Constants by now.
        values: Every value; grows.
        made: The nodes so far.
    """

    node: Node
    known: Mapping[str, Shape]
    values: dict[str, Value]
    made: list[Node] = field(default_factory=list)

    def shape(self, name: str) -> tuple[int | None, ...]:
        """Return the shape of a constant or a value."""
        return self.known[name] if name in self.known else self.values[name].shape or ()

    def call(
        self, name: str, args: tuple[Any, ...], *inputs: str, shape: tuple[int | None, ...] | None = None
    ) -> str:
        """Add a call and return the name of its output; its shape is that of the node's unless it is given."""
        own = f"{self.node.outputs[0]}~{len(self.made)}"
        label = f"{self.node.name}~{len(self.made)}"
        self.made.append(Node(label, Call(name, {"args": args, "kwargs": {}}), inputs, (own,)))
        like = self.values[self.node.outputs[0]]
        self.values[own] = replace(like, name=own, shape=like.shape if shape is None else shape)
        return own

    def scaled(self, name: str, factor: float) -> str:
        """Return the name of a multiple of a value, the value itself where that is enough."""
        if factor == 1.0:
            return name
        return self.call("aten.mul.Scalar", (Slot(0), factor), name, shape=self.shape(name))

    def finished(self) -> list[Node]:
        """Return the nodes, of which the last has the name and the output of the one."""
        last = self.made[-1]
        return [*self.made[:-1], replace(last, name=self.node.name, outputs=self.node.outputs)]


def _product(node: Node, op: Op, known: Mapping[str, Shape]) -> Node | None:
    """Return a linear record for a product with one constant matrix; None for anything else."""
    if not isinstance(op, Call):
        return None
    bound = _bind(node, op)
    family = packet(op.name)
    bias = ""
    alpha = 1.0
    if family == "aten.linear":
        left, right, bias = bound["input"], bound["weight"], bound["bias"]
    elif family == "aten.addmm":
        left, right = bound["mat1"], bound["mat2"]
        alpha = float(bound["alpha"])
        if bound["beta"] != 0:
            bias = bound["self"]
        if float(bound["beta"]) not in (0.0, 1.0):
            return None
    else:
        left, right = bound["self"], bound["mat2" if "mat2" in bound else "other"]
    if bias and bias not in known:
        return None
    tail = (bias,) if bias else ()
    if left not in known and right in known and len(known[right]) == 2:
        record = Linear(transposed=family != "aten.linear", alpha=alpha)
        return replace(node, op=record, inputs=(left, right, *tail))
    if left in known and right not in known and len(known[left]) == 2 and family != "aten.linear":
        return replace(node, op=Linear(alpha=alpha, axis=-2), inputs=(right, left, *tail))
    return None
