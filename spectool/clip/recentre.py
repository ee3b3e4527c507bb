"""Batch norms follow their weights: running means move by what a clip does to the mean of their input.

A clip changes the mean response of a convolution; the batch norm behind it still subtracts the old mean, and that
costs more accuracy than the clip itself. Moving ``running_mean`` leaves every singular value as it is.

The mean response is W·t, where t holds the mean of the input under every tap. Two things are known of t without
data. Where the convolution reads what a batch norm and a ReLU have left, the mean of its input is E[max(0, N(β, γ²))]
per channel. And the running mean itself is W·t: of all t that explain it the likeliest is taken, which corrects for
what is not normal, too. (So scaling W by a number moves the mean by exactly that number, and a first layer with no
more taps than outputs needs no first estimate.)

A clip also narrows what comes out: a row of W that shrinks to ρ times its length leaves ρ|γ| for |γ| behind the
batch norm, whose positive part has another mean, and so the batch norm after the next
convolution has to follow too, though nothing else changed there. It narrows directions rather than channels, so the
covariances of channels are followed. Regions are gone through in the order of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectool.clip.moments import Moments, moments_of, scaled, unknown
from spectool.clip.taps import explained, matrices, outputs, variances
from spectool.errors import OperatorError
from spectool.graph.types import BatchNorm, Conv, Graph, Linear, Node, Region
from spectool.lower.replay import constant_names, execute

Load = Callable[[str], Tensor]

_LITTLE = 1e-3
"""Standard deviations by which a mean behind unchanged weights has to be off to be moved."""

_WIDE = 5.0
"""What an unknown input's deviation is multiplied by, for its mean to be free."""

_RIDGE = 1e-3
"""Relative to the largest squared singular value, where a mean is told by a running mean alone."""


@dataclass(frozen=True)
class Moved:
    """What batch norms need.

    Attributes:
        means: Running mean (or bias), as regions read it → new value, float64.
        shifts: Running mean → largest move over the standard deviation of its channel.
        reasons: Key of a region whose weights changed and that has a batch norm → why nothing was moved there.
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
    behind: dict[str, tuple[Tensor, Tensor]] = {}
    producer = {output: node for node in graph.nodes for output in node.outputs}
    for region in regions:
        touched = any(name in changed for node in region.nodes for name in node.inputs)
        norms = any(isinstance(node.op, BatchNorm) for node in region.nodes)
        if not norms and not (biases and any(_has_bias(node) for node in region.nodes)):
            continue
        try:
            moments = moments_of(producer, region.root, old, behind)
            if not touched and (moments is None or moments.same):
                continue
            start = _start(region, moments, old)
            if isinstance(start, str):
                made.reasons[region.key] = start
                continue
            _Walk(region, old, new, start[0], made, behind, biases, touched).follow(*start[1:])
        except OperatorError as error:  # a constant that the file does not hold
            made.reasons[region.key] = str(error)
    return made


def _start(region: Region, moments: Moments | None, old: Load) -> tuple[Moments, Tensor, Tensor] | str:
    """Return moments of a region's input, with the maps of its old and new mean; or why there are none."""
    if region.in_shape is None:
        return "its input size is not known"
    if moments is None:
        mean = _explaining_mean(region, old)
        if mean is None:
            return "the mean of its input is not known without data (--calibrate)"
        moments = unknown(mean)
    else:
        moments = _corrected(region, moments, old)
    was, now = _constant_map(moments.mean, region), _constant_map(moments.new_mean, region)
    if was is None or now is None:
        return "its input has another number of channels than the batch norm before it"
    return moments, was, now


@dataclass
class _Walk:
    """One region, run twice."""

    region: Region
    old: Load
    new: Load
    moments: Moments
    made: Moved
    behind: dict[str, tuple[Tensor, Tensor]]
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
            more = self._unexplained(behind, was, before, after, node)
            found = self._outputs(behind, before, after, before[node.inputs[4]])
            if found is not None:
                self.behind[node.outputs[0]] = found
        spread = (before[node.inputs[4]] + node.op.eps).sqrt()
        shift = float(((moved + more).abs() / spread).max())
        if mean and mean not in self.made.means and shift > (0.0 if self.touched else _LITTLE):
            after[mean] = self.made.means[mean] = after[mean] + moved + more
            self.made.shifts[mean] = shift
            # The maps do not show ``more``; what is centred must.
            now[source] = now[source] + _along(more, now[source], node.op.axis)

    def _inputs(
        self, node: Node, channels: int, before: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Return the covariances of what an operator reads; None where they are not known."""
        source = node.inputs[0]
        if source == self.region.root:
            known = self.moments.floor is not None
            pair = (self.moments.covariance, self.moments.new_covariance) if known else None
        else:
            norm = next((n for n in self.region.nodes if source in n.outputs), None)
            if norm is None or not isinstance(norm.op, BatchNorm) or not norm.inputs[1]:
                return None
            pair = scaled(self.behind.get(source), before[norm.inputs[1]])
        return pair if pair is not None and len(pair[0]) == channels else None

    def _outputs(
        self, node: Node, before: Mapping[str, Tensor], after: Mapping[str, Tensor], variance: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return the covariances in front of a batch norm, normalised."""
        name = node.inputs[1]
        if name not in before:
            return None
        old, new = matrices(node, before[name]), matrices(node, after[name])
        if old is None or new is None or variance.numel() != old.shape[0] * old.shape[1]:
            return None
        channels = _channels(node, before[name])
        pair = self._inputs(node, channels, before)
        if pair is None:
            pair = (torch.ones(channels, dtype=torch.float64),) * 2
        return outputs(old, new, *pair, variance)

    def _unexplained(
        self,
        node: Node,
        values: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        norm: Node,
    ) -> Tensor:
        """Return ΔW·Δt, Δt being the likeliest error of the taps' means in view of a running mean."""
        mean, variance = before[norm.inputs[3]], before[norm.inputs[4]]
        name = node.inputs[1]
        if name not in before or not isinstance(node.op, (Conv, Linear)):
            return torch.zeros_like(mean)
        old, new = matrices(node, before[name]), matrices(node, after[name])
        said = _channel_mean(_apply(node, values, before), 1 if isinstance(node.op, Conv) else -1)
        if old is None or new is None or said.numel() != mean.numel() or torch.equal(old, new):
            return torch.zeros_like(mean)
        channels = _channels(node, before[name])
        pair = self._inputs(node, channels, before)
        deviation = _guessed(old, variance, channels) if pair is None else variances(pair[0]).sqrt()
        taps = explained(old, mean - said, deviation, variance)
        moved: Tensor = (new - old) @ taps.unsqueeze(2)
        return moved.flatten()


def _channels(node: Node, weight: Tensor) -> int:
    """Return how many channels an operator reads."""
    if isinstance(node.op, Conv):
        return int(weight.shape[1]) * node.op.geometry.groups
    return int(weight.shape[0 if isinstance(node.op, Linear) and node.op.transposed else 1])


def _guessed(matrix: Tensor, variance: Tensor, channels: int) -> Tensor:
    """Return equal standard deviations for all channels, such as make the outputs vary as much as they do.

    Wide ones: of such an input nothing is known, and its mean may exceed its deviation.
    """
    size = matrix.square().sum(dim=2).flatten().clamp_min(1e-300)
    return _WIDE * (variance / size).median().sqrt().expand(channels)


def _corrected(region: Region, moments: Moments, load: Load) -> Moments:
    """Return moments of a region's input that agree with the running mean behind the operator that reads it."""
    node = next((n for n in region.nodes if region.root in n.inputs), None)
    if node is None or not isinstance(node.op, (Conv, Linear)) or node.inputs[0] != region.root:
        return moments
    norm = next(
        (n for n in region.nodes if isinstance(n.op, BatchNorm) and n.inputs[0] == node.outputs[0]), None
    )
    shown = _constant_map(moments.mean, region)
    if norm is None or not norm.inputs[3] or shown is None:
        return moments
    constants = {name: _wide(load(name)) for name in constant_names(region)}
    matrix = matrices(node, constants[node.inputs[1]])
    said = _channel_mean(
        _apply(node, {region.root: shown}, constants), 1 if isinstance(node.op, Conv) else -1
    )
    mean, variance = constants[norm.inputs[3]], constants[norm.inputs[4]]
    channels = _channels(node, constants[node.inputs[1]])
    if matrix is None or said.numel() != mean.numel() or channels != moments.mean.numel():
        return moments
    error = explained(matrix, mean - said, variances(moments.covariance).sqrt(), variance)
    return moments.corrected(error.reshape(channels, -1).mean(dim=1))


def _has_bias(node: Node) -> bool:
    return isinstance(node.op, Conv) and len(node.inputs) > 2 and bool(node.inputs[2])


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
    if not shape or response.shape[1] != shape[0]:
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
