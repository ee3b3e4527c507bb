"""Walk an ONNX graph in order: fold what is constant, infer shapes, translate the rest, enter bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, TensorProto, helper, numpy_helper

from spectool.errors import GraphError
from spectool.graph.onnx.shapes import Type, declared, infer, sample
from spectool.graph.onnx.state import Dims, Operation, State
from spectool.graph.onnx.translate import translate
from spectool.graph.types import Node, Opaque, Value

_DEEPEST_BODY = 64
_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
# What attributes of a wrong type, missing inputs and sizes that make no sense turn into.
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_BRANCHES = {"then_branch": "then.", "else_branch": "else."}
_LARGEST_DENSE = 1 << 26
_CONSTANT_VALUES = ("value", "value_float", "value_floats", "value_int", "value_ints", "sparse_value")


@dataclass
class Walk:
    """One walk over a model.

    Attributes:
        state: What is known; grows.
        versions: Domain → opset version.
        ir_version: IR version of the model.
        sizes: Named dimension → size.
        taken: Unique names in use.
        keys: id of a stored tensor in the model → its checkpoint key.
        repeated: Name that is in use → the next number that makes a new one of it.
    """

    state: State
    versions: Mapping[str, int]
    ir_version: int
    sizes: Mapping[str, int]
    taken: set[str] = field(default_factory=set)
    keys: Mapping[int, str] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)

    def graph(
        self, proto: GraphProto, scope: dict[str, str], prefix: str = "", depth: int = 0, *, top: bool = False
    ) -> list[str]:
        """Walk a graph or body whose inputs are in ``scope`` already; return unique names of its outputs.

        Args:
            proto: The graph.
            scope: Names as written → unique names, outer ones included; grows.
            prefix: What the checkpoint puts before the names of this body's tensors.
            depth: How many bodies this one lies in.
            top: Whether this is the model's graph, whose initializers are in ``scope``, too.

        Raises:
            GraphError: If the graph cannot be followed.
        """
        if depth > _DEEPEST_BODY:
            raise GraphError(f"control flow is nested more than {_DEEPEST_BODY} deep")
        if not top:
            self.stored(proto, scope, prefix)
        stated = {value.name: value for value in (*proto.value_info, *proto.output)}
        for node in proto.node:
            try:
                self._node(node, scope, stated, prefix, depth)
            except _MALFORMED as error:
                what = f"{node.op_type} {node.name!r}"
                raise GraphError(f"{what} is malformed ({type(error).__name__}: {error})") from error
        return [self._resolve(value.name, scope, "the graph's outputs") for value in proto.output]

    def stored(self, proto: GraphProto, scope: dict[str, str], prefix: str = "") -> None:
        """Add the initializers of a graph to the constants."""
        for tensor in proto.initializer:
            name = scope[tensor.name] = self.unique(tensor.name, prefix)
            self.state.constants.store(name, tensor, self._key(tensor, tensor.name, prefix))
        for sparse in proto.sparse_initializer:
            raw = sparse.values.name
            name = scope[raw] = self.unique(raw, prefix)
            self.state.constants.store_array(name, _dense(sparse), self._key(sparse, raw, prefix))

    def _key(self, tensor: Any, raw: str, prefix: str) -> str:
        """Return the checkpoint key of a stored tensor; by its name where the model was rewritten on the way."""
        known = self.keys.get(id(tensor))
        if known is not None:
            return known
        tensors = self.state.constants.checkpoint.tensors
        return next((key for key in (f"{prefix}{raw}", raw) if key in tensors), f"{prefix}{raw}")

    def unique(self, raw: str | bytes, prefix: str) -> str:
        """Return a name that is not in use yet, ``raw`` itself if possible."""
        if isinstance(raw, bytes):  # what protobuf makes of a text that is none
            raise GraphError(f"the name {raw[:40]!r} in the model is no text")
        name = raw
        if name in self.taken:
            name = f"{prefix}{raw}"
        first = name
        number = self.repeated.get(first, 2)
        while name in self.taken:
            name, number = f"{first}~{number}", number + 1
        if name != first:
            self.repeated[first] = number
        self.taken.add(name)
        return name

    def value(self, name: str, kind: Type) -> None:
        """Record a value that flows."""
        dtype, shape = kind
        self.state.values[name] = Value(name, shape, dtype)

    def _resolve(self, raw: str, scope: Mapping[str, str], reader: str) -> str:
        if not raw:
            return ""
        if raw not in scope:
            raise GraphError(f"{reader} reads {raw!r}, which nothing before it writes")
        return scope[raw]

    def _node(
        self, node: Any, scope: dict[str, str], stated: Mapping[str, Any], prefix: str, depth: int
    ) -> None:
        where = f"{node.op_type} {node.name!r}"
        inputs = tuple(self._resolve(raw, scope, where) for raw in node.input)
        if node.op_type == "If" and not node.domain:
            self._if(node, inputs, scope, prefix, depth)
            return
        outputs = tuple(self.unique(raw, prefix) if raw else "" for raw in node.output)
        if not any(outputs):
            return
        if any(attribute.type in _GRAPHS for attribute in node.attribute):
            self._loop(node, inputs, outputs, scope, prefix, depth)
        elif not self._constant(node, inputs, outputs, prefix):
            self._flow(node, inputs, outputs, stated)
        scope.update((raw, name) for raw, name in zip(node.output, outputs, strict=True) if raw)

    def _version(self, domain: str) -> int:
        return self.versions.get("" if domain == "ai.onnx" else domain, 1)

    def _constant(self, node: Any, inputs: Sequence[str], outputs: Sequence[str], prefix: str) -> bool:
        """Add the outputs of a node to the constants if they do not depend on the model's inputs."""
        state = self.state
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain:
            return False
        if node.op_type == "Constant":
            return self._stored_constant(node, outputs[0], prefix)
        if node.op_type in ("Shape", "Size") and inputs and not state.constant(inputs[0]):
            return self._known_shape(node, inputs[0], outputs[0])
        if not any(inputs) or not all(state.constant(name) for name in inputs if name):
            return False
        types = infer(state, node, inputs, self._version(""), self.ir_version)
        return state.constants.fold(node, inputs, outputs, types)

    def _stored_constant(self, node: Any, name: str, prefix: str) -> bool:
        constants = self.state.constants
        for attribute in node.attribute:
            if attribute.name not in _CONSTANT_VALUES:
                continue
            value = helper.get_attribute_value(attribute)
            match attribute.name:
                case "value":
                    if value.data_type == TensorProto.STRING:
                        return False
                    constants.store(name, attribute.t, self._key(attribute.t, node.output[0], prefix))
                case "sparse_value":
                    key = self._key(attribute.sparse_tensor, node.output[0], prefix)
                    constants.store_array(name, _dense(value), key)
                case _:
                    kind = np.float32 if "float" in attribute.name else np.int64
                    constants.store_array(
                        name, np.array(value, kind), self._key(attribute, node.output[0], prefix)
                    )
            return True
        return False

    def _known_shape(self, node: Any, source: str, output: str) -> bool:
        shape = self.state.shape(source)
        if shape is None:
            return False
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "Shape":
            shape = shape[slice(attributes.get("start", 0), attributes.get("end"))]
        sizes = [size for size in shape if size is not None]
        if len(sizes) < len(shape):
            return False
        value = np.array(sizes, np.int64)
        self.state.constants.put(
            output, value if node.op_type == "Shape" else np.array(value.prod(), np.int64)
        )
        return True

    def _flow(
        self, node: Any, inputs: tuple[str, ...], outputs: tuple[str, ...], stated: Mapping[str, Any]
    ) -> None:
        """Translate a node that depends on the model's inputs."""
        state = self.state
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = self._version(domain)
        types = infer(state, node, inputs, version, self.ir_version)
        for name, value in zip(outputs, sample(state, node, inputs), strict=False):
            if name and value.dtype.name in ("int64", "int32", "bool"):
                state.samples[name] = value
        for raw, name, kind in zip(node.output, outputs, types, strict=False):
            if not name:
                continue
            if kind[1] is None and raw in stated:
                stated_type = declared(stated[raw], self.sizes)
                kind = (kind[0] or stated_type[0], stated_type[1])
            self.value(name, kind)
        attributes = _plain_attributes(node)
        translate(state, Operation(node.op_type, domain, version, attributes, inputs, outputs))

    def _if(self, node: Any, inputs: tuple[str, ...], scope: dict[str, str], prefix: str, depth: int) -> None:
        """Follow a branch whose condition is constant; else follow both, and start new roots behind them."""
        bodies = {name: (body, inner) for name, body, inner in self._bodies(node, prefix)}
        if not {"then_branch", "else_branch"} <= set(bodies):
            raise GraphError(f"If {node.name!r} has no two branches")
        branches = [bodies["then_branch"], bodies["else_branch"]]
        label = node.name or next(iter(node.output), "If")
        condition = self.state.constants.small(inputs[0])
        if condition is not None:
            chosen, (left_out, _) = branches if bool(condition.reshape(-1)[0]) else reversed(branches)
            if _holds_weights(left_out):
                self.state.notes.append(f"{label}: its condition is constant, so one branch is left out")
            branches = [chosen]
        found = [self.graph(body, dict(scope), inner, depth + 1) for body, inner in branches]
        if any(len(names) < len(node.output) for names in found):
            raise GraphError(f"If {label!r} has a branch with too few outputs")
        if condition is not None:
            scope.update(zip(node.output, found[0], strict=False))
            return
        outputs = [self.unique(raw, prefix) for raw in node.output]
        for name, sources in zip(outputs, zip(*found, strict=False), strict=False):
            self.value(name, self._either([self._type(source) for source in sources]))
        read = (inputs[0], *(name for names in found for name in names))
        self.state.emit(Node(outputs[0], Opaque("onnx.If"), read, tuple(outputs)))
        scope.update(zip(node.output, outputs, strict=True))

    def _loop(
        self,
        node: Any,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        scope: dict[str, str],
        prefix: str,
        depth: int,
    ) -> None:
        """Follow the bodies of a loop once; their inputs and the loop's outputs are new roots."""
        finals: list[str] = []
        for _, body, within in self._bodies(node, prefix):
            inner = dict(scope)
            names = [self.unique(value.name, within) for value in body.input]
            for name, value in zip(names, body.input, strict=True):
                inner[value.name] = name
                self.value(name, declared(value, self.sizes))
            if names:
                self.state.emit(Node(names[0], Opaque(f"onnx.{node.op_type}"), inputs, tuple(names)))
            finals += self.graph(body, inner, within, depth + 1)
        for name in outputs:
            if name:
                self.value(name, ("", None))
        self.state.emit(Node(outputs[0], Opaque(f"onnx.{node.op_type}"), (*inputs, *finals), outputs))

    def _bodies(self, node: Any, prefix: str) -> list[tuple[str, GraphProto, str]]:
        """Return attribute, body and prefix of every graph in a node; prefixes are those of checkpoint keys."""
        label = node.name or next(iter(node.output), node.op_type)
        found = []
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
            branch = _BRANCHES.get(attribute.name, "") if node.op_type == "If" else ""
            for body in bodies if attribute.type in _GRAPHS else []:
                found.append((attribute.name, body, f"{prefix}{label}.{branch}"))
        return found

    def _type(self, name: str) -> Type:
        return self.state.dtype(name), self.state.shape(name)

    @staticmethod
    def _either(types: Sequence[Type]) -> Type:
        """Return what is sure of a value that has one of some types."""
        (dtype, shape), *rest = types
        for other_dtype, other in rest:
            dtype = dtype if dtype == other_dtype else ""
            if shape is None or other is None or len(shape) != len(other):
                return dtype, None
            merged: Dims = tuple(a if a == b else None for a, b in zip(shape, other, strict=True))
            shape = merged
        return dtype, shape


def _plain_attributes(node: Any) -> dict[str, Any]:
    """Return the attributes that are numbers, texts or lists of them."""
    plain: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        match attribute.type:
            case AttributeProto.INT | AttributeProto.FLOAT:
                plain[attribute.name] = value
            case AttributeProto.INTS | AttributeProto.FLOATS:
                plain[attribute.name] = tuple(value)
            case AttributeProto.STRING:
                plain[attribute.name] = value.decode("utf-8", "replace")
            case AttributeProto.STRINGS:
                plain[attribute.name] = tuple(text.decode("utf-8", "replace") for text in value)
    return plain


def _holds_weights(graph: GraphProto) -> bool:
    tensors = [*graph.initializer]
    tensors += [a.t for node in graph.node for a in node.attribute if a.type == AttributeProto.TENSOR]
    if any(len(tensor.dims) >= 2 for tensor in tensors):
        return True
    return any(
        _holds_weights(a.g) for node in graph.node for a in node.attribute if a.type == AttributeProto.GRAPH
    )


def _dense(sparse: Any) -> np.ndarray:
    """Return a sparse tensor as an array.

    Raises:
        GraphError: If it contradicts itself, or would be very large.
    """
    try:
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        count = prod(sparse.dims)
        if count > _LARGEST_DENSE:
            raise GraphError(f"the sparse tensor {sparse.values.name!r} would have {count} entries")
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
    except _MALFORMED as error:
        raise GraphError(f"the sparse tensor {sparse.values.name!r} is malformed ({error})") from error
    return dense
