"""The thin waist: the one interface that solvers, bounds and clipping know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@runtime_checkable
class LinearMap(Protocol):
    """A linear operator A between spaces of tensors, without its bias.

    Vectors are tensor-shaped and batched on the leading axis. ``matvec`` and ``rmatvec`` are adjoint:
    ⟨Ax, y⟩ = ⟨x, Aᵀy⟩, to rounding in ``dtype``. Applying a map never changes it.

    Attributes:
        in_shape: Shape of one input, without the batch axis.
        out_shape: Shape of one output, without the batch axis.
        dtype: The type arithmetic is done in (float32 or float64); half-type weights are upcast.
        device: Where vectors live.
    """

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        ...

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of one output."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic type."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        ...

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply A to ``(b, *in_shape)``; returns ``(b, *out_shape)``. Costs b matvecs."""
        ...

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply Aᵀ to ``(b, *out_shape)``; returns ``(b, *in_shape)``. Costs b matvecs."""
        ...

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LinearMap:
        """Return the same operator with arithmetic in ``dtype`` on ``device``."""
        ...
