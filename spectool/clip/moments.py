"""What is known of a value's distribution without data: means and variances per channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.graph.types import BatchNorm, Call, Conv, Linear, Node, Opaque

Load = Callable[[str], Tensor]

_RELU = ("onnx.Relu", "aten.relu", "aten.relu_")
_PASSING = ("onnx.Identity", "onnx.Dropout", "aten.clone", "aten.detach", "aten.dropout", "aten.alias")


@dataclass(frozen=True)
class Moments:
    """Mean and variance per channel of a value, before and after a change of weights."""

    mean: Tensor
    variance: Tensor
    new_mean: Tensor
    new_variance: Tensor

    @property
    def same(self) -> bool:
        """Whether nothing changes."""
        return torch.equal(self.mean, self.new_mean) and torch.equal(self.variance, self.new_variance)


def moments_of(
    producer: Mapping[str, Node], name: str, load: Load, narrowed: Mapping[str, Tensor]
) -> Moments | None:
    """Return the moments of a value that is max(0, batch norm); None for any other.

    A batch norm's output has, over data, mean β and standard deviation |γ| per channel; taken as normal, its positive
    part has the mean |γ|φ + βΦ and the second moment (β² + γ²)Φ + β|γ|φ, φ and Φ at β/|γ|.
    """
    node = _skip(producer, name)
    if node is None or not isinstance(node.op, Opaque) or _bare(node.op.name) not in _RELU:
        return None
    node = _skip(producer, node.inputs[0])
    if node is None or not isinstance(node.op, BatchNorm) or not node.inputs[2]:
        return None
    beta = load(node.inputs[2]).double()
    gamma = load(node.inputs[1]).double().abs() if node.inputs[1] else torch.ones_like(beta)
    share = narrowed.get(node.outputs[0], torch.ones_like(gamma))
    return Moments(*_rectified(beta, gamma), *_rectified(beta, gamma * share))


def _rectified(beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of max(0, N(β, γ²))."""
    ratio = beta / gamma.clamp_min(1e-300)
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    share: Tensor = 0.5 * (1.0 + torch.special.erf(ratio / math.sqrt(2.0)))
    mean = torch.where(gamma > 0, gamma * density + beta * share, beta.clamp_min(0.0))
    second = (beta.square() + gamma.square()) * share + beta * gamma * density
    return mean, torch.where(gamma > 0, (second - mean.square()).clamp_min(0.0), 0.0)


def _bare(name: str) -> str:
    """Return an operation's name without its overload."""
    return ".".join(name.split(".")[:2])


def _skip(producer: Mapping[str, Node], name: str) -> Node | None:
    node = producer.get(name)
    while node is not None and isinstance(node.op, Call) and _bare(node.op.name) in _PASSING:
        node = producer.get(node.inputs[0])
    return node


def spreads(matrix: Tensor, variance: Tensor) -> Tensor:
    """Return the variances behind a matrix under three covariances of its taps ``(3, out)``."""
    groups, rows, taps = matrix.shape
    channels = variance.numel() // groups
    by_channel = matrix.reshape(groups, rows, channels, taps // channels)
    scale = variance.reshape(groups, 1, channels)
    independent = (by_channel.square().sum(dim=3) * scale).sum(dim=2)
    equal = (by_channel.sum(dim=3).square() * scale).sum(dim=2)
    common = (by_channel.sum(dim=3) * scale.sqrt()).sum(dim=2).square()
    return torch.stack([independent.flatten(), equal.flatten(), common.flatten()])


def shares(parts: Tensor, variance: Tensor) -> Tensor:
    """Return nonnegative shares of the rows of ``parts`` whose sum is nearest to ``variance``, relatively."""
    best, least = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), math.inf
    scaled = parts / variance.clamp_min(1e-300)
    wanted = torch.ones_like(variance)
    for mask in range(1, 8):
        chosen = [index for index in range(3) if mask >> index & 1]
        some = scaled[chosen]
        gram = some @ some.T + 1e-9 * torch.eye(len(chosen), dtype=torch.float64) * float(some.square().sum())
        found = torch.linalg.solve(gram, some @ wanted)
        error = float((found @ some - wanted).square().sum())
        if bool((found >= 0).all()) and error < least:
            best, least = torch.zeros(3, dtype=torch.float64), error
            best[chosen] = found
    return best


def matrices(node: Node, weight: Tensor) -> Tensor | None:
    """Return W as ``(groups, out, in·taps)`` with outputs in the order of channels; None for transposed ones."""
    if isinstance(node.op, Linear):
        if weight.dim() != 2 or node.op.axis != -1:
            return None
        return (node.op.alpha * (weight.T if node.op.transposed else weight))[None]
    if not isinstance(node.op, Conv) or node.op.geometry.transposed:
        return None
    groups: int = node.op.geometry.groups
    made: Tensor = weight.reshape(groups, weight.shape[0] // groups, -1)
    return made
