"""``svds``: validates, chooses and explains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch

from spectool.errors import OperatorError, UsageError
from spectool.linear import (
    LinearMap,
    MatrixMap,
    all_finite,
    exact_arithmetic,
    fold,
    frobenius,
    prescale,
    size,
)
from spectool.progress import Progress, silent
from spectool.spectrum.dense import Solved, affordable, dense
from spectool.spectrum.estimate import Estimate
from spectool.spectrum.exact import closed_form
from spectool.spectrum.independent import is_trivial, parts_of, solve_parts
from spectool.spectrum.intervals import iterated, spectrum_of, with_levels, work
from spectool.spectrum.lanczos import lanczos
from spectool.spectrum.power import power, powerqr
from spectool.spectrum.stencil import convolution_of
from spectool.spectrum.types import Method, Spectrum

_SOLVERS: dict[str, Callable[..., Estimate]] = {"lanczos": lanczos, "power": power, "powerqr": powerqr}
_CERTIFIED_SIDE = 2048  # a certificate by Cholesky costs as much as all eigenvalues up to here


@dataclass(frozen=True)
class _Task:
    """Validated arguments of ``svds``."""

    k: int
    method: Method
    tol: float
    max_matvecs: int | None
    certify: bool
    seed: int
    vectors: bool
    progress: Progress


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
    task = _validated(A, k, method, tol, max_matvecs, certify, seed, vectors, progress)
    largest = min(size(A))
    note = f"k = {task.k} clamped to {largest}, the smaller side" if task.k > largest else ""
    task = _Task(**{**task.__dict__, "k": min(task.k, largest)})
    with exact_arithmetic(), torch.no_grad():
        _check_finite(A)
        B, factor = _moderate(A)
        solved = _solve(B, task)
        spectrum = spectrum_of(solved, B, task.k, seed=seed, fro=frobenius(B), note=note)
    return _rescaled(spectrum, factor)


def _solve(A: LinearMap, task: _Task) -> Solved:
    if task.method == "auto":
        return _with_vectors(A, task) if task.vectors else _automatic(A, task)
    if task.method == "exact":
        return _exactly(A, task)
    return _iterative(A, task, task.k, method=task.method, why="asked for")


def _automatic(A: LinearMap, task: _Task) -> Solved:
    """Structure, else independent problems, else dense, else Lanczos."""
    k, A = task.k, fold(A)
    if task.certify and isinstance(A, MatrixMap) and min(size(A)) <= _CERTIFIED_SIDE:
        return dense(A, k)
    solved = closed_form(A, k)
    if solved is not None:
        return solved
    conv = convolution_of(A)
    parts = parts_of(A, conv)
    if conv is not None and not is_trivial(parts, conv):
        spent = [0]

        def iterate(part: LinearMap, wanted: int) -> Solved:
            if affordable(part, work(part)):
                return dense(part, wanted)
            run = _iterative(part, task, wanted, method="lanczos", why="", spent=spent[0])
            spent[0] += run.matvecs
            return run

        solved = solve_parts(parts, k, dtype=A.dtype, device=A.device, iterate=iterate)
        if solved is not None:
            return solved
    if affordable(A, work(A)):
        return dense(A, k)
    m, n = size(A)
    return _iterative(A, task, k, method="lanczos", why=f"{m} × {n} without a structure that is known")


def _exactly(A: LinearMap, task: _Task) -> Solved:
    """Structure or dense, whatever it costs."""
    A_folded = A if task.vectors else fold(A)
    if not task.vectors:
        solved = closed_form(A_folded, task.k)
        if solved is not None:
            return solved
        conv = convolution_of(A_folded)
        parts = parts_of(A_folded, conv)
        if conv is not None and not is_trivial(parts, conv):
            solved = solve_parts(parts, task.k, dtype=torch.float64, device=A.device, iterate=dense)
            if solved is not None:
                return solved
    return dense(A_folded, task.k, vectors=task.vectors)


def _with_vectors(A: LinearMap, task: _Task) -> Solved:
    """Vectors from a dense factorisation or Lanczos; the values of a theorem where there is one."""
    if affordable(A, work(A)):
        return dense(A, task.k, vectors=True)
    m, n = size(A)
    solved = _iterative(A, task, task.k, method="lanczos", why=f"vectors of a {m} × {n} operator")
    theorem = closed_form(fold(A), task.k)
    return solved if theorem is None else with_levels(solved, theorem)


def _iterative(A: LinearMap, task: _Task, k: int, *, method: str, why: str, spent: int = 0) -> Solved:
    budget = None if task.max_matvecs is None else max(1, task.max_matvecs - spent)
    estimate = _SOLVERS[method](
        A, k, tol=task.tol, max_matvecs=budget, seed=task.seed, progress=task.progress
    )
    return iterated(
        A,
        k,
        estimate,
        method=method,
        why=why,
        certify=task.certify,
        seed=task.seed,
        progress=task.progress,
    )


# --- arguments ----------------------------------------------------------------------------------------------


def _validated(
    A: object,
    k: object,
    method: object,
    tol: object,
    max_matvecs: object,
    certify: object,
    seed: object,
    vectors: object,
    progress: object,
) -> _Task:
    """Check every argument of ``svds`` in one place."""
    if not isinstance(A, LinearMap):
        raise UsageError(
            f"svds needs a LinearMap, got {type(A).__name__}",
            hint="wrap a matrix in spectool.linear.MatrixMap",
        )
    count = _integer("k", k)
    if count < 1:
        raise UsageError(f"k must be at least 1, got {count}")
    if method not in get_args(Method):
        raise UsageError(f"unknown method {method!r}", hint="one of " + ", ".join(get_args(Method)))
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
        raise UsageError(f"tol must lie between 0 and 1, got {tol!r}")
    cap = None if max_matvecs is None else _integer("max_matvecs", max_matvecs)
    if cap is not None and cap < 1:
        raise UsageError(f"max_matvecs must be at least 1, got {cap}")
    for name, flag in (("certify", certify), ("vectors", vectors)):
        if not isinstance(flag, bool):
            raise UsageError(f"{name} must be True or False, got {flag!r}")
    number = _integer("seed", seed)
    if not 0 <= number < 1 << 63:
        raise UsageError(f"seed must be between 0 and 2**63 - 1, got {number}")
    if not callable(progress):
        raise UsageError(f"progress must be callable, got {type(progress).__name__}")
    return _Task(
        count,
        method,  # type: ignore[arg-type]
        float(tol),
        cap,
        bool(certify),
        number,
        bool(vectors),
        progress,
    )


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageError(f"{name} must be an integer, got {value!r}")
    return int(value.__index__())


def _check_finite(A: LinearMap) -> None:
    if all_finite(A):
        return
    tensors = list(_weights(A))
    bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
    total = sum(tensor.numel() for tensor in tensors)
    if bad:
        raise OperatorError(f"{bad} of {total} weights are NaN or infinite")
    raise OperatorError("the operator gives NaN or infinite values")


def _weights(A: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a map shows."""
    for name in ("weight", "scale"):
        if isinstance(getattr(A, name, None), torch.Tensor):
            yield getattr(A, name)
    yield from getattr(A, "factors", ())
    for part in (*getattr(A, "maps", ()), *([A.inner] if hasattr(A, "inner") else [])):
        yield from _weights(part)


def _moderate(A: LinearMap) -> tuple[LinearMap, float]:
    """Return (A/factor, factor), factor a power of two that is 1 unless squares could leave float64's range."""
    peaks = [float(tensor.detach().abs().max()) for tensor in _weights(A) if tensor.numel()]
    if all(peak == 0 or 1e-60 < peak < 1e60 for peak in peaks):
        return A, 1.0
    return prescale(A)


def _rescaled(spectrum: Spectrum, factor: float) -> Spectrum:
    if factor == 1.0:
        return spectrum
    from dataclasses import replace

    def scaled(entries: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(entry * factor for entry in entries)

    fro = None if spectrum.fro is None or math.isinf(spectrum.fro * factor) else spectrum.fro * factor
    return replace(
        spectrum,
        values=scaled(spectrum.values),
        lower=scaled(spectrum.lower),
        upper=scaled(spectrum.upper),
        fro=fro,
    )
