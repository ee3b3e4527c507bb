"""Hash a checkpoint so that a report can say which bytes it is about."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from spectool.checkpoint.open import open_checkpoint
from spectool.checkpoint.source import Source, unreadable
from spectool.checkpoint.types import Checkpoint

_BLOCK = 1 << 20


def sha256_of(checkpoint: str | Path | Checkpoint) -> str:
    """Return the SHA-256 of a checkpoint in hex.

    Of one file it is the SHA-256 of its bytes (of the packed bytes of a ``.gz``), as ``sha256sum`` prints it. A
    checkpoint of several files (shards, external data, a folder) has the SHA-256 of the text that ``sha256sum``
    prints for them: one line ``hash  name`` per file that holds tensors and for the index or model itself, sorted by
    name; names are relative to the folder. Configuration files do not count.

    Args:
        checkpoint: A path; or a checkpoint that was opened before, whose files must not have changed since.

    Raises:
        CheckpointError: If it cannot be read.
        CorruptFile: If a file changed.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    path = checkpoint.path
    sources: Mapping[Path, Source] = getattr(checkpoint.reader, "sources", {})
    files = {ref.file for ref in checkpoint.tensors.values()}
    folder = path if path.is_dir() else path.parent
    if not path.is_dir():
        files.add(path)
    digests = {file: _of_file(sources.get(file) or Source(file)) for file in files}
    if files == {path}:
        return digests[path]
    names = sorted((file.relative_to(folder).as_posix(), file) for file in files)
    lines = "".join(f"{digests[file]}  {name}\n" for name, file in names)
    return hashlib.sha256(os.fsencode(lines)).hexdigest()


def _of_file(source: Source) -> str:
    digest = hashlib.sha256()
    with source.descriptor() as descriptor:
        try:
            while block := os.read(descriptor, _BLOCK):
                digest.update(block)
        except OSError as error:
            raise unreadable(source.path, error) from error
    return digest.hexdigest()
