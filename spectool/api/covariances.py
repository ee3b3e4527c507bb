"""What the layers of a network see on data: covariances of the taps of their weights, for the data metric."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool.api.calibration import Live, with_weights
from spectool.checkpoint import Checkpoint
from spectool.errors import UsageError

SAMPLES = 256
"""Samples that are used."""

ROWS = 1 << 18
"""Patches of one layer that are used: those of the first samples."""

TAPS = 4608
"""Taps of one output up to which a covariance is made: it takes 170 MB in float64, and its factors as much each."""

_RIDGE = 0.03
_BATCH = 32
_CHUNK = 1 << 24
"""Entries of patches that are made at once."""

_PLAIN = 512
"""Taps up to which products are summed in float64 from the start."""

_SQUARES = 1e-12, 1e12
"""Sizes of numbers that float32 takes, squared as well."""

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PARAMETERS = (
    "weight",
    "weight_g",
    "weight_orig",
    "parametrizations.weight.original0",
    "parametrizations.weight.original",
)
"""What a layer's weight may be stored as; of a parametrised one, the tensor that stands for it."""


@dataclass(frozen=True)
class Covariances:
    """What is known of some weights.

    Attributes:
        found: Checkpoint key of a weight → H ``(groups, taps, taps)`` with a ridge of 3 % of its mean diagonal,
            float32; over that diagonal where it is tiny or huge, since changes are told relatively.
        missing: Checkpoint key → why there is none; ``""`` for all others.
    """

    found: Mapping[str, Tensor]
    missing: Mapping[str, str]


@dataclass
class _Moments:
    """Sums over the patches of one layer, less a first guess of their mean."""

    shift: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None
    rows: int = 0

    def add(self, patches: Tensor) -> None:
        """Take patches ``(groups, rows, taps)`` in."""
        if self.shift is None or self.first is None or self.second is None:
            groups, _, taps = patches.shape
            self.shift = patches.mean(dim=1, keepdim=True)
            self.first = torch.zeros(groups, taps, dtype=torch.float64)
            self.second = torch.zeros(groups, taps, taps, dtype=torch.float64)
        # Less the shift nothing cancels, and products in float32 are good to 1e-6.
        centred = patches - self.shift
        small = patches.shape[2] <= _PLAIN or not _SQUARES[0] <= float(centred.abs().max()) <= _SQUARES[1]
        centred = centred.double() if small else centred
        self.first += centred.sum(dim=1).double()
        self.second += (centred.mT @ centred).double()
        self.rows += patches.shape[1]

    def covariance(self) -> Tensor | None:
        """Return the covariance, float64, zero where only roundings vary; None if nothing was seen."""
        if self.shift is None or self.first is None or self.second is None or self.rows == 0:
            return None
        mean = self.first / self.rows
        made = self.second / self.rows - mean[:, :, None] * mean[:, None, :]
        rounding = torch.finfo(self.shift.dtype).eps ** 2 * float(self.shift.double().square().mean())
        return made if float(made.diagonal(dim1=1, dim2=2).mean()) > rounding else torch.zeros_like(made)


@dataclass
class _Watch:
    """One layer that is watched."""

    keys: tuple[str, ...]
    moments: _Moments = field(default_factory=_Moments)
    refused: str = ""

    def see(self, layer: nn.Module, arguments: tuple[object, ...]) -> None:
        """Take in what a layer is called on; a forward pre-hook."""
        if self.refused or self.moments.rows >= ROWS:
            return
        self.refused = _unfit(layer, arguments)
        if self.refused:
            return
        for patches in _patches(layer, arguments[0]):  # type: ignore[arg-type]
            self.moments.add(patches)
            if self.moments.rows >= ROWS:
                return


def tap_covariances(
    live: Live, checkpoint: Checkpoint, inputs: Tensor, wanted: Collection[str] | None = None
) -> Covariances:
    """Return the covariance of what every row of a convolution or matrix sees on these inputs.

    A row of the weight of a convolution is multiplied with a patch of its group's channels at every position; that of
    a transposed convolution with what its taps reach from there. The mean over samples and positions is taken off:
    biases and running means take care of it.

    Args:
        live: The module and its keys.
        checkpoint: Holds the weights.
        inputs: ``(n, …)``, of the first n = 256.
        wanted: Checkpoint keys of weights; None for all.

    Raises:
        UsageError: If the network does not run on these inputs.
    """
    module, keys = live
    program = with_weights(module, checkpoint, keys, {})
    inputs = inputs[:SAMPLES].float() if inputs.is_floating_point() else inputs[:SAMPLES]
    watches: list[_Watch] = []
    for name, child in program.named_modules():
        if not isinstance(child, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        own = tuple(f"{name}.{leaf}" if name else leaf for leaf in _PARAMETERS)
        stored = tuple(keys.get(parameter, parameter) for parameter in own)
        # Tied tensors go by one name.
        stored = tuple(checkpoint.aliases.get(key, key) for key in stored if key in checkpoint.tensors)
        if wanted is None or not set(stored).isdisjoint(wanted):
            watches.append(_Watch(stored))
            child.register_forward_pre_hook(watches[-1].see)
    with torch.no_grad():
        try:
            for batch in torch.split(inputs, _BATCH):
                program(batch)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UsageError(
                f"the network does not run on inputs {tuple(inputs.shape)}: {str(error).splitlines()[0]}",
                hint="--calibrate wants a batch as the network takes it",
            ) from error
    found: dict[str, Tensor] = {}
    missing = {"": "no convolution or linear layer of the network has it"}
    together: dict[str, list[_Watch]] = {}
    for watch in watches:
        for key in watch.keys:
            together.setdefault(key, []).append(watch)
    for key, sharing in together.items():
        made = _joint(sharing)
        if isinstance(made, str):
            missing[key] = made
        else:
            found[key] = made
    return Covariances(found, missing)


def _joint(watches: Sequence[_Watch]) -> Tensor | str:
    """Return H of a weight, the sum over the layers that share it, or why there is none."""
    refused = next((watch.refused for watch in watches if watch.refused), "")
    if refused:
        return refused
    each = [made for watch in watches if (made := watch.moments.covariance()) is not None]
    if not each:
        return "its layer was not called"
    if any(made.shape != each[0].shape for made in each):
        return "the layers that share it see other taps"
    total = torch.stack(each).sum(dim=0)
    diagonal = total.diagonal(dim1=1, dim2=2)
    size = float(diagonal.mean())
    if not math.isfinite(size) or size <= 0.0:
        return "its layer saw nothing that varies" if size <= 0.0 else "its layer saw infinite numbers"
    if not _SQUARES[0] <= size <= _SQUARES[1]:
        total /= size
        size = 1.0
    # One ridge for all groups: a group that sees nothing must not be free to change.
    diagonal += _RIDGE * size
    return total.float()


def _unfit(layer: nn.Module, arguments: tuple[object, ...]) -> str:
    """Return why no covariance is made of what a layer is called on; empty if it is."""
    if not arguments or not isinstance(arguments[0], Tensor) or not arguments[0].is_floating_point():
        return "its layer is not called on one tensor"
    if isinstance(layer, nn.Linear):
        taps = layer.in_features
    elif isinstance(layer, nn.modules.conv._ConvNd):
        if arguments[0].dim() != len(layer.kernel_size) + 2:
            return "its layer is called without a batch axis"
        if layer.transposed and any(value is not None for value in arguments[1:]):
            return "its layer is told its output size"
        taps = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return f"{taps} taps to an output, and covariances are made of {TAPS}" if taps > TAPS else ""


def _patches(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield what the rows of a layer's weight are multiplied with, ``(groups, rows, taps)``, some samples at a time."""
    if isinstance(layer, nn.Linear):
        yield from torch.split(x.reshape(1, -1, x.shape[-1]), max(1, _CHUNK // layer.in_features), dim=1)
        return
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return
    kernel, channels = tuple(layer.kernel_size), layer.in_channels
    taps, dims = math.prod(kernel), len(kernel)
    one_hot = torch.eye(taps, dtype=x.dtype, device=x.device)
    positions = math.prod(x.shape[2:]) * (math.prod(layer.stride) if layer.transposed else 1)
    if layer.transposed:
        weight = one_hot.reshape(1, taps, *kernel).repeat(channels, 1, *[1] * dims)
    else:
        weight = one_hot.reshape(taps, 1, *kernel).repeat(channels, 1, *[1] * dims)
    padding: Any = layer.padding
    extra: Any = layer.output_padding
    for part in torch.split(x, max(1, _CHUNK // max(1, channels * taps * positions))):
        if layer.transposed:
            made = _CONV_TRANSPOSE[dims](
                part, weight, None, layer.stride, padding, extra, channels, layer.dilation
            )
        elif layer.padding_mode != "zeros":
            wide = F.pad(part, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            made = _CONV[dims](wide, weight, None, layer.stride, 0, layer.dilation, channels)
        else:
            made = _CONV[dims](part, weight, None, layer.stride, padding, layer.dilation, channels)
        # (n, groups · channels of one · taps, *positions) → (groups, n · positions, taps of one)
        made = made.reshape(len(part), layer.groups, channels // layer.groups * taps, -1)
        yield made.permute(1, 0, 3, 2).flatten(1, 2)
