"""Any affine region as a map that is differentiable in its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spectool.graph.types import Region
from spectool.lower.replay import Load, constant_names, run


class Replayed:
    """The linear part of a region for given weights: x ↦ f(x) − f(0), adjoint by reverse mode.

    Unlike ``FunctionMap`` it records nothing, so that its weights may change or be differentiated.

    Args:
        function: f on ``(b, *in_shape)``, affine.
        in_shape: Shape of one input.
        dtype: Arithmetic type.
        device: Device of the vectors.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        in_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._function, self.in_shape, self.dtype, self.device = function, in_shape, dtype, device
        with torch.no_grad():
            self.out_shape = tuple(function(self._zero()).shape[1:])

    def _zero(self) -> Tensor:
        return torch.zeros(1, *self.in_shape, dtype=self.dtype, device=self.device)

    def matvec(self, x: Tensor) -> Tensor:
        """Apply the linear part to ``(b, *in_shape)``."""
        return self._function(x) - self._function(self._zero())

    def rmatvec(self, y: Tensor) -> Tensor:
        """Apply its adjoint to ``(b, *out_shape)``."""
        x = torch.zeros(len(y), *self.in_shape, dtype=self.dtype, device=self.device, requires_grad=True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad((self._function(x) * y).sum(), x)
        return gradient.detach()

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Replayed:
        """Return itself: the function holds its weights in one type on one device."""
        return self


def region_function(
    region: Region, load: Load, dtype: torch.dtype, device: torch.device
) -> Callable[[Mapping[str, Tensor]], Callable[[Tensor], Tensor]]:
    """Return weights ↦ the region's function on ``(b, *in_shape)``, with its other constants read once.

    Args:
        region: What to replay; its input shape is known.
        load: Reads a constant by name.
        dtype: Arithmetic type.
        device: Where to compute.
    """
    constants: dict[str, Tensor] = {}
    for name in constant_names(region):
        value = load(name)
        constants[name] = value.to(device=device, dtype=dtype) if value.is_floating_point() else value

    def with_weights(weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        known = {**constants, **weights}

        def one(x: Tensor) -> Tensor:
            values = {region.root: x.unsqueeze(0) if region.batched else x}
            run(region.nodes, values, known)
            y = values[region.exit]
            return y.squeeze(0) if region.batched else y

        batched: Callable[[Tensor], Tensor] = torch.func.vmap(one)
        return batched

    return with_weights
