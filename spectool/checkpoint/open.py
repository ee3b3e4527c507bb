"""Which container a file is, by its bytes, and its structure."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from spectool.checkpoint.archive import Archive
from spectool.checkpoint.dtypes import ITEMSIZE
from spectool.checkpoint.hub import beside, is_index, open_folder, open_index
from spectool.checkpoint.limits import DEFAULT, Limits
from spectool.checkpoint.onnxwire import is_onnx
from spectool.checkpoint.recognise import refuse, refuse_zip
from spectool.checkpoint.safetensors import is_safetensors, open_safetensors
from spectool.checkpoint.script import open_exported, open_torchscript
from spectool.checkpoint.source import Source, unreadable
from spectool.checkpoint.torchfile import is_legacy, open_legacy, open_torch_zip
from spectool.checkpoint.types import Checkpoint
from spectool.errors import CorruptFile, UsageError

#: Containers in which one of several state dicts can be chosen.
_NESTED = ("torch-zip", "torch-legacy")


def open_checkpoint(path: str | Path, *, key: str | None = None, limits: Limits = DEFAULT) -> Checkpoint:
    """Read the structure of a checkpoint; no tensor is read and no code from the file is run.

    Args:
        path: A file of any container, a shard index, or a Hugging Face folder.
        key: Which state dict to take where a ``torch.save`` file holds several: its dotted path or last name,
            e.g. ``ema`` or ``model.generator``.
        limits: What the file may ask for.

    Returns:
        Names, shapes and places of its tensors; ``Checkpoint.read`` reads one.

    Raises:
        UnrecognisedFormat: If it is none of the containers; the message says what it looks like.
        CorruptFile: If the container contradicts itself or ends early.
        LimitExceeded: If it asks for more than ``limits`` allow.
        CheckpointError: If a file is missing or may not be read.
        UsageError: If ``key`` names nothing; the message lists what it could.
        NothingToAnalyse: If the container is sound and holds no tensor.
    """
    path = Path(path)
    try:
        if path.is_dir():
            checkpoint = open_folder(path, partial(_open_file, key=None, limits=limits))
        else:
            checkpoint = _open_file(path, key=key, limits=limits)
    except OSError as error:
        # Of a name that cannot be, a folder that may not be searched: whatever is asked about files on the way.
        raise unreadable(Path(error.filename or path), error) from error
    if key is not None and checkpoint.format not in _NESTED:
        raise UsageError(f"{path} ({checkpoint.format}) holds one set of tensors: key {key!r} cannot choose")
    for ref in checkpoint.tensors.values():
        limits.check("tensor_bytes", ref.numel * ITEMSIZE.get(ref.dtype, 1), f"{path}: tensor {ref.name!r}")
    return replace(checkpoint, limits=limits)


def _open_file(path: Path, *, key: str | None, limits: Limits, shard: bool = False) -> Checkpoint:
    source = Source(path)
    packed = source.head(2) == b"\x1f\x8b"
    if packed:
        source = Source.unpacked(source, limits)
    checkpoint = _open_source(source, key, limits, shard)
    facts = beside(path, limits)
    if packed:
        facts["gzip"] = True
    return replace(checkpoint, metadata={**checkpoint.metadata, **facts}) if facts else checkpoint


def _open_source(source: Source, key: str | None, limits: Limits, shard: bool) -> Checkpoint:
    """Decide by the bytes; every test looks at what no other container has."""
    head = source.head(4096)
    if head[:4] == b"PK\3\4":
        return _open_archive(Archive(source, limits), key, limits)
    if is_legacy(head):
        return open_legacy(source, limits, key)
    if is_safetensors(head):
        return open_safetensors(source, limits)
    if is_index(head) and not shard:
        sharded = open_index(source, limits, partial(_open_file, key=None, limits=limits, shard=True))
        if sharded is not None:
            return sharded
    elif is_onnx(source):
        from spectool.checkpoint.onnxfile import open_onnx

        return open_onnx(source, limits)
    raise refuse(source)


def _open_archive(archive: Archive, key: str | None, limits: Limits) -> Checkpoint:
    names = archive.records
    if "archive_format" in names or "serialized_exported_program.json" in names:
        if "data.pkl" in names:
            raise CorruptFile(
                f"{archive.source.path} is both an exported program and a file of torch.save",
                hint="each of their loaders finds other weights in it: save the one that is meant again",
            )
        return open_exported(archive, limits)
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return open_torchscript(archive, limits)
    if "data.pkl" in names:
        return open_torch_zip(archive, limits, key)
    raise refuse_zip(archive.source, names)
