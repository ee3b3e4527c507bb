"""Run the nodes of a region as torch code, for any batch, type and device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from spectool.errors import OperatorError
from spectool.graph.types import BatchNorm, Call, Conv, Embedding, Linear, Node, Opaque, Region

if TYPE_CHECKING:
    from torch import Tensor

    from spectool.lower.onnx2torch_route import Route

Load = Callable[[str], torch.Tensor]
Arguments = Sequence["Tensor | None"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PAD_MODE = {"zeros": "constant", "circular": "circular", "reflect": "reflect", "replicate": "replicate"}


@singledispatch
def execute(op: object, arguments: Arguments) -> Tensor | tuple[Tensor, ...]:
    """Apply one operator record to tensors with their batch axis.

    Args:
        op: Operator record of ``graph.types``.
        arguments: What the node reads; None where an optional input is absent.

    Raises:
        OperatorError: If the operation cannot be replayed.
    """
    raise OperatorError(f"no way to replay {type(op).__name__}")


@execute.register(Opaque)
def _(op: Opaque, arguments: Arguments) -> Tensor:
    raise OperatorError(f"{op.name} is not affine and cannot be replayed")


@execute.register(Conv)
def _(op: Conv, arguments: Arguments) -> Tensor:
    x, weight, *rest = arguments
    if x is None or weight is None:
        raise OperatorError("a convolution needs an input and a weight")
    weight = _numbers(weight, x)
    bias = rest[0] if rest else None
    g = op.geometry
    if g.transposed:
        # Crop explicitly: torch's own `padding` is symmetric and its output_padding must stay below the stride.
        y: Tensor = _CONV_TRANSPOSE[g.dims](x, weight, None, g.stride, 0, 0, g.groups, g.dilation)
        extra = g.output_padding or (0,) * g.dims
        crop = [(-low, more - high) for (low, high), more in zip(g.padding, extra, strict=True)]
        y = F.pad(y, [side for pair in reversed(crop) for side in pair])
        return y if bias is None else y + bias.reshape(-1, *(1,) * g.dims)
    flat = [side for pair in reversed(g.padding) for side in pair]
    if any(flat):
        x = F.pad(x, flat, mode=_PAD_MODE[g.padding_mode])
    return _CONV[g.dims](x, weight, bias, g.stride, 0, g.dilation, g.groups)


@execute.register(Linear)
def _(op: Linear, arguments: Arguments) -> Tensor:
    x, weight, *rest = arguments
    if x is None or weight is None:
        raise OperatorError("a linear layer needs an input and a weight")
    weight = _numbers(weight, x)
    bias = rest[0] if rest else None
    if op.axis == -2:
        matrix = weight.transpose(-1, -2) if op.transposed else weight
        y = torch.matmul(matrix, x)
    else:
        y = torch.matmul(x, weight if op.transposed else weight.transpose(-1, -2))
    if op.alpha != 1.0:
        y = op.alpha * y
    return y if bias is None else y + bias


def _numbers(weight: Tensor, x: Tensor) -> Tensor:
    """Return a weight of integers as the numbers they are."""
    return weight.to(x.dtype) if not (weight.is_floating_point() or weight.is_complex()) else weight


@execute.register(BatchNorm)
def _(op: BatchNorm, arguments: Arguments) -> Tensor:
    x, gamma, beta, mean, var = (*arguments, None, None, None, None)[:5]
    if x is None or mean is None or var is None:
        raise OperatorError("a batch norm in evaluation mode needs running statistics")
    shape = [1] * x.dim()
    shape[op.axis] = -1
    scale = torch.rsqrt(var + op.eps)
    if gamma is not None:
        scale = gamma * scale
    y = (x - mean.reshape(shape)) * scale.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


@execute.register(Embedding)
def _(op: Embedding, arguments: Arguments) -> Tensor:
    raise OperatorError("an embedding reads integers; its matrix is analysed instead")


@execute.register(Call)
def _(op: Call, arguments: Arguments) -> Tensor | tuple[Tensor, ...]:
    domain = op.name.partition(".")[0]
    if domain == "onnx":
        from spectool.lower.onnx_ops import OPS

        function = OPS.get(op.name)
        if function is None:
            raise OperatorError(f"no way to replay {op.name}")
        result: Tensor | tuple[Tensor, ...] = function(list(arguments), dict(op.attributes), op.opset)
        return result
    if domain == "aten":
        from spectool.graph.aten import call

        working = next((x.dtype for x in arguments if x is not None and x.is_floating_point()), None)
        try:
            made: Tensor | tuple[Tensor, ...] = call(op, arguments, dtype=working)
        except (RuntimeError, NotImplementedError) as error:
            raise OperatorError(f"{op.name} cannot be replayed ({str(error).splitlines()[0]})") from error
        return made
    raise OperatorError(f"no way to replay {op.name}")


def constant_names(region: Region) -> tuple[str, ...]:
    """Return the names of the constants that a region reads, in the order it first reads them."""
    flowing = {region.root, *(name for node in region.nodes for name in node.outputs)}
    seen: dict[str, None] = {}
    for node in region.nodes:
        for name in node.inputs:
            if name and name not in flowing:
                seen[name] = None
    return tuple(seen)


def remake_region(region: Region, load: Load) -> Callable[[torch.dtype, Any], Callable[[Tensor], Tensor]]:
    """Return a maker of the region's function, affine on ``(b, *in_shape)``, for a type and a device.

    Constants are read once per (type, device). Samples are run one at a time under ``torch.vmap``, so that
    shapes that the graph hard-codes for a batch of one stay right.

    Args:
        region: What to replay.
        load: Reads a constant by name.
    """
    names = constant_names(region)

    def remake(dtype: torch.dtype, device: Any) -> Callable[[Tensor], Tensor]:
        constants: dict[str, Tensor] = {}
        for name in names:
            value = load(name)
            # Integers are shapes, axes and indices: they steer the replay and stay where Python reads them.
            constants[name] = value.to(device=device, dtype=dtype) if value.is_floating_point() else value

        routes: dict[str, Route] = {}

        def one(x: Tensor) -> Tensor:
            values = {region.root: x.unsqueeze(0) if region.batched else x}
            run(region.nodes, values, constants, routes)
            y = values[region.exit]
            return y.squeeze(0) if region.batched else y

        batched: Callable[[Tensor], Tensor] = torch.func.vmap(one)

        def attempt(x: Tensor) -> Tensor:
            try:
                return batched(x)
            except OperatorError:
                if routes or not any(_is_onnx(node) for node in region.nodes):
                    raise
            routes.update(_second_routes(region, constants, x))
            return batched(x)

        return attempt

    return remake


def _is_onnx(node: Node) -> bool:
    return isinstance(node.op, Call) and node.op.name.startswith("onnx.")


def _second_routes(region: Region, constants: Mapping[str, Tensor], like: Tensor) -> dict[str, Route]:
    """Return what onnx2torch makes of the nodes of a region that have no implementation here."""
    from spectool.lower.onnx2torch_route import prepare

    shape = (1, *like.shape[1:]) if region.batched else like.shape[1:]
    zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
    return prepare(region.nodes, {region.root: zeros}, constants, execute)


def run(
    nodes: Sequence[Node],
    values: dict[str, Tensor],
    constants: Mapping[str, Tensor],
    routes: Mapping[str, Route] | None = None,
) -> None:
    """Execute nodes in order, adding what they write to ``values``.

    Args:
        nodes: What to execute.
        values: What flows; grows.
        constants: Everything else that the nodes read.
        routes: First output of a node → function to run in its place.

    Raises:
        OperatorError: If a node cannot be replayed; the message names it.
    """
    for node in nodes:
        arguments = [
            None if not name else values[name] if name in values else constants[name] for name in node.inputs
        ]
        try:
            route = routes.get(node.outputs[0]) if routes else None
            result = route(arguments) if route is not None else execute(node.op, arguments)
        except OperatorError as error:
            raise OperatorError(f"{node.name or node.outputs[0]}: {error}", hint=error.hint) from error
        outputs = result if isinstance(result, tuple) else (result,)
        for name, tensor in zip(node.outputs, outputs, strict=False):
            if name:
                values[name] = tensor
