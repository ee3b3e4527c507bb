"""Parts of tensors: their names, and constants cut out of other constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from spectool.graph.types import Shape

if TYPE_CHECKING:
    import numpy as np
    import torch

Block = tuple[tuple[int, int], ...]
"""(start, stop) of the leading axes; the axes behind them are taken whole."""


@dataclass(frozen=True)
class Derived:
    """A constant cut out of another one.

    Attributes:
        source: Name of the constant it is cut from.
        blocks: What is taken, in order; empty means everything.
        axis: Axis along which several blocks are joined.
        shape: Shape of the result.
    """

    source: str
    blocks: tuple[Block, ...]
    axis: int
    shape: Shape

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of ``tensor``."""
        if not self.blocks:
            return tensor.reshape(self.shape)
        pieces = [tensor[tuple(slice(start, stop) for start, stop in block)] for block in self.blocks]
        if len(pieces) == 1:
            return pieces[0].reshape(self.shape)
        import torch

        return torch.cat(pieces, self.axis).reshape(self.shape)


def with_parts(
    load: Callable[[str], torch.Tensor], parts: Mapping[str, Derived]
) -> Callable[[str], torch.Tensor]:
    """Return a loader that also knows ``parts``, which may be parts of parts."""

    def read(name: str) -> torch.Tensor:
        part = parts.get(name)
        return load(name) if part is None else part.cut(read(part.source))

    return read


def ranges(sorted_indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return the (start, stop) runs of an ascending sequence of distinct indices."""
    runs: list[tuple[int, int]] = []
    for index in sorted_indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def block_of(indices: np.ndarray, shape: Shape) -> Block | None:
    """Return the block of a tensor of ``shape`` that distinct flat ``indices`` fill, or None if they fill none."""
    import numpy as np

    if indices.size == 0:
        return None
    coordinates = np.unravel_index(indices.reshape(-1), shape)
    block = tuple((int(axis.min()), int(axis.max()) + 1) for axis in coordinates)
    return block if prod(stop - start for start, stop in block) == indices.size else None


def suffix(block: Block, shape: Shape) -> str:
    """Return ``[0:64]`` for a block of a tensor of ``shape``; empty for the whole tensor.

    Axes taken whole are left out at the end and, where they have one entry, at the front.
    """
    named = list(zip(block, shape, strict=False))
    while named and named[-1][0] == (0, named[-1][1]):
        named.pop()
    while named and named[0][1] == 1:
        named.pop(0)
    texts = []
    for position, ((start, stop), size) in enumerate(named):
        if (start, stop) == (0, size):
            texts.append(":")
        elif stop == start + 1 and position + 1 < len(named):
            texts.append(str(start))
        else:
            texts.append(f"{start}:{stop}")
    return f"[{','.join(texts)}]" if texts else ""
