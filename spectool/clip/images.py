"""Images of pairs: the weight gradients L*(½(uᵢvⱼᵀ + uⱼvᵢᵀ)) of all pairs i ≤ j, as rows or as what they are made of.

Off-diagonal ones are multiplied by √2, so that svec(Y) · images = L*(U Y Vᵀ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spectool.clip.interior import smat, svec, svec_index


class Images(Protocol):
    """The images of p pairs."""

    @property
    def shape(self) -> tuple[int, int]:
        """(p(p+1)/2, entries of one)."""
        ...

    def rows(self) -> Tensor:
        """Return them as rows."""
        ...

    def gram(self) -> Tensor:
        """Return their inner products ``(p(p+1)/2, p(p+1)/2)``, float64."""
        ...

    def along(self, other: Tensor) -> Tensor:
        """Return their inner products with one more image, flat; float64."""
        ...

    def combined(self, y: Tensor) -> Tensor:
        """Return y · images, flat."""
        ...


@dataclass(frozen=True)
class DenseImages:
    """Rows that are held; gigabytes for weights of millions of entries."""

    made: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(p(p+1)/2, entries of one)."""
        return self.made.shape[0], self.made.shape[1]

    def rows(self) -> Tensor:
        """Return the rows."""
        return self.made

    def gram(self) -> Tensor:
        """Return the inner products."""
        return (self.made @ self.made.T).double()

    def along(self, other: Tensor) -> Tensor:
        """Return the inner products with one more."""
        return (self.made @ other).double()

    def combined(self, y: Tensor) -> Tensor:
        """Return their combination."""
        return y.to(self.made.dtype) @ self.made


@dataclass(frozen=True)
class RankImages:
    """Images uᵢvⱼᵀ of a matrix, which need not be held.

    Attributes:
        left: Rows uᵢ ``(p, m)``.
        right: Rows vᵢ ``(p, n)``.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(p(p+1)/2, entries of one)."""
        p = len(self.left)
        return p * (p + 1) // 2, self.left.shape[1] * self.right.shape[1]

    def rows(self) -> Tensor:
        """Return the rows, for small matrices."""
        units = torch.eye(self.shape[0], dtype=torch.float64)
        return torch.stack([self.combined(unit) for unit in units])

    def gram(self) -> Tensor:
        """Return ¼(aᵢₖbⱼₗ + aᵢₗbⱼₖ + aⱼₖbᵢₗ + aⱼₗbᵢₖ) with a = UᵀU, b = VᵀV, times the factors of i, j and k, l."""
        a, b = self.left.double(), self.right.double()
        a, b = a @ a.T, b @ b.T
        i, j, factors = svec_index(len(self.left))
        made = (
            a[i][:, i] * b[j][:, j]
            + a[i][:, j] * b[j][:, i]
            + a[j][:, i] * b[i][:, j]
            + a[j][:, j] * b[i][:, i]
        )
        return 0.25 * made * factors[:, None] * factors

    def along(self, other: Tensor) -> Tensor:
        """Return the inner products with one more."""
        matrix = other.reshape(self.left.shape[1], self.right.shape[1])
        made = (self.left @ matrix.to(self.left) @ self.right.T).double()
        return svec(0.5 * (made + made.T))

    def combined(self, y: Tensor) -> Tensor:
        """Return U Y Vᵀ, flat."""
        return (self.left.T @ smat(y.double(), len(self.left)).to(self.left) @ self.right).flatten()
