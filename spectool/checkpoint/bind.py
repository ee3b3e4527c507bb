"""From tensors in a pickle to refs: where the container keeps their storages, checked against the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectool.checkpoint.dtypes import ITEMSIZE, torch_dtype, unit
from spectool.checkpoint.inert import Storage, Tensor
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.read import check_view, native
from spectool.checkpoint.types import TensorRef
from spectool.errors import CorruptFile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """Where a container keeps one storage.

    Attributes:
        record: Zip member; empty if the file has none.
        base: Position in the file where the record begins; 0 if there is none.
        begin: Byte of the record (or of the file) where the storage begins.
        nbytes: Its length.
        byteorder: ``little`` or ``big``.
    """

    record: str
    base: int
    begin: int
    nbytes: int
    byteorder: str = "little"


@dataclass
class Bound:
    """Refs for the tensors of one pickle.

    Attributes:
        tensors: Name → ref.
        unread: Name → why its values cannot be read.
        quantization: Name → scheme, scale, zero point, axis; scale and zero point may be refs.
        inside: Record → how to read it, for arrays that stand in the pickle itself.
        arrays: Identity of such an array's bytes → first record that holds it.
    """

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    quantization: dict[str, dict[str, Any]] = field(default_factory=dict)
    inside: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    arrays: dict[int, str] = field(default_factory=dict)

    def update(self, other: Bound) -> None:
        """Add the refs of another pickle of the same checkpoint."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.update(theirs)


def bind(
    file: Path, named: Mapping[str, Tensor], locate: Callable[[Storage], Place], limits: Limits
) -> Bound:
    """Turn placeholders into refs.

    Args:
        file: The checkpoint.
        named: Checkpoint key → placeholder.
        locate: Where the container keeps a storage; raises ``CorruptFile`` where it does not.
        limits: Bounds for views that repeat their storage.

    Raises:
        CorruptFile: If a view leaves its storage or a storage is not there.
    """
    bound = Bound()
    for name, tensor in named.items():
        ref = _ref(file, name, tensor, locate, limits, bound)
        if ref is None:
            continue
        bound.tensors[name] = ref
        if tensor.quantization is not None:
            facts = dict(tensor.quantization)
            for fact, value in facts.items():
                if isinstance(value, Tensor):
                    facts[fact] = _ref(file, f"{name}.{fact}", value, locate, limits, bound)
            bound.quantization[name] = facts
    return bound


def _ref(
    file: Path, name: str, tensor: Tensor, locate: Callable[[Storage], Place], limits: Limits, bound: Bound
) -> TensorRef | None:
    what = f"{file}: tensor {name!r}"
    if tensor.problem or tensor.storage is None:
        bound.unread[name] = tensor.problem or "its storage is not in the file"
        return None
    size = ITEMSIZE[tensor.dtype]
    lead = tensor.offset * size
    if isinstance(tensor.storage, bytes):
        record = f"pickle:{name}"
        check_view(what, tensor.dtype, tensor.shape, tensor.stride, lead, len(tensor.storage), limits)
        bound.inside[record] = partial(_from_bytes, tensor, tensor.storage)
        identity = bound.arrays.setdefault(id(tensor.storage), record)
        place = Place(record, -1, 0, len(tensor.storage), tensor.byteorder)
    else:
        place = locate(tensor.storage)
        if place.byteorder != "little" and unit(tensor.dtype) != unit(tensor.storage.dtype):
            # torch turns the bytes of the storage's own elements round, which leaves those of the tensor mixed up.
            bound.unread[name] = f"{place.byteorder}-endian, on a storage of another type"
            return None
        if tensor.storage.numel * ITEMSIZE[tensor.storage.dtype] > place.nbytes:
            raise CorruptFile(
                f"{what} needs a storage of {tensor.storage.numel} elements; its record has {place.nbytes} bytes"
            )
        lead += tensor.storage.first * ITEMSIZE[tensor.storage.dtype]
        check_view(what, tensor.dtype, tensor.shape, tensor.stride, lead, place.nbytes, limits)
        identity = place.record or str(place.begin)
    return TensorRef(
        name,
        tensor.dtype,
        tensor.shape,
        tensor.stride,
        file,
        place.record,
        place.begin + lead,
        identity,
        place.nbytes,
        place.base,
        lead,
        place.byteorder,
    )


def _from_bytes(tensor: Tensor, data: bytes) -> torch.Tensor:
    import torch

    dtype = torch_dtype(tensor.dtype)
    if not data:
        return torch.empty(tensor.shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return native(flat, dtype, tensor.byteorder).as_strided(tensor.shape, tensor.stride)
