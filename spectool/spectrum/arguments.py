"""What ``svds`` checks before it starts: its arguments, and that the weights are numbers of a usable size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch

from spectool.errors import OperatorError, UsageError
from spectool.linear import LinearMap, all_finite, prescale
from spectool.linear.scaling import count_not_finite, largest
from spectool.progress import Progress
from spectool.spectrum.types import Method

_REACH = 200.0  # binary orders of magnitude that all parts together may span


@dataclass(frozen=True)
class Task:
    """Validated arguments of ``svds``."""

    k: int
    method: Method
    tol: float
    max_matvecs: int | None
    certify: bool
    seed: int
    vectors: bool
    progress: Progress


def validated(
    A: object,
    k: object,
    method: object,
    tol: object,
    max_matvecs: object,
    certify: object,
    seed: object,
    vectors: object,
    progress: object,
) -> Task:
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
    return Task(
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


def check_finite(A: LinearMap) -> None:
    """Raise OperatorError, with the number of bad entries, if a weight is NaN or infinite."""
    if all_finite(A):
        return
    tensors = list(weights(A))
    bad = sum(map(count_not_finite, tensors))
    total = sum(tensor.numel() for tensor in tensors)
    if bad:
        raise OperatorError(f"{bad} of {total} weights are NaN or infinite")
    raise OperatorError("the operator gives NaN or infinite values")


def weights(A: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a map shows."""
    for name in ("weight", "scale"):
        if isinstance(getattr(A, name, None), torch.Tensor):
            yield getattr(A, name)
    yield from getattr(A, "factors", ())
    for part in (*getattr(A, "maps", ()), *([A.inner] if hasattr(A, "inner") else [])):
        yield from weights(part)


def moderate(A: LinearMap) -> tuple[LinearMap, float]:
    """Return (A/factor, factor), factor a power of two that is 1 unless squares could leave float64's range.

    Squares of products of all parts count. The factor is 0 where it is below float64's range.
    """
    peaks = [largest(tensor) for tensor in weights(A)]
    reach = sum(abs(math.log2(peak)) for peak in peaks if peak)
    if reach <= _REACH:
        return A, 1.0
    return prescale(A)
