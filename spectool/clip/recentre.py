"""Batch norms follow their weights: running means move by what a clip does to the mean of their input.

A clip changes the mean response of a convolution; the batch norm behind it still subtracts the old mean, and that
costs more accuracy than the clip itself. Moving ``running_mean`` leaves every singular value as it is.

The mean response is W·t, where t holds the mean of the input under every tap. Two things are known of t without
data. Where the convolution reads what a batch norm and a ReLU have left, the mean of its input is E[max(0, N(β, γ²))]
per channel. And the running mean itself is W·t: of all t that explain it the one nearest to the first estimate is
taken. (So scaling W by a number moves the mean by exactly that number, and a first layer with no more taps than
outputs needs no first estimate.)

A clip also narrows what comes out: a row of W that shrinks to ρ times its length leaves ρ|γ| for |γ| behind the
batch norm, whose positive part has another mean, and so the batch norm after the next
convolution has to follow too, though nothing else changed there. Regions are gone through in the order of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectool.clip.moments import Moments, matrices, moments_of, shares, spreads
from spectool.graph.types import BatchNorm, Conv, Graph, Linear, Node, Region
from spectool.lower.replay import constant_names, execute

Load = Callable[[str], Tensor]

_LITTLE = 1e-3
"""Standard deviations by which a mean behind unchanged weights has to be off to be moved."""

_RIDGE = 1e-3
"""Relative to the largest squared singular value: a running mean is known to a few per cent only."""


@dataclass(frozen=True)
class Moved:
    """What batch norms need.

    Attributes:
        means: Running mean (or bias), as regions read it → new value, float64.
        shifts: The same → largest move over the standard deviation of the channel (over the largest entry for a
            bias).
        reasons: Key of a region whose weights changed → why nothing was moved there.
    """

    means: dict[str, Tensor] = field(default_factory=dict)
    shifts: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def recentred(
    regions: Sequence[Region], graph: Graph, old: Load, new: Load, changed: Set[str], *, biases: bool = False
) -> Moved:
    """Return running means that keep the mean of every batch norm's output.

    Each region is run twice in float64, with the old and the new weights, on the constant maps of its input's means;
    real padding included (at the border a tap is used less). Each mean moves by the difference at its batch norm, in
    order, so that what follows sees it moved.

    Args:
        regions: The maximal regions, in the order of the graph.
        graph: The program around them.
        old: Reads constants as they were.
        new: Reads constants as they are now.
        changed: The constants that changed.
        biases: Whether a convolution without a batch norm behind it is corrected by its bias.
    """
    made = Moved()
    narrowed: dict[str, Tensor] = {}
    producer = {output: node for node in graph.nodes for output in node.outputs}
    for region in regions:
        touched = any(name in changed for node in region.nodes for name in node.inputs)
        norms = any(isinstance(node.op, BatchNorm) for node in region.nodes)
        if not norms and not (biases and any(_has_bias(node) for node in region.nodes)):
            if touched:
                made.reasons[region.key] = "no batch norm behind it"
            continue
        moments = moments_of(producer, region.root, old, narrowed)
        if not touched and (moments is None or moments.same):
            continue
        if region.in_shape is None:
            made.reasons[region.key] = "its input size is not known"
            continue
        if moments is None:
            mean = _explaining_mean(region, old)
            if mean is None:
                made.reasons[region.key] = "the mean of its input is not known without data (--calibrate)"
                continue
            moments = Moments(mean, torch.ones_like(mean), mean, torch.ones_like(mean))
        was, now = _constant_map(moments.mean, region), _constant_map(moments.new_mean, region)
        if was is None or now is None:
            made.reasons[region.key] = (
                "its input has another number of channels than the batch norm before it"
            )
            continue
        _Walk(region, old, new, moments, made, narrowed, biases, touched).follow(was, now)
    return made


@dataclass
class _Walk:
    """One region, run twice."""

    region: Region
    old: Load
    new: Load
    moments: Moments
    made: Moved
    narrowed: dict[str, Tensor]
    biases: bool
    touched: bool

    def follow(self, before_map: Tensor, after_map: Tensor) -> None:
        """Run all nodes; note means that move and how much narrower batch norms' outputs become."""
        region = self.region
        names = constant_names(region)
        before = {name: _wide(self.old(name)) for name in names}
        after = {name: _wide(self.new(name)) for name in names}
        after.update({name: value for name, value in self.made.means.items() if name in after})
        was, now = {region.root: before_map}, {region.root: after_map}
        producer = {output: node for node in region.nodes for output in node.outputs}
        normed = {node.inputs[0] for node in region.nodes if isinstance(node.op, BatchNorm)}
        for node in region.nodes:
            if isinstance(node.op, BatchNorm):
                behind = producer.get(node.inputs[0])
                self._norm(node, behind, was, now, before, after)
            _step(node, was, before)
            _step(node, now, after)
            if self.biases and _has_bias(node) and node.outputs[0] not in normed:
                out, bias = node.outputs[0], node.inputs[2]
                moved = _channel_mean(now[out] - was[out], 1)
                if float(moved.abs().max()) > 0.0:
                    after[bias] = self.made.means[bias] = after[bias] - moved
                    now[out] = now[out] - _along(moved, now[out], 1)
                    largest = max(float(before[bias].abs().max()), 1e-300)
                    self.made.shifts[bias] = float(moved.abs().max()) / largest

    def _norm(
        self,
        node: Node,
        behind: Node | None,
        was: dict[str, Tensor],
        now: dict[str, Tensor],
        before: dict[str, Tensor],
        after: dict[str, Tensor],
    ) -> None:
        """Move the running mean of one batch norm."""
        if not isinstance(node.op, BatchNorm):
            return
        source, mean = node.inputs[0], node.inputs[3]
        moved = _channel_mean(now[source] - was[source], node.op.axis)
        more = torch.zeros_like(moved)
        if behind is not None and mean and len(behind.inputs) > 1:
            more = _unexplained(behind, was, before, after, before[mean])
            share = self._narrowing(behind, before, after, before[node.inputs[4]])
            if share is not None and share.numel() == moved.numel():
                self.narrowed[node.outputs[0]] = share
        spread = (before[node.inputs[4]] + node.op.eps).sqrt()
        shift = float(((moved + more).abs() / spread).max())
        if mean and mean not in self.made.means and shift > (0.0 if self.touched else _LITTLE):
            after[mean] = self.made.means[mean] = after[mean] + moved + more
            self.made.shifts[mean] = shift
            # The maps do not show ``more``; what is centred must.
            now[source] = now[source] + _along(more, now[source], node.op.axis)

    def _narrowing(
        self, node: Node, before: Mapping[str, Tensor], after: Mapping[str, Tensor], variance: Tensor
    ) -> Tensor | None:
        """Return per channel the standard deviation behind an operator after, over that before.

        The covariance of the taps is taken as a sum of three: of independent pixels, of equal pixels in a channel, and
        of equal channels, in the shares that explain the running variances best.
        """
        old, new = matrices(node, before[node.inputs[1]]), matrices(node, after[node.inputs[1]])
        if old is None or new is None:
            return None
        groups, _, taps = old.shape
        was, now = self.moments.variance, self.moments.new_variance
        if was.numel() % groups or taps % (was.numel() // groups):
            was = now = torch.ones(
                groups, dtype=torch.float64
            )  # not the operator that reads the region's input
        parts = spreads(old, was)
        found = shares(parts, variance)
        wide, narrow = found @ parts, found @ spreads(new, now)
        return (narrow / wide.clamp_min(1e-300)).sqrt().clamp(max=1.0)


def _has_bias(node: Node) -> bool:
    return isinstance(node.op, Conv) and len(node.inputs) > 2 and bool(node.inputs[2])


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
    old, new = matrices(node, before[name]), matrices(node, after[name])
    if old is None or new is None or missing.numel() != old.shape[0] * old.shape[1]:
        return torch.zeros_like(mean)
    missing = missing.reshape(old.shape[0], -1, 1)
    gram = old @ old.transpose(1, 2)
    ridge = _RIDGE * torch.linalg.matrix_norm(old, ord=2).square().clamp_min(1e-300)
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype)
    taps = old.transpose(1, 2) @ torch.linalg.solve(gram, missing)
    moved: Tensor = (new - old) @ taps
    return moved.flatten()


def _apply(node: Node, values: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Tensor:
    found = dict(values)
    _step(node, found, constants)
    return found[node.outputs[0]]


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
    matrix = matrices(node, constants[node.inputs[1]])
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
    found: Tensor = torch.linalg.solve(gram, response.T @ wanted)
    return found


def _along(mean: Tensor, like: Tensor, axis: int) -> Tensor:
    shape = [1] * like.dim()
    shape[axis] = -1
    return mean.reshape(shape)


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
