"""ONNX products with constants: MatMul, Gemm, Einsum, and the fused forms of ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spectool.graph.onnx.state import Operation, State
from spectool.graph.types import Call, Linear, Node, Value


def matmul(state: State, operation: Operation) -> None:
    """Translate ``MatMul``: a constant matrix on either side is a linear layer, a stack of them a product."""
    left, right = operation.input(0), operation.input(1)
    if state.constant(left) == state.constant(right):
        state.emit(operation.boundary())
        return
    weight, x = (left, right) if state.constant(left) else (right, left)
    shape = state.constants[weight].shape
    if len(shape) > 2 and all(size == 1 for size in shape[:-2]) and len(state.shape(x) or ()) >= len(shape):
        weight = _reshaped(state, weight, shape[-2:])
        shape = shape[-2:]
    if len(shape) == 1 and weight == right:
        # x @ w is one number per row; the matrix keeps the axis that ONNX drops.
        _column(state, operation, x, weight)
        return
    if len(shape) != 2 or (weight == right and not _rank(state, x)):
        state.emit(operation.call() if shape else operation.boundary("it multiplies by a single number"))
        return
    if weight == right or state.constant(right):
        op = Linear(transposed=True)
    elif _rank(state, x) == 1:
        op = Linear()
    else:
        op = Linear(axis=-2)
    state.emit(Node(operation.name, op, (x, weight), operation.outputs))


def gemm(state: State, operation: Operation) -> None:
    """Translate ``Gemm``: alpha·op(A)·op(B) + beta·C with A or B constant. beta only scales the bias."""
    a, b, c = operation.input(0), operation.input(1), operation.input(2)
    alpha = float(operation.attributes.get("alpha", 1.0))
    beta = float(operation.attributes.get("beta", 1.0))
    trans_a = bool(operation.attributes.get("transA", 0))
    trans_b = bool(operation.attributes.get("transB", 0))
    if state.constant(a) == state.constant(b):
        state.emit(operation.boundary())
        return
    if state.constant(b):
        x, weight, flip = a, b, trans_a
        op = Linear(transposed=not trans_b, alpha=alpha)
    else:
        x, weight, flip = b, a, trans_b
        op = Linear(transposed=trans_a, alpha=alpha, axis=-2)
    if len(state.constants[weight].shape) != 2:
        state.emit(operation.boundary("its constant is no matrix"))
        return
    if flip:
        x = _transposed(state, operation, x)
    if c and not state.constant(c):
        product = f"{operation.name}#product"
        state.values[product] = _like(state, operation.name, product)
        state.emit(Node(product, op, (x, weight), (product,)))
        if beta != 1.0:
            c = _scaled(state, operation, c, beta)
        state.emit(Node(operation.name, Call("onnx.Add", {}, 14), (product, c), operation.outputs))
        return
    bias = (c,) if c and beta == 1.0 else ()
    state.emit(Node(operation.name, op, (x, weight, *bias), operation.outputs))


def einsum(state: State, operation: Operation) -> None:
    """Translate ``Einsum``: over a constant matrix and the last axis it is a linear layer."""
    flowing = [name for name in operation.inputs if name and not state.constant(name)]
    if len(flowing) != 1:
        state.emit(operation.boundary())
        return
    plain = _as_linear(state, operation, flowing[0])
    state.emit(plain if plain is not None else operation.call())


def fused_matmul(state: State, operation: Operation) -> None:
    """Translate ONNX Runtime's ``FusedMatMul`` with a constant matrix on the right."""
    attributes = operation.attributes
    x, weight = operation.input(0), operation.input(1)
    turned = any(attributes.get(name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    if state.constant(weight) and len(state.constants[weight].shape) == 2 and not turned:
        op = Linear(not attributes.get("transB", 0), float(attributes.get("alpha", 1.0)))
        state.emit(Node(operation.name, op, (x, weight), operation.outputs))
        return
    _skip_fused(state, operation)


def fused_gemm(state: State, operation: Operation) -> None:
    """Translate ONNX Runtime's ``FusedGemm``: a Gemm and an activation."""
    inner = f"{operation.name}#linear"
    state.values[inner] = _like(state, operation.name, inner)
    gemm(state, replace(operation, kind="Gemm", domain="", outputs=(inner,)))
    state.emit(replace(operation, inputs=(inner,)).boundary())


def _scaled(state: State, operation: Operation, name: str, factor: float) -> str:
    """Return the name of a multiple of a value that flows."""
    number, result = f"{operation.name}#beta", f"{operation.name}#bias"
    dtype = state.dtype(name) or "float32"
    state.constants.compute(number, [], (), dtype, lambda: np.asarray(factor, np.dtype(dtype)))
    state.values[result] = replace(state.values[name], name=result)
    state.emit(Node(result, Call("onnx.Mul", {}, 14), (name, number), (result,)))
    return result


def _skip_fused(state: State, operation: Operation) -> None:
    for name in operation.inputs:
        if state.is_matrix(name):
            state.skip(
                operation, name, "linear", f"{operation.full_name} with these attributes is not analysed"
            )
            break
    state.emit(operation.boundary())


def _as_linear(state: State, operation: Operation, x: str) -> Node | None:
    """Return the linear layer that an einsum is, or None if it is another contraction."""
    equation = str(operation.attributes.get("equation", "")).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    parts = terms.split(",")
    if not arrow or len(parts) != 2 or len(operation.inputs) != 2:
        return None
    if any(len(set(term)) != len(term) for term in (*parts, result)):
        return None
    at = operation.inputs.index(x)
    data, matrix = parts[at], parts[1 - at]
    weight = operation.inputs[1 - at]
    if len(matrix) != 2 or "." in matrix or not data or not result:
        return None
    summed, kept = data[-1], result[-1]
    if set(matrix) != {summed, kept} or data[:-1] != result[:-1] or kept in data or summed in result:
        return None
    return Node(operation.name, Linear(transposed=matrix == summed + kept), (x, weight), operation.outputs)


def _column(state: State, operation: Operation, x: str, weight: str) -> None:
    size = state.constants[weight].shape[0]
    column = _reshaped(state, weight, (size, 1))
    product = f"{operation.name}#product"
    shape = state.shape(x)
    state.values[product] = Value(product, None if shape is None else (*shape[:-1], 1), state.dtype(x))
    state.emit(Node(product, Linear(transposed=True), (x, column), (product,)))
    squeeze = Call("onnx.Squeeze", {"axes": (-1,)}, 11)
    state.emit(Node(operation.name, squeeze, (product,), operation.outputs))


def _reshaped(state: State, name: str, shape: tuple[int, ...]) -> str:
    new = f"{name}#{'x'.join(map(str, shape))}"
    if new not in state.constants:
        constant = state.constants[name]
        state.constants.compute(
            new, [name], shape, constant.dtype, lambda: state.constants.value(name).reshape(shape)
        )
        state.labels[new] = state.label(name)
    return new


def _transposed(state: State, operation: Operation, x: str) -> str:
    name = f"{operation.name}#transposed"
    shape = state.shape(x)
    state.values[name] = Value(name, None if shape is None else tuple(reversed(shape)), state.dtype(x))
    state.emit(Node(name, Call("onnx.Transpose", {"perm": (1, 0)}, 13), (x,), (name,)))
    return name


def _like(state: State, name: str, new: str) -> Value:
    return Value(new, state.shape(name), state.dtype(name))


def _rank(state: State, name: str) -> int | None:
    shape = state.shape(name)
    return None if shape is None else len(shape)
