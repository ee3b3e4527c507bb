"""``svds``: validates, chooses and explains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from spectool.errors import OperatorError
from spectool.linear import (
    LinearMap,
    MatrixMap,
    exact_arithmetic,
    fold,
    frobenius,
    size,
)
from spectool.linear.memory import enough_memory
from spectool.progress import Progress, silent
from spectool.spectrum.arguments import Task, check_finite, moderate, validated
from spectool.spectrum.cholesky import MOST_WORK
from spectool.spectrum.dense import Solved, affordable, dense, on_host
from spectool.spectrum.estimate import Estimate
from spectool.spectrum.exact import closed_form
from spectool.spectrum.independent import solve_parts
from spectool.spectrum.intervals import iterated, spectrum_of, with_levels, work
from spectool.spectrum.lanczos import lanczos
from spectool.spectrum.parts import is_trivial, parts_of
from spectool.spectrum.power import power, powerqr
from spectool.spectrum.stencil import convolution_of
from spectool.spectrum.types import Method, Spectrum

_SOLVERS: dict[str, Callable[..., Estimate]] = {"lanczos": lanczos, "power": power, "powerqr": powerqr}
_CERTIFIED_SIDE = 2048
_LOST = 2.0**-1000


@enough_memory()
def svds(
    A: LinearMap,
    k: int = 8,
    *,
    method: Method = "auto",
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    certify: bool = False,
    seed: int = 0,
    vectors: bool = False,
    progress: Progress = silent,
) -> Spectrum:
    """Return the k largest singular values of A, with multiplicity, each enclosed.

    ``auto`` takes, in this order, and says which in ``why``:

    1. a structure theorem (``exact.closed_form``): no iteration, no matvecs;
    2. independent problems (groups, classes of a dilation), each by this list again;
    3. a dense factorisation, if the smaller side is at most 1024 and the cost sensible (min(m, n) matvecs, none
       for a stored matrix);
    4. thick-restart Lanczos, verified and polished: typically 120–400 pairs of matvecs for k = 8, at most
       200 + 100·k pairs unless ``max_matvecs`` says otherwise.

    The other methods are forced on A as it is. Whatever the method, every value gets its interval: exact ones by
    rounding, iterated ones by Rayleigh–Ritz from below and by the cheapest valid bound from above
    (``intervals.iterated``). Smallest wins. With ``certify`` the upper ends are deterministic wherever a
    deterministic bound exists, even where the probabilistic one is smaller: a proof is what was asked for.

    Args:
        A: The map. Its weights are checked, not changed.
        k: How many; clamped to min(m, n) with a note.
        method: ``auto``, ``exact`` (structure or dense, at any size that fits in memory), ``lanczos``, ``power``
            or ``powerqr``.
        tol: Relative residual ‖r‖/σ₁ to reach.
        max_matvecs: Cap on single-vector applications of A plus Aᵀ; None for the solver's own.
        certify: Whether to add a deterministic upper bound wherever one exists.
        seed: Of the start vectors.
        vectors: Whether to return singular vectors; structure theorems then only give the values.
        progress: Receives steps.

    Raises:
        UsageError: If an argument cannot be used.
        OperatorError: If weights are NaN or infinite, or ``exact`` would need more memory than there is.

    Example:
        >>> import torch
        >>> from spectool.linear import MatrixMap
        >>> result = svds(MatrixMap(torch.diag(torch.tensor([3.0, 2.0, 2.0]))), k=3)
        >>> [round(value, 9) for value in result.values], result.upper_kind
        ([3.0, 2.0, 2.0], 'exact')
    """
    task = validated(A, k, method, tol, max_matvecs, certify, seed, vectors, progress)
    largest = min(size(A))
    note = f"k = {task.k} clamped to {largest}, the smaller side" if task.k > largest else ""
    if largest == 0:
        raise OperatorError(f"the operator is empty: {A.in_shape} to {A.out_shape}")
    task = replace(task, k=min(task.k, largest))
    with exact_arithmetic(), torch.no_grad():
        check_finite(A)
        B, factor = moderate(A)
        try:
            solved = _solve(B, task)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise OperatorError(
                "the solver broke down: the operator's values overflow",
                hint="scale the weights, or compute in float64",
            ) from error
        if not vectors:
            solved = replace(solved, left=None, right=None)
        spectrum = spectrum_of(solved, B, task.k, seed=seed, fro=frobenius(B), note=note)
    return _rescaled(spectrum, factor)


def _solve(A: LinearMap, task: Task) -> Solved:
    """Dispatch on the method."""
    if task.method == "auto":
        return _with_vectors(A, task) if task.vectors else _automatic(A, task)
    if task.method == "exact":
        return _exactly(A, task)
    return _iterative(A, task, method=task.method, why="asked for")


def _automatic(A: LinearMap, task: Task) -> Solved:
    """Structure, else independent problems, else dense, else Lanczos."""
    k, A = task.k, fold(A)
    if task.certify and isinstance(A, MatrixMap) and _certified_by_spectrum(*size(A)):
        return dense(A, k)
    solved = closed_form(on_host(A), k)
    if solved is not None:
        return solved
    conv = convolution_of(A)
    parts = [] if conv is None else parts_of(conv)
    spent = [0]
    if conv is not None and not is_trivial(parts, conv):

        def iterate(part: LinearMap, wanted: int) -> Solved:
            run = _automatic(part, replace(task, k=wanted, max_matvecs=_left(task, spent[0])))
            spent[0] += run.matvecs
            return run

        solved = solve_parts(parts, k, dtype=A.dtype, device=A.device, iterate=iterate)
        if solved is not None:
            return solved
    if affordable(A, work(A)):
        return dense(A, k)
    m, n = size(A)
    why = f"{m} × {n} without a structure that is known"
    task = replace(task, max_matvecs=_left(task, spent[0]))
    whole = _iterative(A, task, method="lanczos", why=why)
    return replace(whole, matvecs=whole.matvecs + spent[0])


def _certified_by_spectrum(m: int, n: int) -> bool:
    """Whether all eigenvalues of the Gram matrix cost hardly more than the Cholesky test that needs it too."""
    return min(m, n) <= _CERTIFIED_SIDE and 2.0 * m * n * min(m, n) <= MOST_WORK


def _exactly(A: LinearMap, task: Task) -> Solved:
    """Structure or dense, whatever it costs."""
    if task.vectors:
        return dense(A, task.k, vectors=True)
    A = fold(A)
    solved = closed_form(on_host(A), task.k)
    conv = convolution_of(A)
    if solved is None and conv is not None:
        parts = parts_of(conv)
        if not is_trivial(parts, conv):
            solved = solve_parts(parts, task.k, dtype=torch.float64, device=A.device, iterate=dense)
    return dense(A, task.k) if solved is None else solved


def _with_vectors(A: LinearMap, task: Task) -> Solved:
    """Vectors from a dense factorisation or Lanczos; the values of a theorem where there is one."""
    if affordable(A, work(A)):
        return dense(A, task.k, vectors=True)
    m, n = size(A)
    solved = _iterative(A, task, method="lanczos", why=f"vectors of a {m} × {n} operator")
    theorem = closed_form(on_host(fold(A)), task.k)
    return solved if theorem is None else with_levels(solved, theorem)


def _left(task: Task, spent: int) -> int | None:
    """Return what is left of the cap on matvecs, at least 1."""
    return None if task.max_matvecs is None else max(1, task.max_matvecs - spent)


def _iterative(A: LinearMap, task: Task, *, method: str, why: str) -> Solved:
    estimate = _SOLVERS[method](
        A, task.k, tol=task.tol, max_matvecs=task.max_matvecs, seed=task.seed, progress=task.progress
    )
    return iterated(
        A,
        task.k,
        estimate,
        method=method,
        why=why,
        certify=task.certify,
        seed=task.seed,
        progress=task.progress,
    )


def _rescaled(spectrum: Spectrum, factor: float) -> Spectrum:
    """Return the spectrum of factor·A: intervals are rounded outwards where they leave float64's normal range.

    Raises:
        OperatorError: If σ₁ itself is beyond it.
    """
    if factor == 1.0:
        return spectrum
    values = tuple(value * factor for value in spectrum.values)
    if math.isinf(values[0]):
        raise OperatorError(
            "the largest singular value is beyond float64's range", hint="scale the weights down"
        )
    # Entries far below the largest may have underflowed when they were divided: by at most 2^-1075 each, which parts
    # of the operator, scaled to size 1, enlarge by no more than their number of entries.
    lost = _LOST if factor > 1.0 else 0.0
    lower = tuple(_rounded(max(end - lost, 0.0), factor, 0.0) for end in spectrum.lower)
    upper = tuple(_rounded(end + lost, factor, math.inf) for end in spectrum.upper)
    fro = None if spectrum.fro is None or math.isinf(spectrum.fro * factor) else spectrum.fro * factor
    return replace(spectrum, values=values, lower=lower, upper=upper, fro=fro)


def _rounded(end: float, factor: float, towards: float) -> float:
    """Return end·factor, the factor a power of two (0 for one below float64's range), rounded in one direction."""
    scaled = end * factor
    if math.isinf(scaled) or not end:
        return scaled
    back = scaled / factor if factor else 0.0
    wrong = back < end if towards > end else back > end
    return math.nextafter(scaled, towards) if wrong else scaled
