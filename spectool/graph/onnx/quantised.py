"""Integer products: the float operator they stand for, from weights dequantised as the file says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from spectool.graph.onnx.convolution import conv_geometry
from spectool.graph.onnx.evaluate import Array
from spectool.graph.onnx.state import Operation, State
from spectool.graph.types import Call, Conv, Linear, Node, Opaque, Region

ASSUMED = ("dequantised weights",)


def qlinear_conv(state: State, operation: Operation) -> None:
    """Explain ``QLinearConv``: x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias."""
    _attach_conv(state, operation, operation.input(3), operation.input(4), operation.input(5))


def conv_integer(state: State, operation: Operation) -> None:
    """Explain ``ConvInteger``: x, w, x_zero, w_zero; the scale is found in the product that follows."""
    state.emit(operation.boundary())
    state.integer_products[operation.name] = operation.attributes


def qlinear_matmul(state: State, operation: Operation) -> None:
    """Explain ``QLinearMatMul``: a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero."""
    _attach_matrix(state, operation, operation.input(3), operation.input(4), operation.input(5))


def matmul_integer(state: State, operation: Operation) -> None:
    """Explain ``MatMulInteger``: a, b, a_zero, b_zero; the scale is found in the product that follows."""
    state.emit(operation.boundary())
    state.integer_products[operation.name] = operation.attributes


def dynamic_quantize_matmul(state: State, operation: Operation) -> None:
    """Explain ONNX Runtime's ``DynamicQuantizeMatMul``: a, b, b_scale, b_zero, bias."""
    _attach_matrix(state, operation, operation.input(1), operation.input(2), operation.input(3))


def matmul_integer_to_float(state: State, operation: Operation) -> None:
    """Explain ONNX Runtime's ``MatMulIntegerToFloat``: a, b, a_scale, b_scale, a_zero, b_zero, bias."""
    _attach_matrix(state, operation, operation.input(1), operation.input(3), operation.input(5))


def qgemm(state: State, operation: Operation) -> None:
    """Explain ONNX Runtime's ``QGemm``: a, a_scale, a_zero, b, b_scale, b_zero, then the bias."""
    flip = bool(operation.attributes.get("transB", 0))
    _attach_matrix(
        state, operation, operation.input(3), operation.input(4), operation.input(5), transposed=not flip
    )


def matmul_nbits(state: State, operation: Operation) -> None:
    """Translate ONNX Runtime's ``MatMulNBits``: a, b, scales, zero_points, g_idx, bias.

    Its weight is (n, blocks, bytes per block), low bits first, one scale per row and block.
    """
    packed, scales, zeros = operation.input(1), operation.input(2), operation.input(3)
    attributes = operation.attributes
    columns, rows = int(attributes.get("K", 0)), int(attributes.get("N", 0))
    bits, block = int(attributes.get("bits", 4)), int(attributes.get("block_size", 0))
    known = all(state.constant(name) for name in (packed, scales)) and (not zeros or state.constant(zeros))
    if not known or operation.input(4) or bits not in (2, 4, 8) or min(rows, columns, block) < 1:
        state.skip(
            operation, packed, "linear", f"its {bits}-bit weights are packed in a way that is not known"
        )
        state.emit(operation.boundary())
        return

    def weights() -> Array:
        value = state.constants.value
        levels = _unpack(value(packed).reshape(rows, -1), bits)
        count = -(-columns // block)
        grid = levels.reshape(rows, count, -1)[:, :, :block].astype(np.float32)
        if not zeros:
            offset = np.full((rows, count), float(1 << (bits - 1)), np.float32)
        elif value(zeros).dtype == np.uint8:
            offset = _unpack(value(zeros).reshape(rows, -1), bits)[:, :count].astype(np.float32)
        else:
            offset = value(zeros).reshape(rows, count).astype(np.float32)
        scale = value(scales).reshape(rows, count).astype(np.float32)
        dense = (grid - offset[:, :, None]) * scale[:, :, None]
        return np.ascontiguousarray(dense.reshape(rows, count * block)[:, :columns])

    name = _computed(state, operation, packed, scales, (rows, columns), weights)
    bias = operation.input(5)
    inputs = (operation.input(0), name, *([bias] if bias else []))
    state.emit(Node(operation.name, Linear(), inputs, operation.outputs))


def resolve_integer_products(state: State) -> None:
    """Find the scales of integer products: a later product with (x scale · constant) holds the weight's.

    What has no such product is skipped with that reason.
    """
    users: dict[str, list[Node]] = {}
    for node in state.nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    pending = [
        (node, node.op.name.partition(".")[2])
        for node in state.nodes
        if isinstance(node.op, Opaque) and node.name in state.integer_products
    ]
    for node, kind in pending:
        operation = Operation(kind, "", 0, state.integer_products[node.name], node.inputs, node.outputs)
        weight, zero = operation.input(1), operation.input(3)
        scale = _following_scale(state, users, node.outputs[0])
        word = "linear" if kind == "MatMulInteger" else f"conv{len(state.shape(weight) or ()) - 2}d"
        if not state.constant(weight):
            continue
        if not scale:
            state.skip(operation, weight, word, "the scale of its integer weights is not in the file")
        elif kind == "MatMulInteger":
            _attach_matrix(state, operation, weight, scale, zero, emit=False)
        else:
            _attach_conv(state, operation, weight, scale, zero, emit=False)


def _following_scale(state: State, users: dict[str, list[Node]], name: str) -> str:
    """Return the constant scale of the weight in Cast → Mul(·, Mul(x_scale, w_scale)), empty if there is none."""
    for cast in users.get(name, ()):
        if not (isinstance(cast.op, Call) and cast.op.name == "onnx.Cast"):
            continue
        for product in users.get(cast.outputs[0], ()):
            if not (isinstance(product.op, Call) and product.op.name == "onnx.Mul"):
                continue
            other = next((source for source in product.inputs if source != cast.outputs[0]), "")
            if state.constant(other):
                return other
            maker = state.makers.get(other)
            if maker is not None and isinstance(maker.op, Call) and maker.op.name == "onnx.Mul":
                return next((source for source in maker.inputs if state.constant(source)), "")
    return ""


def _attach_matrix(
    state: State,
    operation: Operation,
    weight: str,
    scale: str,
    zero: str,
    *,
    transposed: bool = True,
    emit: bool = True,
) -> None:
    if emit:
        state.emit(operation.boundary())
    if not state.constant(weight):
        return
    shape = state.constants[weight].shape
    reason = _unknown(state, scale, zero)
    if reason or len(shape) != 2:
        state.skip(operation, weight, "linear", reason or f"its weight has {len(shape)} axes")
        return
    axis = 1 if transposed else 0
    name = _dequantised(state, operation, weight, scale, zero, axis)
    state.attach_matrix(operation, name, "linear", transposed=transposed)


def _attach_conv(
    state: State, operation: Operation, weight: str, scale: str, zero: str, *, emit: bool = True
) -> None:
    if emit:
        state.emit(operation.boundary())
    if not state.constant(weight):
        return
    shape = state.constants[weight].shape
    kind = f"conv{len(shape) - 2}d"
    reason = _unknown(state, scale, zero)
    if reason or not 3 <= len(shape) <= 5:
        state.skip(
            operation, weight, kind, reason or f"a convolution over {len(shape) - 2} axes is not supported"
        )
        return
    before, after = state.shape(operation.input(0)), state.shape(operation.name)
    geometry = conv_geometry(operation.attributes, shape[2:], before[2:] if before else None)
    if geometry is None or before is None or after is None or None in before[1:] or None in after[1:]:
        state.unsized.append(operation.name)
        state.skip(operation, weight, kind, "its input size cannot be inferred")
        return
    name = _dequantised(state, operation, weight, scale, zero, 0)
    weights, shapes = state.stored([weight])
    node = Node(operation.name, Conv(geometry), (operation.input(0), name), (operation.name,))
    state.explain(
        operation,
        Region(
            key=state.label(weight), level="layer", kind=kind, root=operation.input(0), exit=operation.name,
            nodes=(node,), weights=weights, weight_shapes=shapes,
            in_shape=tuple(size for size in before[1:] if size is not None),
            out_shape=tuple(size for size in after[1:] if size is not None),
            assumed=ASSUMED,
        ),
    )  # fmt: skip


def _unknown(state: State, scale: str, zero: str) -> str:
    if not state.constant(scale) or (zero and not state.constant(zero)):
        return "the scale of its integer weights is computed at run time"
    return ""


def _dequantised(state: State, operation: Operation, weight: str, scale: str, zero: str, axis: int) -> str:
    shape = state.constants[weight].shape

    def along(array: Array) -> Array:
        flat = array.astype(np.float32).reshape(-1)
        return flat if flat.size == 1 else flat.reshape([-1 if i == axis else 1 for i in range(len(shape))])

    def compute() -> Array:
        levels = state.constants.value(weight).astype(np.float32)
        if zero:
            levels = levels - along(state.constants.value(zero))
        return np.asarray(levels * along(state.constants.value(scale)), np.float32)

    return _computed(state, operation, weight, scale, shape, compute)


def _computed(
    state: State,
    operation: Operation,
    weight: str,
    scale: str,
    shape: tuple[int, ...],
    compute: Callable[[], Array],
) -> str:
    name = f"{operation.name}#dequantised"
    state.constants.compute(name, [weight, scale], shape, "float32", compute)
    state.labels[name] = state.label(weight)
    state.assumed[name] = ASSUMED
    return name


def _unpack(packed: Array, bits: int) -> Array:
    """Return the integers that are packed into bytes along the last axis, lowest bits first."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    spread = (packed.view(np.uint8)[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return spread.reshape(*packed.shape[:-1], -1)
