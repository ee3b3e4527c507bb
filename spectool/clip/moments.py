"""What is known of a value's distribution without data: means and covariances of its channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectool.clip.taps import variances
from spectool.graph.types import BatchNorm, Call, Node, Opaque

Load = Callable[[str], Tensor]
Behind = Mapping[str, tuple[Tensor, Tensor]]
"""Output of a batch norm → covariances of its normalised input before and after (see ``taps``)."""

_RELU = ("onnx.Relu", "aten.relu", "aten.relu_")
_PASSING = ("onnx.Identity", "onnx.Dropout", "aten.clone", "aten.detach", "aten.dropout", "aten.alias")
_FACTORS = (0.5, 2.0)
"""Range of what the excess of a rectified mean may be corrected by."""


@dataclass(frozen=True)
class Moments:
    """Means and covariance of the channels of a value, before and after a change of weights.

    Attributes:
        mean: Means before ``(c,)``.
        covariance: Covariance before, ``(c, c)`` or ``(c,)`` (see ``taps``).
        new_mean: Means after.
        new_covariance: Covariance after.
        floor: What the mean would be if nothing varied, max(0, β) behind a batch norm and a ReLU; None where nothing is
            known of how the value came about.
    """

    mean: Tensor
    covariance: Tensor
    new_mean: Tensor
    new_covariance: Tensor
    floor: Tensor | None = None

    @property
    def same(self) -> bool:
        """Whether nothing changes."""
        return torch.equal(self.mean, self.new_mean) and torch.equal(self.covariance, self.new_covariance)

    def corrected(self, error: Tensor) -> Moments:
        """Return these moments for means before that were ``error`` too low.

        Behind a ReLU the excess over the floor, which comes from the spread, was misjudged by a factor for want of a
        normal distribution; it is taken for the same after.
        """
        mean = self.mean + error
        if self.floor is None:
            return replace(self, mean=mean, new_mean=self.new_mean + error)
        excess = self.mean - self.floor
        factor = ((mean - self.floor) / excess.clamp_min(1e-300)).clamp(*_FACTORS)
        kept = mean - self.floor - factor * excess
        return replace(self, mean=mean, new_mean=self.floor + factor * (self.new_mean - self.floor) + kept)


def unknown(mean: Tensor) -> Moments:
    """Return the moments of a value of which only the mean is known: channels of one size that vary together."""
    ones = torch.ones_like(mean)
    return Moments(mean, ones, mean, ones)


def moments_of(producer: Mapping[str, Node], name: str, load: Load, behind: Behind) -> Moments | None:
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
    gamma = load(node.inputs[1]).double() if node.inputs[1] else torch.ones_like(beta)
    before, after = scaled(behind.get(node.outputs[0]), gamma)
    mean, covariance = _rectified(beta, before)
    new_mean, new_covariance = _rectified(beta, after)
    return Moments(mean, covariance, new_mean, new_covariance, beta.clamp_min(0.0))


def scaled(pair: tuple[Tensor, Tensor] | None, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the covariances behind a batch norm, from those of its normalised input; together where not known."""
    if pair is None:
        return gamma.abs(), gamma.abs()
    if pair[0].dim() == 1:
        return pair[0].double() * gamma.abs(), pair[1].double() * gamma.abs()
    product = gamma[:, None] * gamma[None, :]
    return pair[0].double() * product, pair[1].double() * product


def _rectified(beta: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and covariance of max(0, N(β, C)).

    The variances are exact; covariances are the first two terms of their series in the correlation ρ, γᵢΦᵢγⱼΦⱼρ and
    γᵢφᵢγⱼφⱼρ²/2 (Hermite coefficients of the ReLU).
    """
    gamma = variances(covariance).sqrt()
    ratio = beta / gamma.clamp_min(1e-300)
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    share: Tensor = 0.5 * (1.0 + torch.special.erf(ratio / math.sqrt(2.0)))
    mean = torch.where(gamma > 0, gamma * density + beta * share, beta.clamp_min(0.0))
    second = (beta.square() + gamma.square()) * share + beta * gamma * density
    variance = torch.where(gamma > 0, (second - mean.square()).clamp_min(0.0), 0.0)
    if covariance.dim() == 1:
        return mean, variance.sqrt()
    inverse = torch.where(gamma > 0, 1.0 / gamma.clamp_min(1e-300), 0.0)
    correlation = (covariance.double() * inverse[:, None] * inverse[None, :]).clamp(-1.0, 1.0)
    first, other = gamma * share, gamma * density
    made = first[:, None] * first[None, :] * correlation
    made += 0.5 * other[:, None] * other[None, :] * correlation.square()
    made.diagonal().copy_(variance)
    return mean, made


def _bare(name: str) -> str:
    """Return an operation's name without its overload."""
    return ".".join(name.split(".")[:2])


def _skip(producer: Mapping[str, Node], name: str) -> Node | None:
    node = producer.get(name)
    while node is not None and isinstance(node.op, Call) and _bare(node.op.name) in _PASSING:
        node = producer.get(node.inputs[0])
    return node
