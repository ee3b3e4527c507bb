"""One ONNX operation to operator records, and to rows for what it holds inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from spectool.graph.onnx import products, quantised
from spectool.graph.onnx.convolution import conv_geometry, transposed_geometry
from spectool.graph.onnx.recurrent import GATES, recurrent
from spectool.graph.onnx.state import Operation, State
from spectool.graph.rules import ONNX_RULES
from spectool.graph.types import BatchNorm, Call, Conv, Embedding, Node, Value

Translator = Callable[[State, Operation], None]

_NORMS = {
    "LayerNormalization": ("layernorm", 1),
    "SimplifiedLayerNormalization": ("rmsnorm", 1),
    "RMSNormalization": ("rmsnorm", 1),
    "SkipLayerNormalization": ("layernorm", 2),
    "SkipSimplifiedLayerNormalization": ("rmsnorm", 2),
    "EmbedLayerNormalization": ("layernorm", 5),
    "InstanceNormalization": ("instancenorm", 1),
    "GroupNormalization": ("groupnorm", 1),
    "GroupNorm": ("groupnorm", 1),
    "SkipGroupNorm": ("groupnorm", 1),
    "MeanVarianceNormalization": ("layernorm", 1),
}
"""Normalisations by statistics of their input: kind of row, position of the scale."""

# Nonlinear or integer operations of ONNX's own that may read a constant table without being a linear operator.
_NO_MATRIX_NAMES = (
    "PRelu Pow Max Min Mod BitShift Equal Greater Less GreaterOrEqual LessOrEqual And Or Xor Where Clip Range OneHot "
    "ScatterND ScatterElements Scatter TopK NonMaxSuppression Compress Unique IsNaN IsInf QuantizeLinear "
    "DequantizeLinear DynamicQuantizeLinear Add Sub Mul Div Sum Mean Concat Expand Tile Pad Slice Split Reshape "
    "Transpose Gather GatherND GatherElements Squeeze Unsqueeze Flatten Identity Cast CastLike Relu Sigmoid Tanh "
    "Softmax LogSoftmax BitwiseAnd BitwiseOr BitwiseXor Trilu RoiAlign MaxRoiPool SequenceConstruct SequenceInsert "
    "Erf Exp Log Sqrt Reciprocal Abs Neg Floor Ceil Round ReduceMax ReduceMin ReduceSum ReduceMean ReduceProd ArgMax "
    "ArgMin CumSum EyeLike Shape Size ConstantOfShape TensorScatter Attention"
)
_NO_MATRIX = frozenset(_NO_MATRIX_NAMES.split())


def translate(state: State, operation: Operation) -> None:
    """Append the nodes of one operation, and the rows of matrices that no node of its own carries."""
    if operation.domain == "":
        translator = _STANDARD.get(operation.kind)
    elif operation.domain == "com.microsoft":
        translator = _MICROSOFT.get(operation.kind)
    else:
        translator = None
    if translator is not None:
        translator(state, operation)
    elif operation.kind in _NORMS and operation.domain in ("", "com.microsoft"):
        _norm(state, operation)
    elif operation.full_name in ONNX_RULES:
        state.emit(operation.call())
    else:
        _unknown(state, operation)


def _conv(state: State, operation: Operation) -> None:
    weight, bias = operation.input(1), operation.input(2)
    if not state.constant(weight) or state.constant(operation.input(0)):
        state.emit(operation.boundary())
        return
    shape = state.constants[weight].shape
    transposed = operation.kind == "ConvTranspose"
    kind = f"{'conv_transpose' if transposed else 'conv'}{len(shape) - 2}d"
    reason = ""
    if not 3 <= len(shape) <= 5:
        reason = f"a convolution over {len(shape) - 2} axes is not supported"
    elif bias and not state.constant(bias):
        reason = "its bias is computed from data"
    elif not _makes_sense(operation, shape):
        reason = "its strides, dilations or groups make no sense"
    if reason:
        state.skip(operation, weight, kind, reason)
        state.emit(operation.boundary(reason))
        return
    before = state.shape(operation.input(0))
    size = before[2:] if before is not None else None
    make = transposed_geometry if transposed else conv_geometry
    geometry = make(operation.attributes, shape[2:], size)
    if geometry is None:
        reason = "its padding depends on an input size that is not known"
        state.unsized.append(operation.name)
        state.skip(operation, weight, kind, reason)
        state.emit(operation.boundary(reason))
        return
    state.emit(Node(operation.name, Conv(geometry), operation.inputs, operation.outputs))


def _makes_sense(operation: Operation, weight: tuple[int, ...]) -> bool:
    """Return whether a convolution can be applied at all."""
    group = operation.attributes.get("group", 1)
    steps = (*operation.attributes.get("strides", ()), *operation.attributes.get("dilations", ()), group)
    return min(weight) > 0 and min(steps) > 0 and weight[0] % group == 0


def _fused_conv(state: State, operation: Operation) -> None:
    """Translate ONNX Runtime's ``FusedConv``: a convolution, perhaps a sum, an activation."""
    inner = f"{operation.name}#conv"
    state.values[inner] = Value(inner, state.shape(operation.name), state.dtype(operation.name))
    _conv(state, replace(operation, kind="Conv", domain="", inputs=operation.inputs[:3], outputs=(inner,)))
    source = inner
    if operation.input(3):
        source = f"{operation.name}#sum"
        state.values[source] = Value(source, state.shape(operation.name), state.dtype(operation.name))
        state.emit(Node(source, Call("onnx.Add", {}, 14), (inner, operation.input(3)), (source,)))
    state.emit(replace(operation, inputs=(source,)).boundary())


def _batch_norm(state: State, operation: Operation) -> None:
    statistics = operation.inputs[1:5]
    attributes = operation.attributes
    reason = ""
    if attributes.get("training_mode"):
        reason = "it normalises by statistics of its input (training mode)"
    elif not all(state.constant(name) for name in statistics) or len(statistics) < 4:
        reason = "its statistics are computed from data"
    elif any(len(state.constants[name].shape) != 1 for name in statistics):
        reason = "its statistics are kept per position"
    if reason:
        state.skip(operation, operation.input(1), "batchnorm", reason, "nonlinear")
        state.emit(operation.boundary(reason))
        return
    op = BatchNorm(float(attributes.get("epsilon", 1e-5)))
    state.emit(Node(operation.name, op, operation.inputs[:5], operation.outputs[:1]))


def _gather(state: State, operation: Operation) -> None:
    table, indices = operation.input(0), operation.input(1)
    if not state.constant(table) or state.constant(indices):
        state.emit(operation.call())
        return
    constant = state.constants[table]
    if not constant.dtype.startswith(("float", "bfloat")) or len(constant.shape) < 2 or constant.numel < 2:
        state.emit(operation.boundary())
    elif len(constant.shape) == 2 and int(operation.attributes.get("axis", 0)) in (0, -2):
        state.emit(Node(operation.name, Embedding(), (indices, table), operation.outputs))
    else:
        reason = f"a look-up in a table of shape {'x'.join(map(str, constant.shape))} is not analysed"
        state.skip(operation, table, "embedding", reason)
        state.emit(operation.boundary())


def _dropout(state: State, operation: Operation) -> None:
    mode = operation.input(2)
    training = state.constants.small(mode) if mode else None
    ratio = state.constants.small(operation.input(1)) if operation.input(1) else None
    active = (
        bool(mode) and (training is None or bool(training)) and not (ratio is not None and float(ratio) == 0)
    )
    state.emit(operation.boundary() if active else operation.call())


def _scatter(state: State, operation: Operation) -> None:
    reduction = operation.attributes.get("reduction", "none")
    linear = reduction in ("none", "add", b"none", b"add")
    state.emit(operation.call() if linear else operation.boundary())


def _resize(state: State, operation: Operation) -> None:
    antialias = bool(operation.attributes.get("antialias"))
    state.emit(operation.boundary("antialiased resizing is not supported") if antialias else operation.call())


def _norm(state: State, operation: Operation) -> None:
    kind, position = _NORMS[operation.kind]
    if operation.kind == "EmbedLayerNormalization":
        for table in operation.inputs[2:5]:
            if table and state.constant(table):
                state.attach_matrix(operation, table, "embedding", transposed=True)
    scale = operation.input(position)
    if scale and state.constant(scale):
        reason = "it divides by a statistic of its input, so it is not linear"
        state.skip(operation, scale, kind, reason, "nonlinear")
    state.emit(operation.boundary())


def _unknown(state: State, operation: Operation) -> None:
    """Make a boundary; where it holds a matrix and is not known to be harmless, say that it was skipped."""
    if operation.domain or operation.kind not in _NO_MATRIX:
        for name in operation.inputs:
            if state.is_matrix(name):
                state.skip(operation, name, "linear", f"no rule for the operation {operation.full_name}")
                break
    state.emit(operation.boundary())


def _packed_attention(state: State, operation: Operation) -> None:
    weight = operation.input(3 if operation.kind == "QAttention" else 1)
    if state.is_matrix(weight):
        state.skip(
            operation, weight, "linear", "its query, key and value weights are packed into one operation"
        )
    state.emit(operation.boundary())


_STANDARD: Mapping[str, Translator] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "BatchNormalization": _batch_norm,
    "MatMul": products.matmul,
    "Gemm": products.gemm,
    "Einsum": products.einsum,
    "Gather": _gather,
    "Dropout": _dropout,
    "Resize": _resize,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
    "QLinearConv": quantised.qlinear_conv,
    "QLinearMatMul": quantised.qlinear_matmul,
    "ConvInteger": quantised.conv_integer,
    "MatMulInteger": quantised.matmul_integer,
    **dict.fromkeys(GATES, recurrent),
}

_MICROSOFT: Mapping[str, Translator] = {
    "FusedConv": _fused_conv,
    "FusedMatMul": products.fused_matmul,
    "FusedGemm": products.fused_gemm,
    "MatMulNBits": quantised.matmul_nbits,
    "DynamicQuantizeMatMul": quantised.dynamic_quantize_matmul,
    "MatMulIntegerToFloat": quantised.matmul_integer_to_float,
    "QGemm": quantised.qgemm,
    "Attention": _packed_attention,
    "QAttention": _packed_attention,
}
