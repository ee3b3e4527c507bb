"""A dense matrix, kept in its stored type."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spectool.errors import OperatorError
from spectool.linear.compose import Scaled
from spectool.linear.protocol import LinearMap
from spectool.linear.scaling import all_finite, check_real, frobenius, power_of_two, scaled_weight

_SMALL = 1 << 22  # entries up to which a copy in the arithmetic type is kept; blocks would be slower
_BLOCK_CPU = 1 << 21  # bytes of one upcast block: what the second cache holds
_BLOCK_OTHER = 1 << 28  # on an accelerator: enough work per call
_SAFE_FACTOR = 2.0**100  # factors up to here can be moved to the vectors without leaving float32


class MatrixMap:
    """x ↦ Wx for a stored matrix; no bias.

    A large weight of another type is upcast block by block inside the cache, never as a whole; one up to
    4 M entries is upcast once. ``normal_matvec`` reads the weight once for both products: 0.6–0.85 times the
    time of two float32 products on a 4096² weight, from float32 and half types alike.

    Differentiable in its weight if that requires a gradient; it is then read anew at every application. Else
    it must not change afterwards.

    Args:
        weight: ``(m, n)``, any float type, any strides.
        dtype: Arithmetic type.
        device: Device of the vectors; the weight is moved there in its stored type.

    Raises:
        OperatorError: If the weight is not a real matrix.

    Example:
        >>> MatrixMap(torch.tensor([[3.0, 4.0]])).normal_matvec(torch.tensor([[1.0, 0.0]])).tolist()
        [[9.0, 12.0]]
    """

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if weight.ndim != 2 or 0 in weight.shape:
            raise OperatorError(f"a matrix has two axes that are not empty, got shape {tuple(weight.shape)}")
        check_real(weight)
        self.device, self.dtype = torch.device(device), dtype
        self.weight = weight.to(self.device)
        self.out_shape, self.in_shape = (int(weight.shape[0]),), (int(weight.shape[1]),)
        # Blocks are runs of memory: rows of W, or of Wᵀ where that is how it lies in memory.
        self._flipped = self.weight.stride(0) == 1 and self.weight.stride(1) > 1
        self._copy: torch.Tensor | None = None

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply W to ``(b, n)``."""
        return self._combine(x) if self._flipped else self._project(x)

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply Wᵀ to ``(b, m)``."""
        return self._project(y) if self._flipped else self._combine(y)

    def normal_matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply WᵀW to ``(b, n)``; one pass over the weight unless it lies in memory by columns."""
        return self.rmatvec(self.matvec(x)) if self._flipped else self._both(x)

    def conormal_matvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply WWᵀ to ``(b, m)``; one pass over the weight only if it lies in memory by columns."""
        return self._both(y) if self._flipped else self.matvec(self.rmatvec(y))

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> MatrixMap:
        """Return the same matrix with arithmetic in ``dtype`` on ``device``; shares the stored weight."""
        return MatrixMap(self.weight, dtype=dtype or self.dtype, device=device or self.device)

    def frobenius(self) -> float:
        """Return ‖W‖_F in float64, slab by slab."""
        return frobenius(self.weight)

    def all_finite(self) -> bool:
        """Return whether the weight holds no NaN and no infinity; one pass, no copy."""
        return all_finite(self.weight)

    def prescale(self) -> tuple[LinearMap, float]:
        """Return (map with entries of magnitude ~1, power of two that was taken out).

        The weight is not copied: the factor goes to the vectors, unless it is so far out that the weight itself
        would not survive the cast to float32.
        """
        factor = power_of_two(self.weight)
        if factor == 1.0:
            return self, factor
        if 1 / _SAFE_FACTOR <= factor <= _SAFE_FACTOR:
            return Scaled(self, 1 / factor), factor
        return MatrixMap(scaled_weight(self.weight, factor), dtype=self.dtype, device=self.device), factor

    # --- products with V, the weight as it lies in memory: W, or Wᵀ if that has the contiguous rows ---

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """Return xVᵀ."""
        whole = self._whole()
        if whole is not None:
            return x @ whole.T
        return torch.cat([x @ block.T for block in self._blocks()], dim=1)

    def _combine(self, y: torch.Tensor) -> torch.Tensor:
        """Return yV."""
        whole = self._whole()
        if whole is not None:
            return y @ whole
        result, start = self._zeros(y.shape[0]), 0
        for block in self._blocks():
            stop = start + block.shape[0]
            result.addmm_(y[:, start:stop], block)
            start = stop
        return result

    def _both(self, x: torch.Tensor) -> torch.Tensor:
        """Return xVᵀV, each block of rows used twice while it is in the cache."""
        if self.weight.numel() <= _SMALL:
            return self._combine(self._project(x))
        result = self._zeros(x.shape[0])
        for block in self._blocks():
            result.addmm_(x @ block.T, block)
        return result

    def _zeros(self, b: int) -> torch.Tensor:
        return torch.zeros((b, self._major().shape[1]), dtype=self.dtype, device=self.device)

    def _major(self) -> torch.Tensor:
        return self.weight.T if self._flipped else self.weight

    def _whole(self) -> torch.Tensor | None:
        """Return V in the arithmetic type if that costs little memory, else None."""
        if self.weight.dtype == self.dtype:
            return self._major()
        if self.weight.numel() > _SMALL:
            return None
        if self.weight.requires_grad:
            return self._major().to(self.dtype)
        if self._copy is None:
            self._copy = self._major().to(self.dtype)
        return self._copy

    def _blocks(self) -> Iterator[torch.Tensor]:
        """Yield V in runs of rows, upcast; each only until the next, which takes its memory."""
        major = self._major()
        room = _BLOCK_CPU if self.device.type == "cpu" else _BLOCK_OTHER
        # Fewer than 16 rows would spend the time on calls; 64 to 128 were best for 4096 columns.
        rows = max(16, room // (major.shape[1] * self.dtype.itemsize))
        parts = (major[start : start + rows] for start in range(0, major.shape[0], rows))
        if self.weight.dtype == self.dtype:
            yield from parts
        elif self.weight.requires_grad:  # a recording needs memory of its own for each
            yield from (part.to(self.dtype) for part in parts)
        else:
            shape = (min(rows, major.shape[0]), major.shape[1])
            block = torch.empty(shape, dtype=self.dtype, device=self.device)
            for part in parts:
                yield block[: part.shape[0]].copy_(part)
