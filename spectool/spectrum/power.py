"""Power iteration with deflation, and PowerQR."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectool.progress import Progress, silent

if TYPE_CHECKING:
    from spectool.linear import LinearMap
    from spectool.spectrum.estimate import Estimate


def power(
    A: LinearMap,
    k: int,
    *,
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Estimate:
    """Compute the k largest singular triplets one by one."""
    raise NotImplementedError


def powerqr(
    A: LinearMap,
    k: int,
    *,
    iterations: int | None = None,
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Estimate:
    """Compute the k largest singular triplets by orthogonal iteration on AᵀA + μI."""
    raise NotImplementedError
