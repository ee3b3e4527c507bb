"""What was written is opened again before it gets its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from spectool.checkpoint.open import open_checkpoint
from spectool.checkpoint.patch.plan import UNBOUNDED
from spectool.checkpoint.patch.values import octets
from spectool.checkpoint.types import Checkpoint, TensorRef
from spectool.errors import OutputError, SpectoolError

if TYPE_CHECKING:
    import torch


def verify(
    ready: Path,
    checkpoint: Checkpoint,
    edits: Sequence[tuple[TensorRef, torch.Tensor]],
    out: Path,
    *,
    shard: Path | None = None,
) -> None:
    """Open a finished copy and compare its structure and every edited tensor.

    Args:
        ready: The copy.
        checkpoint: The original.
        edits: What was changed.
        out: The name it will get, for messages.
        shard: If the copy is that of one shard, which.

    Raises:
        OutputError: If anything is not as it should be.
    """
    kept = [ref for ref in checkpoint.tensors.values() if shard is None or ref.file == shard]
    written, fault = _opened(ready, checkpoint, kept, whole=shard is None)
    if written is None:
        raise _failed(out, fault)
    for ref, tensor in edits:
        if shard is not None and ref.file != shard:
            continue
        try:
            read = written.read(ref.name)
        except SpectoolError as error:
            raise _failed(out, str(error)) from error
        if not _same(read, tensor, checkpoint.format == "onnx"):
            raise _failed(out, f"tensor {ref.name!r} reads back with other values")


def _opened(
    ready: Path, checkpoint: Checkpoint, kept: Iterable[TensorRef], whole: bool
) -> tuple[Checkpoint | None, str]:
    """Return the copy opened with the choice of state dict that the original was opened with."""
    wanted = [_facts(ref) for ref in kept]
    fault = ""
    for key in dict.fromkeys((None, checkpoint.metadata.get("branch"))):
        try:
            written = open_checkpoint(ready, key=key, limits=UNBOUNDED)
        except SpectoolError as error:
            fault = fault or str(error)
            continue
        names = {facts[0] for facts in wanted}
        found = [_facts(ref) for ref in written.tensors.values() if whole or ref.name in names]
        same = found == wanted if whole else sorted(found) == sorted(wanted)
        if same and (
            not whole or (written.aliases == checkpoint.aliases and written.unread == checkpoint.unread)
        ):
            return written, ""
        fault = "its structure is another than the original's"
    return None, fault


#: What a ref says but for the names of files; the name comes first, for sorting.
_facts = attrgetter(
    *("name", "dtype", "shape", "stride", "record", "offset", "nbytes", "base", "lead", "byteorder")
)


def _same(read: torch.Tensor, tensor: torch.Tensor, through_floats: bool) -> bool:
    import torch

    if read.dtype != tensor.dtype or read.shape != tensor.shape:
        return False
    if tensor.numel() == 0:
        return True
    equal = (octets(read, "little") == octets(tensor, "little")).all(-1)
    if through_floats and tensor.dtype.is_floating_point:
        # Small float types of ONNX are read by way of float32, which keeps a NaN but not its payload.
        equal = equal | (read.float().isnan() & tensor.detach().cpu().float().isnan())
    return bool(torch.all(equal))


def _failed(out: Path, fault: str) -> OutputError:
    return OutputError(
        f"{out} was not written: the finished copy does not read back ({fault})",
        hint="try another disk; if it happens again, report it",
    )
