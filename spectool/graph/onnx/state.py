"""What is known while an ONNX graph is walked: constants, values, nodes, and rows made on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from spectool.graph.onnx.constants import Constants
from spectool.graph.onnx.evaluate import Array
from spectool.graph.parts import Block, block_of, suffix
from spectool.graph.types import Call, Linear, Node, Opaque, Region, Shape, Skipped, Value

Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class Operation:
    """One ONNX node with its names resolved.

    Attributes:
        kind: Operator name.
        domain: Operator domain, empty for ONNX's own.
        version: Opset version of the domain.
        attributes: Plain attributes: numbers, strings, tuples of them.
        inputs: Unique names, empty where absent.
        outputs: Unique names, empty where absent.
    """

    kind: str
    domain: str
    version: int
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the node in the graph: unique, because its first output is."""
        return next((name for name in self.outputs if name), self.kind)

    @property
    def full_name(self) -> str:
        """Name with its domain, as operator records carry it."""
        return f"{self.domain or 'onnx'}.{self.kind}"

    def input(self, position: int) -> str:
        """Return the name of an input, empty where absent."""
        return self.inputs[position] if position < len(self.inputs) else ""

    def call(self) -> Node:
        """Return the node that replays this operation."""
        attributes = dict(self.attributes)
        if self.kind == "Split":
            # How many pieces there are stands in no attribute before opset 18.
            attributes.setdefault("num_outputs", len(self.outputs))
        return Node(self.name, Call(self.full_name, attributes, self.version), self.inputs, self.outputs)

    def boundary(self, reason: str = "") -> Node:
        """Return the node that starts new roots."""
        return Node(self.name, Opaque(self.full_name, reason), self.inputs, self.outputs)


@dataclass
class State:
    """What is known so far.

    Attributes:
        constants: Everything that does not depend on the inputs.
        values: Every tensor that flows.
        nodes: Nodes in execution order.
        extras: Node name → rows made by the front-end.
        labels: Constant → row key.
        assumed: Constant → what had to be assumed to have it.
        samples: Values of small integer tensors in a run on zeros.
        notes: What a user should know.
        unsized: Names of operations whose geometry depends on an input size that is not known.
        makers: Value → node that writes it.
        integer_products: Node name → attributes of an integer product whose scale is still to be found.
    """

    constants: Constants
    values: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    extras: dict[str, list[Region | Skipped]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    samples: dict[str, Array] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unsized: list[str] = field(default_factory=list)
    makers: dict[str, Node] = field(default_factory=dict)
    integer_products: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def constant(self, name: str) -> bool:
        """Return whether a name is given and constant."""
        return name in self.constants

    def shape(self, name: str) -> Dims | None:
        """Return the shape of a constant or value, None where nothing is known."""
        if name in self.constants:
            return self.constants[name].shape
        value = self.values.get(name)
        return None if value is None else value.shape

    def dtype(self, name: str) -> str:
        """Return the element type of a constant or value, empty where unknown."""
        if name in self.constants:
            return self.constants[name].dtype
        return self.values[name].dtype if name in self.values else ""

    def emit(self, node: Node) -> None:
        """Append a node."""
        self.nodes.append(node)
        for name in node.outputs:
            if name:
                self.makers[name] = node
                self.values.setdefault(name, Value(name, None, ""))

    def explain(self, operation: Operation, item: Region | Skipped) -> None:
        """Add a row at the place of an operation."""
        self.extras.setdefault(operation.name, []).append(item)

    def is_matrix(self, name: str) -> bool:
        """Return whether a name is a constant of rank 2 or more that holds numbers of a network's weights."""
        if name not in self.constants:
            return False
        constant = self.constants[name]
        return (
            len(constant.shape) >= 2
            and constant.numel > 1
            and constant.dtype not in ("int64", "bool", "string")
        )

    def label(self, name: str) -> str:
        """Return what a constant is called in a row key."""
        if name in self.labels:
            return self.labels[name]
        return self.constants[name].label

    def stored(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[Shape, ...]]:
        """Return the stored tensors behind some constants and their shapes."""
        origins = dict.fromkeys(
            origin for name in names if name in self.constants for origin in self.constants[name].origins
        )
        return tuple(origins), tuple(self.constants.stored_shapes.get(origin, ()) for origin in origins)

    def skip(
        self,
        operation: Operation,
        weight: str,
        kind: str,
        reason: str,
        status: Literal["skipped", "nonlinear"] = "skipped",
    ) -> None:
        """Explain why an operation with weights has no spectrum."""
        names = [name for name in operation.inputs if name in self.constants]
        main = weight if weight in self.constants else next(iter(names), "")
        weights, shapes = self.stored([main] if main else [])
        key = self.label(main) if main else f"{kind}:{operation.name}"
        count = 0 if status == "nonlinear" else 1
        self.explain(operation, Skipped(key, kind, weights, shapes, reason, status, count))

    def attach_matrix(
        self,
        operation: Operation,
        weight: str,
        kind: str,
        *,
        block: Block | None = None,
        transposed: bool = False,
    ) -> None:
        """Add the row of a matrix, or of a block of a constant, that an operation holds inside."""
        name = weight if block is None else self.cut(weight, block)
        rows, columns = self.constants[name].shape
        weights, shapes = self.stored([weight])
        node = Node(operation.name, Linear(transposed), (operation.input(0), name), (operation.name,))
        self.explain(
            operation,
            Region(
                key=self.label(name), level="layer", kind=kind, root=operation.input(0), exit=operation.name,
                nodes=(node,), weights=weights, weight_shapes=shapes,
                in_shape=(rows,) if transposed else (columns,),
                out_shape=(columns,) if transposed else (rows,),
                assumed=self.assumed.get(weight, ()),
            ),
        )  # fmt: skip

    def cut(self, source: str, block: Block) -> str:
        """Return the name of a new constant: a block of the leading axes, axes with a single index dropped."""
        constant = self.constants[source]
        shape = tuple(stop - start for start, stop in block) + constant.shape[len(block) :]
        kept = tuple(size for axis, size in enumerate(shape) if axis >= len(block) - 1 or size != 1)
        label = self._part_label(source, block)
        name = label
        while name in self.constants:
            name += "'"
        index = tuple(slice(start, stop) for start, stop in block)
        self.constants.cut(name, source, kept, lambda array: array[index].reshape(kept))
        self.labels[name] = label
        return name

    def _part_label(self, source: str, block: Block) -> str:
        constant = self.constants[source]
        origin = self.constants.provenance(source)
        if origin is not None:
            key, shape, indices = origin
            found = block_of(indices[tuple(slice(start, stop) for start, stop in block)], shape)
            if found is not None:
                return key + suffix(found, shape)
        return self.label(source) + suffix(block, constant.shape)
