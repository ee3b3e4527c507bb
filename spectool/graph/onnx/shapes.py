"""Shapes and types of one node's outputs, by the inference that comes with onnx and a few rules of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import defs, helper, numpy_helper, shape_inference

from spectool.graph.onnx.constants import dtype_name, element_type
from spectool.graph.onnx.evaluate import Array
from spectool.graph.onnx.state import Dims, State

Type = tuple[str, Dims | None]
"""Element type and shape; an empty type and None where unknown."""

_FEW = 64
"""Entries of a tensor other than integers up to which inference gets to see them (scales of a resize)."""

# Fused operations of ONNX Runtime whose output has the shape and type of their first input.
_LIKE_FIRST_NAMES = (
    "Gelu BiasGelu FastGelu QuickGelu SkipLayerNormalization SkipSimplifiedLayerNormalization LayerNormalization "
    "SimplifiedLayerNormalization SkipGroupNorm GroupNorm RotaryEmbedding QLinearAdd QLinearMul QLinearSigmoid "
    "QLinearLeakyRelu Inverse Rfft BiasSoftmax BiasDropout"
)
_LIKE_FIRST = frozenset(_LIKE_FIRST_NAMES.split())
# Fused operations with the shapes of a plain one: that one and its attributes.
_LIKE_PLAIN: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "FusedConv": ("Conv", ("kernel_shape", "strides", "pads", "dilations", "group", "auto_pad")),
    "FusedGemm": ("Gemm", ("transA", "transB")),
}


def infer(state: State, node: Any, inputs: Sequence[str], version: int, ir_version: int) -> list[Type]:
    """Return type and shape of each output of a node.

    Args:
        state: What is known of its inputs.
        node: The node.
        inputs: Unique names of its inputs.
        version: Opset version of its domain.
        ir_version: IR version of the model.
    """
    unknown: list[Type] = [("", None)] * len(node.output)
    if node.domain == "com.microsoft":
        return _fused(state, node, inputs, unknown, ir_version)
    try:
        schema = defs.get_schema(node.op_type, version, node.domain)
    except defs.SchemaError:
        return unknown
    types = {}
    data = {}
    for raw, name in zip(node.input, inputs, strict=True):
        element = element_type(state.dtype(name)) if name else 0
        if element:
            types[raw] = helper.make_tensor_type_proto(element, state.shape(name))
            value = _given(state, name)
            if value is not None:
                data[raw] = numpy_helper.from_array(value, raw)
    try:
        found = shape_inference.infer_node_outputs(
            schema,
            node,
            types,
            data,
            opset_imports=[helper.make_opsetid(node.domain, version)],
            ir_version=ir_version,
        )
    except Exception:  # inference refuses what it cannot type; the rules behind treat it as unknown
        return unknown
    return [_type(found[name]) if name in found else ("", None) for name in node.output]


def _given(state: State, name: str) -> Array | None:
    """Return a value that inference may need: any few numbers, and integers, which may be sizes or axes."""
    if name in state.samples:
        return state.samples[name]
    if name not in state.constants:
        return None
    constant = state.constants[name]
    return (
        state.constants.small(name)
        if constant.numel <= _FEW or constant.dtype in ("int64", "int32")
        else None
    )


def declared(value: Any, sizes: Mapping[str, int]) -> Type:
    """Return what a ``ValueInfoProto`` states, named dimensions resolved."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return "", None
    element = dtype_name(kind.elem_type)
    if not kind.HasField("shape"):
        return element, None
    return element, tuple(
        dim.dim_value if dim.dim_value > 0 else sizes.get(dim.dim_param) for dim in kind.shape.dim
    )


def sample(state: State, node: Any, inputs: Sequence[str]) -> list[Array]:
    """Return a node's outputs in a run on zeros where it computes from small integers, else nothing.

    Some exporters compute sizes from integer inputs; inference needs a value for them.
    """
    names = [name for name in inputs if name]
    if not names or not any(name in state.samples for name in names):
        return []
    arrays = [
        None if not name else state.samples[name] if name in state.samples else state.constants.small(name)
        for name in inputs
    ]
    if any(name and array is None for name, array in zip(inputs, arrays, strict=True)):
        return []
    try:
        return state.constants.evaluator.run(node, arrays)
    except ValueError:
        return []


def _type(proto: Any) -> Type:
    if not proto.HasField("tensor_type"):
        return "", None
    kind = proto.tensor_type
    element = dtype_name(kind.elem_type)
    if not kind.HasField("shape"):
        return element, None
    # A negative size comes of pads that crop everything; onnx's own inference aborts on it further on.
    return element, tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in kind.shape.dim
    )


def _fused(
    state: State, node: Any, inputs: Sequence[str], unknown: list[Type], ir_version: int
) -> list[Type]:
    first = next((name for name in inputs if name), "")
    shape, dtype = state.shape(first), state.dtype(first)
    if node.op_type in _LIKE_FIRST:
        return [(dtype, shape), *unknown[1:]]
    if node.op_type in _LIKE_PLAIN:
        plain, kept = _LIKE_PLAIN[node.op_type]
        copy = onnx.NodeProto(op_type=plain, input=node.input[:3], output=node.output[:1])
        copy.attribute.extend(attribute for attribute in node.attribute if attribute.name in kept)
        return infer(state, copy, inputs[:3], 13, ir_version) + unknown[1:]
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "MatMulNBits" and shape is not None:
        return [(dtype, (*shape[:-1], attributes.get("N"))), *unknown[1:]]
    if node.op_type == "FusedMatMul" and len(inputs) > 1 and not attributes.get("transA"):
        right = state.shape(inputs[1])
        if shape is not None and right is not None and len(right) == 2:
            return [(dtype, (*shape[:-1], right[0 if attributes.get("transB") else 1])), *unknown[1:]]
    return unknown
