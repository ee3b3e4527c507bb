"""A convolution whose input size is not known."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spectool.linear.geometry import ConvGeometry


@dataclass(frozen=True, eq=False)
class InfiniteConv:
    """A convolution on the infinite grid; it has a symbol and a supremum, but cannot be applied.

    Attributes:
        weight: Kernel in torch's layout, stored type: ``(out, in/groups, *k)``, or ``(in, out/groups, *k)``
            if transposed.
        geometry: How it slides; padding, padding mode and output padding mean nothing here.
    """

    weight: torch.Tensor
    geometry: ConvGeometry
