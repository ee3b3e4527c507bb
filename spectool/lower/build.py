"""Choose how a region becomes a linear map: a closed form where a rule exists, replay otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch

from spectool.errors import OperatorError
from spectool.graph.types import BatchNorm, Conv, Embedding, Linear, Node, Region
from spectool.linear import (
    Composed,
    ConvMap,
    DiagonalMap,
    FunctionMap,
    InfiniteConv,
    LinearMap,
    MatrixMap,
    identity,
)
from spectool.linear.memory import check_memory, enough_memory
from spectool.linear.scaling import largest
from spectool.lower.replay import Load, constant_names, remake_region, run
from spectool.lower.separable import may_separate, separable_map
from spectool.lower.structure import is_neutral, is_structural, zero_padding

if TYPE_CHECKING:
    from torch import Tensor

_FADING = 2.0**-960
"""Size below which products of float64 numbers are kept as factors: digits 53 places down leave its normal range."""


@enough_memory()
def lower(
    region: Region,
    load: Load,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LinearMap | InfiniteConv:
    """Turn a region into a linear map.

    A chain of convolutions, batch norms, linear layers, pools and pads gets closed forms, with batch norms
    folded into the weights in float64; a lone operator between reshapes is that operator, whose singular values
    reshapes do not change. Everything else is replayed by autograd.

    Args:
        region: What to lower. With ``in_shape`` None only a convolution, a matrix or a batch norm can be.
        load: Reads a constant by name.
        dtype: Arithmetic type of the map.
        device: Device of its vectors.

    Returns:
        The map, or an ``InfiniteConv`` for a convolution of unknown size.

    Raises:
        OperatorError: If no rule exists and the region cannot be replayed, or if it is too large.
    """
    check_memory("an operator", device, region.in_shape or (), region.out_shape or ())
    closed = _closed_form(region, load, dtype, device)
    if closed is not None:
        return closed
    if region.in_shape is None:
        raise OperatorError(f"{region.key}: no rule for {region.kind} of unknown input size")
    function = remake_region(region, load)
    constants = (load(name) for name in constant_names(region))
    return FunctionMap(
        function(dtype, device),
        region.in_shape,
        dtype=dtype,
        device=device,
        remake=function,
        identity=identity(constants, repr([(type(node.op).__name__, node.inputs) for node in region.nodes])),
    )


def without_epsilon(region: Region) -> Region:
    """Return the region with every batch norm's eps set to 0, whose spectrum bounds that of any eps."""
    nodes = tuple(
        replace(node, op=replace(node.op, eps=0.0)) if isinstance(node.op, BatchNorm) else node
        for node in region.nodes
    )
    return replace(region, nodes=nodes)


def chain_parts(region: Region) -> list[Node] | None:
    """Return the nodes of a chain that do more than rearrange or shift, in order; None for a region with branches."""
    chain = _chain(region)
    return None if chain is None else [node for node in chain if not is_structural(node, region)]


def _chain(region: Region) -> list[Node] | None:
    """Return the nodes if each reads only the one before it, else None."""
    previous = region.root
    flowing = {region.root, *(name for node in region.nodes for name in node.outputs)}
    for node in region.nodes:
        if [name for name in node.inputs if name in flowing] != [previous] or not node.outputs:
            return None
        previous = node.outputs[0]
    return list(region.nodes) if previous == region.exit else None


def _closed_form(
    region: Region, load: Load, dtype: torch.dtype, device: torch.device | str
) -> LinearMap | InfiniteConv | None:
    """Return the region as a product of closed forms, or None if it is no chain of operators with a rule."""
    chain = _chain(region)
    if not chain:
        return None
    free = [is_structural(node, region) for node in chain]
    if all(free):
        return None
    first, last = free.index(False), len(free) - 1 - free[::-1].index(False)
    core = chain[first : last + 1]
    # A rearrangement between two operators does change their product; a bias there does not.
    if any(is_structural(node, region) and not is_neutral(node, region) for node in core):
        return None
    working = [node for node in core if not is_structural(node, region)]
    shape = _shape_after(chain[:first], region, load)
    if all(isinstance(node.op, Linear) and node.op.axis == -1 for node in working) and shape:
        shape = shape[-1:]  # the same matrix at every position
    pieces = _pieces(working, shape, region.batched, load, dtype, device)
    if not pieces:
        return None
    if len(pieces) == 1:
        result = pieces[0]
    else:
        maps = [piece for piece in pieces if not isinstance(piece, InfiniteConv)]
        result = Composed(*reversed(maps))
    positions = all(isinstance(node.op, (Linear, Embedding)) for node in working)
    if isinstance(result, InfiniteConv) or positions or region.out_shape is None:
        return result
    # Anything that enlarged the value on the way (a broadcasting bias) shows in the number of outputs.
    return result if prod(result.out_shape) == prod(region.out_shape) else None


def _shape_after(nodes: Sequence[Node], region: Region, load: Load) -> tuple[int, ...] | None:
    """Return the shape, without the batch axis, that leading rearrangements give the region's input."""
    if region.in_shape is None or not nodes:
        return region.in_shape
    values = {
        region.root: torch.zeros(1, *region.in_shape) if region.batched else torch.zeros(region.in_shape)
    }
    constants = {name: load(name) for name in constant_names(replace(region, nodes=tuple(nodes)))}
    run(nodes, values, constants)
    shape = tuple(values[nodes[-1].outputs[0]].shape)
    return shape[1:] if region.batched and shape[:1] == (1,) else shape


def _pieces(
    nodes: Sequence[Node],
    shape: tuple[int, ...] | None,
    batched: bool,
    load: Load,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Sequence[LinearMap | InfiniteConv] | None:
    """Return closed forms in order of application, batch norms and pads folded, or None if one has no rule."""
    if shape is None:
        return _unsized(nodes, load, dtype, device)
    pieces: list[LinearMap] = []
    position = 0
    while position < len(nodes):
        node = nodes[position]
        piece: LinearMap | None = None
        if isinstance(node.op, Conv) or zero_padding(node, load) is not None:
            piece, position = _convolution(nodes, position, shape, load, dtype, device)
        elif isinstance(node.op, (Linear, Embedding)):
            piece = _matrix(node, load, dtype, device, shape if len(nodes) > 1 else None)
        elif isinstance(node.op, BatchNorm):
            if len(shape) < node.op.axis:
                return None
            *others, piece = _norm(node, shape, node.op.axis - 1, load, dtype, device)
            pieces += others
        elif batched and may_separate(node):
            piece = separable_map(node, shape, load, dtype=dtype, device=device)
        if piece is None:
            return None
        pieces.append(piece)
        shape = piece.out_shape
        position += 1
    return pieces


def _unsized(
    nodes: Sequence[Node], load: Load, dtype: torch.dtype, device: torch.device | str
) -> Sequence[LinearMap | InfiniteConv] | None:
    head = nodes[0]
    if isinstance(head.op, Conv):
        weight = load(head.inputs[1])
        for node in nodes[1:]:
            if not isinstance(node.op, BatchNorm):
                return None
            scale = _scale(node, load)
            folded = _scale_outputs(weight, head.op, scale)
            touching = bool(_scale_outputs(weight != 0, head.op, scale != 0).any())
            small = _fades(scale, node, load) or (touching and largest(folded) < _FADING)
            large = bool(folded.isinf().any()) and bool(weight.isfinite().all() and scale.isfinite().all())
            if small or large:
                raise OperatorError("the product of kernel and batch norm leaves the range of float64")
            weight = folded
        return [InfiniteConv(weight, head.op.geometry)]
    if isinstance(head.op, (Linear, Embedding)):
        matrices: list[LinearMap] = []
        for node in nodes:
            matrix = _matrix(node, load, dtype, device, None)
            if matrix is None:
                return None
            matrices.append(matrix)
        return matrices
    if isinstance(head.op, BatchNorm) and len(nodes) == 1:
        return _norm(head, tuple(load(head.inputs[4]).shape), 0, load, dtype, device)
    return None


def _convolution(
    nodes: Sequence[Node],
    position: int,
    shape: tuple[int, ...],
    load: Load,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[LinearMap | None, int]:
    """Return the convolution at ``position`` with the pad before and the batch norms behind it folded in.

    The second value is the position of the last node used.
    """
    node = nodes[position]
    pads = zero_padding(node, load)
    if pads is not None:
        if position + 1 == len(nodes) or not isinstance(nodes[position + 1].op, Conv):
            return None, position
        position += 1
        node = nodes[position]
    if not isinstance(node.op, Conv):
        return None, position
    conv = node.op
    if len(shape) != conv.geometry.dims + 1:
        return None, position
    if pads is not None:
        if conv.geometry.transposed or conv.geometry.padding_mode != "zeros" or len(pads) != len(shape):
            return None, position
        if any(side for side in pads[0]):
            return None, position
        merged = tuple(
            (low + more_low, high + more_high)
            for (low, high), (more_low, more_high) in zip(conv.geometry.padding, pads[1:], strict=True)
        )
        conv = Conv(replace(conv.geometry, padding=merged))
    weight = load(node.inputs[1])
    while position + 1 < len(nodes):
        following = nodes[position + 1]
        if not isinstance(following.op, BatchNorm) or following.op.axis != 1:
            break
        scale = _scale(following, load)
        if _fades(scale, following, load):
            break
        folded = _scale_outputs(weight, conv, scale)
        if largest(folded) < _FADING and bool(_scale_outputs(weight != 0, conv, scale != 0).any()):
            break  # the norm stays a map of its own: exponents of parts are added, not multiplied
        weight = folded
        position += 1
    return ConvMap(weight, shape, conv.geometry, dtype=dtype, device=device), position


def _matrix(
    node: Node, load: Load, dtype: torch.dtype, device: torch.device | str, shape: tuple[int, ...] | None
) -> LinearMap | None:
    """Return the matrix of a linear layer; None where it has to act on more than a vector."""
    op = node.op
    if isinstance(op, Embedding):
        return MatrixMap(load(node.inputs[1]).T, dtype=dtype, device=device)
    if not isinstance(op, Linear):
        return None
    weight = load(node.inputs[1])
    if weight.dim() == 1:
        weight = weight.unsqueeze(0) if not op.transposed else weight.unsqueeze(1)
    if weight.dim() != 2 or (op.axis != -1 and shape is not None):
        return None
    matrix = weight.T if op.transposed else weight
    if op.alpha != 1.0:
        matrix = matrix.double() * op.alpha
    if shape is not None and (len(shape) != 1 or shape[0] != matrix.shape[1]):
        return None
    return MatrixMap(matrix, dtype=dtype, device=device)


def _scale(node: Node, load: Load) -> Tensor:
    """Return γ/sqrt(var + eps) of a batch norm in float64."""
    if not isinstance(node.op, BatchNorm):
        raise OperatorError(f"{node.name} is not a batch norm")
    gamma, variance = node.inputs[1], node.inputs[4]
    scale = torch.rsqrt(load(variance).double() + node.op.eps)
    if not gamma:
        return scale
    factor = load(gamma).double()
    if factor.numel() != 1 and factor.shape != scale.shape:
        raise OperatorError(
            f"a batch norm of {tuple(scale.shape)} variances cannot have {tuple(factor.shape)} factors"
        )
    return factor * scale


def _norm(
    node: Node, shape: tuple[int, ...], axis: int, load: Load, dtype: torch.dtype, device: torch.device | str
) -> list[LinearMap]:
    """Return a batch norm as one diagonal map; as two, γ and 1/sqrt(var + eps), where their product leaves float64."""
    scales = [_scale(node, load)]
    if _fades(scales[0], node, load):
        scales = [torch.rsqrt(load(node.inputs[4]).double() + node.op.eps), load(node.inputs[1]).double()]  # type: ignore[union-attr]
    return [DiagonalMap(scale, shape, axis=axis, dtype=dtype, device=device) for scale in scales]


def _fades(scale: Tensor, node: Node, load: Load) -> bool:
    """Return whether γ/sqrt(var + eps) is so small that it has lost digits, and γ is not zero."""
    gamma = node.inputs[1]
    return bool(gamma) and largest(scale) < _FADING and bool((load(gamma) != 0).any())


def _scale_outputs(weight: Tensor, conv: Conv, scale: Tensor) -> Tensor:
    """Return the weight with its output channels scaled, in float64."""
    g = conv.geometry
    weight = weight.double()
    if not g.transposed:
        return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    # Stored (in, out/groups, *k): output channel = group·(out/groups) + column.
    per_group = weight.shape[1]
    inputs_per_group = weight.shape[0] // g.groups
    table = scale.reshape(g.groups, 1, per_group).expand(g.groups, inputs_per_group, per_group)
    return weight * table.reshape(weight.shape[0], per_group, *(1,) * g.dims)
