"""Hash a checkpoint so that a report can say which bytes it is about."""

from __future__ import annotations

import hashlib
from pathlib import Path

from spectool.checkpoint.limits import DEFAULT, Limits
from spectool.checkpoint.open import open_checkpoint
from spectool.errors import CheckpointError

_BLOCK = 1 << 20


def sha256_of(path: str | Path, limits: Limits = DEFAULT) -> str:
    """Return the SHA-256 of a checkpoint in hex.

    Of one file it is the SHA-256 of its bytes (of the packed bytes of a ``.gz``), as ``sha256sum`` prints it. A
    checkpoint of several files (shards, external data, a folder) has the SHA-256 of the text that ``sha256sum``
    prints for them: one line ``hash  name`` per file that holds tensors and for the index or model itself, sorted by
    name; names are relative to the folder. Configuration files do not count.

    Args:
        path: A checkpoint file or folder.
        limits: What the file may ask for.

    Raises:
        CheckpointError: If it cannot be read.
    """
    path = Path(path)
    files = {ref.file for ref in open_checkpoint(path, limits=limits).tensors.values()}
    folder = path if path.is_dir() else path.parent
    if not path.is_dir():
        files.add(path)
    if files == {path}:
        return _of_file(path)
    names = sorted((file.relative_to(folder).as_posix(), file) for file in files)
    lines = "".join(f"{_of_file(file)}  {name}\n" for name, file in names)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _of_file(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", hint="check the path") from error
    return digest.hexdigest()
