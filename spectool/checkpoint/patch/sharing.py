"""Which tensors change with those that are edited, because they share some of their bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from itertools import accumulate
from pathlib import Path

from spectool.checkpoint.dtypes import ITEMSIZE
from spectool.checkpoint.read import span
from spectool.checkpoint.types import Checkpoint, TensorRef


def sharing(checkpoint: Checkpoint, edited: Collection[str]) -> tuple[str, ...]:
    """Return the tensors, not ``edited`` themselves, of which some bytes belong to an edited one, in file order."""
    by_file: dict[Path, list[tuple[int, int, TensorRef]]] = {}
    for name in edited:
        ref = checkpoint.tensors[name]
        if ref.position is not None and ref.numel:
            by_file.setdefault(ref.file, []).append((*_extent(ref), ref))
    for runs in by_file.values():
        runs.sort(key=lambda run: run[:2])
    starts = {file: [start for start, _, _ in runs] for file, runs in by_file.items()}
    # How far any run up to this one reaches.
    found = []
    reach = {file: list(accumulate((stop for _, stop, _ in runs), max)) for file, runs in by_file.items()}
    for name, ref in checkpoint.tensors.items():
        if name in edited or ref.file not in by_file or ref.position is None or not ref.numel:
            continue
        begin, end = _extent(ref)
        index = bisect_left(starts[ref.file], end) - 1
        while index >= 0 and reach[ref.file][index] > begin:
            if by_file[ref.file][index][1] > begin and _meet(by_file[ref.file][index][2], ref):
                found.append(name)
                break
            index -= 1
    return tuple(found)


def _extent(ref: TensorRef) -> tuple[int, int]:
    start = ref.base + ref.offset
    return start, start + span(ref.shape, ref.stride) * ITEMSIZE[ref.dtype]


def _meet(one: TensorRef, other: TensorRef) -> bool:
    """Tell whether two views whose extents meet have a byte in common: columns of one matrix may have none."""
    if all(span(ref.shape, ref.stride) == ref.numel for ref in (one, other)):
        return True  # neither leaves any byte of its extent out; tied tensors, mostly, which may be large
    import torch

    start = min(_extent(one)[0], _extent(other)[0])
    marks = torch.zeros(max(_extent(one)[1], _extent(other)[1]) - start, dtype=torch.bool)

    def octets(ref: TensorRef) -> torch.Tensor:
        size = ITEMSIZE[ref.dtype]
        stride = (*(step * size for step in ref.stride), 1)
        return marks[_extent(ref)[0] - start :].as_strided((*ref.shape, size), stride)

    octets(one).fill_(True)
    return bool(octets(other).any())
