"""Batch norms follow their weights: running means move by what a clip does to the mean of their input.

A clip changes the mean response of a convolution; the batch norm behind it still subtracts the old mean, and that
costs more accuracy than the clip itself. Moving ``running_mean`` leaves every singular value as it is.

The mean response is W·t, where t holds the mean of the input under every tap. Two things are known of t without
data. Where the convolution reads what a batch norm and a ReLU have left, the mean of its input is E[max(0, N(β, γ²))]
per channel. And the running mean itself is W·t: of all t that explain it the one nearest to the first estimate is
taken. (So scaling W by a number moves the mean by exactly that number, and a first layer with no more taps than
outputs needs no first estimate.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectool.graph.types import BatchNorm, Call, Conv, Graph, Linear, Node, Opaque, Region
from spectool.lower.replay import constant_names, execute

Load = Callable[[str], Tensor]

_RELU = ("onnx.Relu", "aten.relu", "aten.relu_")
_RIDGE = 1e-3
"""Relative to the largest squared singular value: a running mean is known to a few per cent only."""

_PASSING = ("onnx.Identity", "onnx.Dropout", "aten.clone", "aten.detach", "aten.dropout", "aten.alias")


@dataclass(frozen=True)
class Moved:
    """What a region's batch norms need.

    Attributes:
        means: Running mean (or bias), as the region reads it → new value, float64.
        shift: Largest move over the standard deviation of the channel; over the largest entry for a bias.
        reason: Why nothing was moved, if nothing was; empty where nothing had to be.
    """

    means: Mapping[str, Tensor] = field(default_factory=dict)
    shift: float = 0.0
    reason: str = ""


def recentred(region: Region, graph: Graph, old: Load, new: Load, *, biases: bool = False) -> Moved:
    """Return running means that keep the mean of every batch norm's output in a region.

    The region is run twice in float64, with the old and the new weights, on the constant map of its input's mean;
    real padding included (at the border a tap is used less). Each mean moves by the difference at its batch norm,
    in order, so that what follows sees it moved.

    Args:
        region: A region whose weights changed.
        graph: The program around it.
        old: Reads constants as they were.
        new: Reads constants as they are now.
        biases: Whether a convolution without a batch norm behind it is corrected by its bias.
    """
    norms = [node for node in region.nodes if isinstance(node.op, BatchNorm)]
    correctable = [
        node for node in region.nodes if biases and isinstance(node.op, Conv) and len(node.inputs) > 2
    ]
    if not norms and not correctable:
        return Moved(reason="no batch norm behind it")
    if region.in_shape is None:
        return Moved(reason="its input size is not known")
    mean = mean_of(graph, region.root, old)
    if mean is None:
        mean = _explaining_mean(region, old)
    if mean is None:
        return Moved(reason="the mean of its input is not known without data (--calibrate)")
    x = _constant_map(mean, region)
    if x is None:
        return Moved(reason="its input has another number of channels than the batch norm before it")
    return _follow(region, x, old, new, biases)


def _follow(region: Region, x: Tensor, old: Load, new: Load, biases: bool) -> Moved:
    names = constant_names(region)
    before = {name: _wide(old(name)) for name in names}
    after = {name: _wide(new(name)) for name in names}
    was, now = {region.root: x}, {region.root: x}
    means: dict[str, Tensor] = {}
    shift = 0.0
    read_by_norm = {node.inputs[0] for node in region.nodes if isinstance(node.op, BatchNorm)}
    producer = {output: node for node in region.nodes for output in node.outputs}
    for node in region.nodes:
        if isinstance(node.op, BatchNorm):
            source, mean = node.inputs[0], node.inputs[3]
            moved = _channel_mean(now[source] - was[source], node.op.axis)
            behind = producer.get(source)
            more = torch.zeros_like(moved)
            if behind is not None and mean and len(behind.inputs) > 1:
                more = _unexplained(behind, was, before, after, before[mean])
            if mean and mean not in means and float((moved + more).abs().max()) > 0.0:
                after[mean] = means[mean] = after[mean] + moved + more
                spread = (before[node.inputs[4]] + node.op.eps).sqrt()
                shift = max(shift, float(((moved + more).abs() / spread).max()))
                # The maps do not show ``more``; the mean they are to be centred by must not hold it either.
                now[source] = now[source] + _along(more, now[source], node.op.axis)
        _step(node, was, before)
        _step(node, now, after)
        if biases and _has_bias(node) and node.outputs[0] not in read_by_norm:
            out, bias = node.outputs[0], node.inputs[2]
            moved = _channel_mean(now[out] - was[out], 1)
            if float(moved.abs().max()) > 0.0:
                after[bias] = means[bias] = after[bias] - moved
                now[out] = now[out] - moved.reshape(-1, *[1] * (now[out].dim() - 2))
                shift = max(shift, float(moved.abs().max()) / max(float(before[bias].abs().max()), 1e-300))
    return Moved(means, shift)


def _unexplained(
    node: Node,
    values: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    mean: Tensor,
) -> Tensor:
    """Return ΔW·Δt, Δt being the least change of the taps' means that explains a running mean.

    With W the matrix (out, in·taps) of one group, Δt = Wᵀ(WWᵀ + λ)⁻¹(mean − W·t − bias).
    """
    name = node.inputs[1]
    if name not in before or not isinstance(node.op, (Conv, Linear)):
        return torch.zeros_like(mean)
    said = _channel_mean(_apply(node, values, before), 1 if isinstance(node.op, Conv) else -1)
    missing = mean - said
    old, new = _matrices(node, before[name]), _matrices(node, after[name])
    if old is None or new is None or missing.numel() != old.shape[0] * old.shape[1]:
        return torch.zeros_like(mean)
    missing = missing.reshape(old.shape[0], -1, 1)
    gram = old @ old.transpose(1, 2)
    ridge = _RIDGE * torch.linalg.matrix_norm(old, ord=2).square().clamp_min(1e-300)
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype)
    taps = old.transpose(1, 2) @ torch.linalg.solve(gram, missing)
    return ((new - old) @ taps).flatten()


def _apply(node: Node, values: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Tensor:
    found = dict(values)
    _step(node, found, constants)
    return found[node.outputs[0]]


def _matrices(node: Node, weight: Tensor) -> Tensor | None:
    """Return W as ``(groups, out, in·taps)`` with outputs in the order of channels; None for transposed ones."""
    if isinstance(node.op, Linear):
        if weight.dim() != 2 or node.op.axis != -1:
            return None
        return (node.op.alpha * (weight.T if node.op.transposed else weight))[None]
    if not isinstance(node.op, Conv) or node.op.geometry.transposed:
        return None
    return weight.reshape(node.op.geometry.groups, weight.shape[0] // node.op.geometry.groups, -1)


def _explaining_mean(region: Region, load: Load) -> Tensor | None:
    """Return the mean per channel of a region's input that explains the running mean of its first batch norm best.

    None unless the region begins, rearrangements of positions aside, with a convolution or matrix of one group that
    has a batch norm directly behind it.
    """
    nodes = list(region.nodes)
    first = next((index for index, node in enumerate(nodes) if isinstance(node.op, (Conv, Linear))), None)
    if first is None:
        return None
    node = nodes[first]
    norm = next((n for n in nodes if isinstance(n.op, BatchNorm) and n.inputs[0] == node.outputs[0]), None)
    if norm is None or not norm.inputs[3] or (isinstance(node.op, Conv) and node.op.geometry.groups > 1):
        return None
    constants = {name: _wide(load(name)) for name in constant_names(region)}
    matrix = _matrices(node, constants[node.inputs[1]])
    if matrix is None:
        return None
    shape = tuple(region.in_shape or ())
    values = {region.root: torch.ones((1, *shape) if region.batched else shape, dtype=torch.float64)}
    for before in nodes[:first]:
        _step(before, values, constants)
    source = values[node.inputs[0]]
    bias = constants[node.inputs[2]] if len(node.inputs) > 2 and node.inputs[2] else 0.0
    weight = constants[node.inputs[1]]
    if isinstance(node.op, Linear):
        response = matrix[0]
    else:
        if (
            source.dim() < 3
            or source.shape[1] != weight.shape[1]
            or len(shape) == 0
            or shape[0] != weight.shape[1]
        ):
            return None
        # How much of the map every tap reads, from one channel of ones; the same for all of them.
        taps = weight[0, 0].numel()
        one_hot = torch.eye(taps, dtype=torch.float64).reshape(taps, 1, *weight.shape[2:])
        alone = {**constants, node.inputs[1]: one_hot}
        plain = Node(node.name, node.op, (node.inputs[0], node.inputs[1]), node.outputs)
        cover = _channel_mean(_apply(plain, {node.inputs[0]: source[:, :1]}, alone), 1)
        response = (weight.flatten(2) * cover).sum(dim=2)
    wanted = constants[norm.inputs[3]] - bias
    if response.shape[1] != len(shape) and response.shape[1] != (shape[0] if shape else 0):
        return None
    ridge = _RIDGE * float(torch.linalg.matrix_norm(response, ord=2)) ** 2
    gram = response.T @ response + (ridge + 1e-300) * torch.eye(response.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, response.T @ wanted)


def _along(mean: Tensor, like: Tensor, axis: int) -> Tensor:
    shape = [1] * like.dim()
    shape[axis] = -1
    return mean.reshape(shape)


def _has_bias(node: Node) -> bool:
    return isinstance(node.op, Conv) and len(node.inputs) > 2 and bool(node.inputs[2])


def mean_of(graph: Graph, name: str, load: Load) -> Tensor | None:
    """Return the mean per channel of a value that is max(0, batch norm), in float64; None for any other.

    A batch norm's output has, over data, mean β and standard deviation |γ| per channel; taken as normal, its
    positive part has the mean |γ|·φ(β/|γ|) + β·Φ(β/|γ|).
    """
    producer = {output: node for node in graph.nodes for output in node.outputs}
    node = _skip(producer, name)
    if node is None or not isinstance(node.op, Opaque) or _bare(node.op.name) not in _RELU:
        return None
    node = _skip(producer, node.inputs[0])
    if node is None or not isinstance(node.op, BatchNorm) or not node.inputs[2]:
        return None
    beta = load(node.inputs[2]).double()
    gamma = load(node.inputs[1]).double().abs() if node.inputs[1] else torch.ones_like(beta)
    ratio = beta / gamma.clamp_min(1e-300)
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    share = 0.5 * (1.0 + torch.erf(ratio / math.sqrt(2.0)))
    return torch.where(gamma > 0, gamma * density + beta * share, beta.clamp_min(0.0))


def _bare(name: str) -> str:
    """Return an operation's name without its overload."""
    parts = name.split(".")
    return ".".join(parts[:2])


def _skip(producer: Mapping[str, Node], name: str) -> Node | None:
    node = producer.get(name)
    while node is not None and isinstance(node.op, Call) and _bare(node.op.name) in _PASSING:
        node = producer.get(node.inputs[0])
    return node


def _constant_map(mean: Tensor, region: Region) -> Tensor | None:
    shape = tuple(region.in_shape or ())
    full = (1, *shape) if region.batched else shape
    axis = 1 if region.batched else 0
    if len(full) <= axis or full[axis] != len(mean):
        return None
    spread = [1] * len(full)
    spread[axis] = -1
    return mean.reshape(spread).expand(full).clone()


def _step(node: Node, values: dict[str, Tensor], constants: Mapping[str, Tensor]) -> None:
    arguments = [
        None if not name else values[name] if name in values else constants[name] for name in node.inputs
    ]
    with torch.no_grad():
        result = execute(node.op, arguments)
    outputs = result if isinstance(result, tuple) else (result,)
    for name, tensor in zip(node.outputs, outputs, strict=False):
        if name:
            values[name] = tensor


def _channel_mean(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, 0).flatten(1).mean(dim=1) if x.dim() > 1 else x


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
