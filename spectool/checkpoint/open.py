"""Which container a file is, by its bytes, and its structure."""

from __future__ import annotations

from pathlib import Path

from spectool.checkpoint.archive import Archive
from spectool.checkpoint.limits import DEFAULT, Limits
from spectool.checkpoint.safetensors import is_safetensors, open_safetensors
from spectool.checkpoint.source import Source
from spectool.checkpoint.torchfile import is_legacy, open_legacy, open_torch_zip
from spectool.checkpoint.types import Checkpoint
from spectool.errors import UnrecognisedFormat


def open_checkpoint(path: str | Path, *, key: str | None = None, limits: Limits = DEFAULT) -> Checkpoint:
    """Read the structure of a checkpoint; no tensor is read and no code from the file is run.

    Args:
        path: A file of any container, a shard index, or a Hugging Face folder.
        key: Which state dict to take where the file holds several, e.g. ``ema`` or ``model.generator``.
        limits: What the file may ask for.

    Raises:
        UnrecognisedFormat: If it is none of the containers; the message says what it looks like.
        CorruptFile: If the container contradicts itself or ends early.
        LimitExceeded: If it asks for more than ``limits`` allow.
        UsageError: If ``key`` names nothing; the message lists what it could.
        NothingToAnalyse: If the container is sound and holds no tensor.
    """
    source = Source(Path(path))
    head = source.head(4096)
    if is_safetensors(head):
        return open_safetensors(source, limits)
    if is_legacy(head):
        return open_legacy(source, limits, key)
    if head[:4] == b"PK\3\4":
        return open_torch_zip(Archive(source, limits), limits, key)
    raise UnrecognisedFormat(f"{path}: not yet readable")
