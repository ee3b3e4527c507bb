"""The leading singular triplets of a map, from a warm start: what one round of a projection looks at."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from spectool.errors import OperatorError
from spectool.linear import LinearMap


@dataclass(frozen=True)
class Leading:
    """Approximate leading triplets, largest first.

    Attributes:
        values: σ̂ ``(b,)``; lower bounds on the true ones, up to rounding.
        left: Rows u ``(b, *out_shape)`` of length 1 where σ̂ > 0, with A·v = σ̂·u.
        right: Orthonormal rows v ``(b, *in_shape)``.
        residual: Largest ‖Aᵀu − σ̂v‖/σ̂₁ over the triplets that had to converge.
        applications: Applications of A plus of Aᵀ.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    residual: float
    applications: int


def leading(
    A: LinearMap,
    count: int,
    source: torch.Generator,
    *,
    start: Tensor | None = None,
    level: float = 0.0,
    tol: float = 1e-3,
    excess: float = 0.0,
    blocks: int = 60,
    depth: int = 4,
) -> Leading:
    """Return ``count`` leading triplets by block Lanczos with restarts on AᵀA.

    Args:
        A: The map.
        count: Block size and number of triplets; clamped to the input's size.
        source: Generator of the random rows that fill a start up.
        start: Rows to start from ``(any, size)``.
        level: Triplets below it need not converge; the first always has to.
        tol: Relative residual to reach.
        excess: Be content with a residual of ``excess`` times what the first is above ``level``, relatively.
        blocks: Most blocks to apply, each ``count`` pairs of applications.
        depth: Blocks in the basis beside what a restart keeps.

    Raises:
        OperatorError: If the map gives NaN or infinite values.
    """
    n = prod(A.in_shape)
    count = min(count, n)
    block = torch.zeros(0, n, dtype=A.dtype, device=A.device) if start is None else start.to(A.dtype)
    if len(block) < count:
        fill = torch.randn(count - len(block), n, generator=source, dtype=torch.float64)
        block = torch.cat([block, fill.to(block)])
    basis = images = block[:0]
    images = torch.zeros(0, prod(A.out_shape), dtype=A.dtype, device=A.device)
    spent, block = 0, _fresh(block, basis)
    while True:
        # Invariant: the rows of ``basis`` are orthonormal and ``images`` are what A makes of them.
        moved = A.matvec(block.reshape(len(block), *A.in_shape)).reshape(len(block), -1)
        basis, images = torch.cat([basis, block]), torch.cat([images, moved])
        gram = images @ images.T
        if not bool(gram.isfinite().all()):
            raise OperatorError(
                "the operator gives NaN or infinite values", hint="look at its weights and biases"
            )
        eigenvalues, turn = torch.linalg.eigh(0.5 * (gram + gram.T))
        eigenvalues, turn = eigenvalues.flip(0).clamp_min(0), turn.flip(1)
        values = eigenvalues[:count].sqrt()
        right, left = turn[:, :count].T @ basis, turn[:, :count].T @ images
        left = left / values.clamp_min(torch.finfo(A.dtype).tiny)[:, None]
        back = A.rmatvec(left.reshape(len(left), *A.out_shape)).reshape(len(left), -1)
        spent += len(block) + len(left)
        errors = back - values[:, None] * right
        norms = torch.linalg.vector_norm(errors, dim=1) / values[0].clamp_min(torch.finfo(A.dtype).tiny)
        wanted = values >= level
        wanted[0] = True
        residual, blocks = float(norms[wanted].max()), blocks - 1
        enough = max(tol, excess * (float(values[0]) / level - 1.0) if level > 0 else 0.0)
        if len(basis) > (depth + 1) * count:
            basis, images = turn[:, : 2 * count].T @ basis, turn[:, : 2 * count].T @ images
        # Nothing may be left that is new: of a matrix of low rank all triplets are exact at once.
        done = residual <= enough or blocks <= 0
        block = block[:0] if done else _fresh(errors[norms > 0.1 * tol], basis)
        if not len(block):
            shaped = (left.reshape(-1, *A.out_shape), right.reshape(-1, *A.in_shape))
            return Leading(values, *shaped, residual, spent)


def _fresh(block: Tensor, basis: Tensor) -> Tensor:
    """Return orthonormal rows that span what ``block`` adds to the orthonormal rows of ``basis``."""
    tiny = torch.finfo(block.dtype).tiny
    for _ in range(2):
        block = block / torch.linalg.vector_norm(block, dim=1, keepdim=True).clamp_min(tiny)
        block = block - (block @ basis.T) @ basis
        q, r = torch.linalg.qr(block.T)
        keep = r.diagonal().abs() > 1e3 * torch.finfo(block.dtype).eps
        block = q.T[keep]
    return block[: basis.shape[1] - len(basis)]
