"""Thick-restart block Lanczos."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectool.progress import Progress, silent

if TYPE_CHECKING:
    from spectool.linear import LinearMap
    from spectool.spectrum.estimate import Estimate


def lanczos(
    A: LinearMap,
    k: int,
    *,
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Estimate:
    """Compute the k largest singular triplets of A by thick-restart Lanczos, verified and polished."""
    raise NotImplementedError
