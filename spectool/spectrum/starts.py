"""Start vectors that depend on the weights, the geometry and the seed, and on nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from spectool.linear import LinearMap


def fingerprint(A: LinearMap) -> bytes:
    """Return a digest of the operator."""
    raise NotImplementedError


def generator(digest: bytes, seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator."""
    raise NotImplementedError
