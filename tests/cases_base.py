"""What the rows of the table of operators are made of."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from dense import Matrix

from spectool.linear import LinearMap

# On operators this small a second thread only waits for the first: 280 s became 50 s on a busy machine.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        name: Unique, readable; the first word is the kind.
        build: Makes a fresh map.
        dense: Makes its matrix ``(m, n)`` in float64 without the package.
        tags: Kind and features, for ``select``.
    """

    name: str
    build: Callable[[], LinearMap]
    dense: Callable[[], Matrix] = field(repr=False)
    tags: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name.replace(" ", "_")

    def sigma(self) -> Matrix:
        """All min(m, n) singular values by a dense float64 SVD, descending; cached."""
        return _sigma(self)


@functools.cache
def _sigma(case: Case) -> Matrix:
    return np.linalg.svd(case.dense(), compute_uv=False)


def row(
    name: str, build: Callable[[], LinearMap], dense: Callable[[], Matrix], tags: Sequence[str] = ()
) -> Case:
    """A case whose dense matrix is cached and whose kind is one of its tags."""
    return Case(name, build, functools.cache(dense), frozenset((name.split()[0], *tags)))


def rng(name: str) -> np.random.Generator:
    """A generator that depends on the name alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def gaussian(name: str, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A standard normal tensor times ``scale`` that depends on the name alone."""
    return torch.from_numpy(rng(name).standard_normal(shape) * scale).to(dtype)


def double(weight: torch.Tensor) -> Matrix:
    """The weight as stored, in float64."""
    return weight.detach().double().numpy()
