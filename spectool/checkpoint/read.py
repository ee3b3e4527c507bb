"""From a ``TensorRef`` to a torch tensor: only the bytes between its first and last element are read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectool.checkpoint.dtypes import ITEMSIZE, torch_dtype
from spectool.checkpoint.inert import MOST_AXES
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.source import Source
from spectool.checkpoint.types import TensorRef
from spectool.errors import CheckpointError, CorruptFile

if TYPE_CHECKING:
    import torch


class Reader:
    """Reads tensors of one checkpoint.

    Args:
        sources: File → its bytes.
        inside: Record → how to read it, for tensors whose bytes have no position of their own.

    Attributes:
        sources: File → its bytes.
    """

    def __init__(
        self, sources: Mapping[Path, Source], inside: Mapping[str, Callable[[], torch.Tensor]] | None = None
    ) -> None:
        self.sources = dict(sources)
        self._inside = dict(inside or {})

    def __call__(self, ref: TensorRef) -> torch.Tensor:
        """Return the tensor on the CPU in its stored type and stride.

        Raises:
            CorruptFile: If its bytes are not all there or the file changed since it was opened.
            CheckpointError: If the installed torch lacks its element type.
        """
        try:
            dtype = torch_dtype(ref.dtype)
        except KeyError:
            raise CheckpointError(
                f"{ref.file}: tensor {ref.name!r} has type {ref.dtype}, which this torch does not know",
                hint="install a newer torch",
            ) from None
        if ref.base < 0:
            return self._inside[ref.record]()
        return _strided(self.sources[ref.file], ref, dtype)


class ShardReader:
    """Reads tensors of a checkpoint in several files.

    Args:
        readers: File → the reader of that shard.

    Attributes:
        sources: File → its bytes, all shards together.
    """

    def __init__(self, readers: Mapping[Path, Callable[[TensorRef], torch.Tensor] | None]) -> None:
        self._readers = dict(readers)
        self.sources: dict[Path, Source] = {}
        for reader in self._readers.values():
            self.sources.update(getattr(reader, "sources", {}))

    def __call__(self, ref: TensorRef) -> torch.Tensor:
        """Return one tensor; errors as those of its shard's reader."""
        reader = self._readers[ref.file]
        if reader is None:
            raise ValueError(f"{ref.file} was opened without a reader")
        return reader(ref)


def _strided(source: Source, ref: TensorRef, dtype: torch.dtype) -> torch.Tensor:
    import torch

    if ref.numel == 0:
        return torch.empty(ref.shape, dtype=dtype)
    size = ITEMSIZE[ref.dtype]
    flat = torch.empty(span(ref.shape, ref.stride) * size, dtype=torch.uint8)
    # A window's source counts from its own beginning, a ref from that of the file.
    start = ref.base + ref.offset - source.base
    octets: Any = flat.numpy()
    source.read_into(start, memoryview(octets), f"tensor {ref.name!r}")
    return native(flat, dtype, ref.byteorder).as_strided(ref.shape, ref.stride)


def native(octets: torch.Tensor, dtype: torch.dtype, byteorder: str) -> torch.Tensor:
    """Return raw bytes as elements of ``dtype`` in this machine's byte order."""
    size = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    if byteorder != sys.byteorder and size > 1:
        octets = octets.view(-1, size).flip(1).reshape(-1)
    return octets.view(dtype)


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return how many elements lie between the first and the last one, both included; 0 if there are none."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def check_view(
    what: str,
    dtype: str,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    lead: int,
    nbytes: int,
    limits: Limits,
) -> None:
    """Refuse a view that leaves its storage.

    Args:
        what: File and tensor, for the message.
        dtype: Element type.
        shape: Shape of the view.
        stride: Its stride in elements.
        lead: Bytes before its first element.
        nbytes: Bytes of the storage.
        limits: Bounds for views that repeat their storage.

    Raises:
        CorruptFile: If shape, stride or offset are impossible.
        LimitExceeded: If it repeats a small storage very often.
    """
    size = ITEMSIZE[dtype]
    if len(shape) != len(stride) or len(shape) > MOST_AXES or min((*shape, *stride, lead), default=0) < 0:
        raise CorruptFile(f"{what} has the impossible shape {shape} with stride {stride}")
    needed = lead + span(shape, stride) * size
    if 0 not in shape and needed > nbytes:
        raise CorruptFile(
            f"{what} of shape {shape} needs {needed} bytes of a storage that has {nbytes}",
            hint="the file is damaged: copy or download it again",
        )
    count = size
    for length in shape:
        count *= length
    if count > nbytes:
        limits.check("expanded_bytes", count, f"{what}, which repeats its storage,")


def find_aliases(refs: Iterable[TensorRef]) -> dict[str, str]:
    """Return name → first name for refs that are the same view of the same bytes."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for ref in refs:
        if ref.nbytes == 0:
            continue
        view = (ref.file, ref.storage, ref.dtype, ref.lead, ref.shape, ref.stride)
        name = first.setdefault(view, ref.name)
        if name != ref.name:
            aliases[ref.name] = name
    return aliases
