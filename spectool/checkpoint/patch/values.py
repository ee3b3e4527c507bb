"""From edited tensors to the runs of bytes they stand in: strides, byte orders, ties."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from spectool.checkpoint.dtypes import ITEMSIZE, ONNX_BITS, STORED_AS, torch_dtype
from spectool.checkpoint.patch.content import Splice
from spectool.checkpoint.read import row_major, span
from spectool.checkpoint.source import Source
from spectool.checkpoint.types import Checkpoint, TensorRef
from spectool.errors import OutputError

if TYPE_CHECKING:
    import torch

    Edit = tuple[TensorRef, torch.Tensor]


def can_write(checkpoint: Checkpoint, name: str) -> str | None:
    """Return why new values of a tensor could not be written, None if they can.

    A tensor that repeats its own bytes (stride 0, overlapping windows) has a reason here, although
    ``write_checkpoint`` accepts values for it that repeat likewise.

    Raises:
        KeyError: If there is no such tensor.
    """
    reason = unwritable(checkpoint, name)
    if reason is None and repeats(checkpoint.tensors[name]):
        return "it repeats its own bytes (an expanded tensor): its elements cannot be set one by one"
    return reason


def unwritable(checkpoint: Checkpoint, name: str) -> str | None:
    """Return why no values at all can be written for a tensor, None if some can."""
    if name in checkpoint.unread:
        return f"its values cannot be read: {checkpoint.unread[name]}"
    ref = checkpoint.tensors[name]
    if ref.dtype in STORED_AS or ref.dtype in ONNX_BITS:
        return f"it is stored as packed or quantised elements ({ref.dtype})"
    if name in checkpoint.metadata.get("quantization", {}):
        return "it is quantised: its integers mean nothing without their scale"
    if ref.base < 0 and checkpoint.format != "onnx":
        return "it is a numpy array inside a pickle: its bytes have no place of their own"
    return None


def check_edits(checkpoint: Checkpoint, edits: Mapping[str, torch.Tensor]) -> list[Edit]:
    """Return ref and new values of every edit.

    Raises:
        KeyError: If there is no such tensor.
        ValueError: If type or shape are not those that are stored.
        OutputError: If a tensor cannot be written.
    """
    import torch

    checked = []
    for name, tensor in edits.items():
        if name not in checkpoint.tensors and name not in checkpoint.unread:
            raise KeyError(f"{checkpoint.path} has no tensor {name!r}")
        if reason := unwritable(checkpoint, name):
            raise OutputError(
                f"{checkpoint.path}: tensor {name!r} cannot be written: {reason}",
                hint="leave it out, or save the checkpoint in another form",
            )
        ref = checkpoint.tensors[name]
        dtype = torch_dtype(ref.dtype)
        if tensor.dtype != dtype or tuple(tensor.shape) != ref.shape:
            raise ValueError(
                f"tensor {name!r} is stored as {dtype} {ref.shape}; "
                f"the new values are {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "meta" if tensor.is_meta else tensor.layout
            raise ValueError(f"the new values of tensor {name!r} are not dense ({kind})")
        checked.append((ref, tensor))
    return checked


def repeats(ref: TensorRef) -> bool:
    """Tell whether two elements of a view may share bytes (never wrong when it says no)."""
    reach = 0
    for step, size in sorted(
        (step, size) for step, size in zip(ref.stride, ref.shape, strict=True) if size > 1
    ):
        if step <= reach:
            return True
        reach += (size - 1) * step
    return False


def splices_of(source: Source, edits: Sequence[Edit]) -> list[Splice]:
    """Return the splices of edits whose bytes have positions in one file.

    Edits whose ranges interleave become one splice over all of them, with the bytes between as they are.

    Raises:
        OutputError: If two edits give one byte different values, or a tensor that repeats its own bytes would
            get values that do not repeat.
    """
    placed = sorted((*_range(ref), index) for index, (ref, _) in enumerate(edits) if ref.numel)
    splices: list[Splice] = []
    cluster: list[Edit] = []
    first = last = -1
    for start, stop, index in placed:
        if cluster and start < last:
            cluster.append(edits[index])
            last = max(last, stop)
            continue
        if cluster:
            splices.append(_splice(source, cluster, first, last))
        cluster, first, last = [edits[index]], start, stop
    if cluster:
        splices.append(_splice(source, cluster, first, last))
    return splices


def octets(tensor: torch.Tensor, byteorder: str) -> torch.Tensor:
    """Return the bytes of a tensor, ``(*shape, itemsize)``, in a byte order."""
    import torch

    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = flat.view(torch.uint8)
    part = tensor.dtype.itemsize // (2 if tensor.dtype.is_complex else 1)
    if byteorder != sys.byteorder and part > 1:
        raw = raw.reshape(-1, part).flip(1)
    return raw.reshape(*tensor.shape, tensor.dtype.itemsize)


def _range(ref: TensorRef) -> tuple[int, int]:
    start = ref.base + ref.offset
    return start, start + span(ref.shape, ref.stride) * ITEMSIZE[ref.dtype]


def _dense(ref: TensorRef) -> bool:
    steps = zip(ref.shape, ref.stride, row_major(ref.shape), strict=True)
    return all(size == 1 or mine == plain for size, mine, plain in steps)


def _splice(source: Source, cluster: list[Edit], start: int, stop: int) -> Splice:
    if len(cluster) == 1 and _dense(cluster[0][0]):
        ref, tensor = cluster[0]
        return Splice(start, stop, stop - start, lambda: octets(tensor, ref.byteorder).reshape(-1).numpy())
    make = partial(_merged, source, cluster, start, stop)
    if len(cluster) > 1 or repeats(cluster[0][0]):
        make()
    return Splice(start, stop, stop - start, make)


def _merged(source: Source, cluster: list[Edit], start: int, stop: int) -> Any:
    """Return a run of bytes with every edit of a cluster written into it; refuse edits that contradict."""
    import torch

    buffer = torch.empty(stop - start, dtype=torch.uint8)
    array: Any = buffer.numpy()
    source.read_into(start, memoryview(array), "the tensors that are edited")
    views = []
    for ref, tensor in cluster:
        size = ITEMSIZE[ref.dtype]
        stride = (*(step * size for step in ref.stride), 1)
        view = buffer[ref.base + ref.offset - start :].as_strided((*ref.shape, size), stride)
        new = octets(tensor, ref.byteorder)
        if repeats(ref):
            _spread(view, new)
        else:
            view.copy_(new)
        views.append((ref, view, new))
    for ref, view, new in views:
        if torch.equal(view, new):
            continue
        if len(cluster) == 1:
            raise OutputError(
                f"{ref.file}: tensor {ref.name!r} repeats its own bytes (shape {ref.shape}, stride {ref.stride})"
                " and the new values do not",
                hint="give equal values to elements that share their bytes, or leave the tensor out",
            )
        names = ", ".join(repr(other.name) for other, _ in cluster)
        raise OutputError(
            f"{ref.file}: the tensors {names} share bytes and their new values contradict each other",
            hint="change one of them only: leave the others out (--exclude NAME)",
        )
    return array


def _spread(view: torch.Tensor, new: torch.Tensor) -> None:
    """Copy into a view that overlaps itself, along its axes of stride 0 only once."""
    for axis, step in enumerate(view.stride()):
        if step == 0 and view.shape[axis]:
            view, new = view.narrow(axis, 0, 1), new.narrow(axis, 0, 1)
    if view.dim() and any(size > 1 for size in view.shape):
        # What still overlaps (windows) is written element after element; the caller compares afterwards.
        for index in range(view.shape[0]):
            view[index].copy_(new[index]) if view.dim() > 1 else view[index].fill_(new[index])
    else:
        view.copy_(new)
