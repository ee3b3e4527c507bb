"""Start vectors that depend on the weights, the geometry and the seed, and on nothing else.

A name does not change a result, a device does not (generation is on the CPU in float64), and nobody can prepare
a file against the start vector without knowing the seed.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spectool.linear import absorb

if TYPE_CHECKING:
    from spectool.linear import LinearMap

_DATA = (
    "weight",
    "geometry",
    "scale",
    "factor",
    "factors",
    "maps",
    "inner",
    "channels",
    "axis",
    "shape",
    "identity",
)
"""Attributes that define a map, by the names the maps of ``spectool.linear`` give them."""


def fingerprint(A: LinearMap) -> bytes:
    """Return a SHA-256 digest of the operator: its class, shapes, geometry and the bytes of its weights.

    Weights are hashed as stored, blockwise; the arithmetic type and the device do not enter. A function
    is hashed by its shapes and by the ``identity`` that its maker gave it, if it did: applying it to a fixed vector
    would tell more, but not the same on every device.
    """
    digest = hashlib.sha256()
    _absorb(digest, A)
    return digest.digest()


class Stream:
    """Independent standard normal numbers from a counter-based generator with a key of 128 bits.

    torch's own CPU generator keeps 32 bits of its seed: 4·10⁹ start vectors in all, too few for bounds that are to
    fail once in 10⁹.

    Args:
        key: Which of the 2¹²⁸ streams.
    """

    def __init__(self, key: int) -> None:
        self._numbers = np.random.Generator(np.random.Philox(key=key))

    def normal(self, rows: int, size: int) -> torch.Tensor:
        """Return ``(rows, size)`` numbers in float64 on the CPU, the next ones of the stream."""
        return torch.from_numpy(self._numbers.standard_normal((rows, size)))


def generator(digest: bytes, seed: int, purpose: str) -> Stream:
    """Return the source keyed by ``digest``, ``seed`` and ``purpose``; another purpose, other numbers."""
    text = f"{seed}:{purpose}".encode()
    return Stream(int.from_bytes(hashlib.sha256(digest + text).digest()[:16], "big"))


def _absorb(digest: hashlib._Hash, item: Any) -> None:
    """Feed one value to the digest; tensors by their bytes, maps by their defining attributes."""
    if isinstance(item, torch.Tensor):
        absorb(digest, item)
    elif hasattr(item, "matvec"):
        digest.update(f"map{type(item).__name__}{tuple(item.in_shape)}{tuple(item.out_shape)}".encode())
        for name in _DATA:
            if hasattr(item, name):
                digest.update(name.encode())
                _absorb(digest, getattr(item, name))
    elif isinstance(item, (tuple, list)):
        digest.update(f"sequence{len(item)}".encode())
        for part in item:
            _absorb(digest, part)
    else:
        digest.update(repr(item).encode())
