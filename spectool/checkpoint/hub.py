"""Weights in several files: shard indices and Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectool.checkpoint.jsonfile import parse_object
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.neighbours import is_there
from spectool.checkpoint.payloads import is_payload_note
from spectool.checkpoint.read import ShardReader
from spectool.checkpoint.source import Source, unreadable
from spectool.checkpoint.types import Checkpoint, TensorRef
from spectool.errors import CheckpointError, CorruptFile, NothingToAnalyse, UnrecognisedFormat

_INDEX = ".index.json"
#: What a Hugging Face folder's weights are called, best first. Of both, transformers takes the single file,
#: diffusers the index.
_WEIGHTS = tuple(
    f"{stem}{suffix}{part}"
    for stem in ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights", "pytorch_model")
    for suffix in (".safetensors", ".bin")
    for part in ((_INDEX, "") if stem.startswith("diffusion") else ("", _INDEX))
)
_CONFIGS = {"config": "config.json", "adapter_config": "adapter_config.json"}

#: Files that a refused folder may name as what was meant.
_SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".bin", ".onnx", ".pt2", ".jit", ".index.json")

Open = Callable[[Path], Checkpoint]


def is_index(head: bytes) -> bool:
    """Tell whether a file may be a JSON object, as a shard index is."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"


def open_index(source: Source, limits: Limits, open_file: Open) -> Checkpoint | None:
    """Read a shard index and the headers of its shards.

    Args:
        source: The index, a JSON object.
        limits: Bounds on the index.
        open_file: Opens one shard.

    Returns:
        The checkpoint; None if the JSON is no shard index.

    Raises:
        CorruptFile: If index and shards contradict each other, or a shard would lie outside the folder.
        CheckpointError: If a shard is missing.
    """
    path = source.path
    limits.check("header_bytes", source.size, f"{path}: the JSON text")
    index = parse_object(source.read(0, source.size), str(path), limits)
    places = index.get("weight_map")
    if not isinstance(places, dict):
        return None
    if not all(isinstance(file, str) for file in places.values()):
        raise CorruptFile(f"{path}: weight_map does not map every name to a file name")
    shards: dict[str, Checkpoint] = {}
    for file in dict.fromkeys(places.values()):
        if file != Path(file).name or "\\" in file or file in ("", ".", ".."):
            raise CorruptFile(
                f"{path}: the shard name {file!r} leaves the folder", hint="put all shards beside it"
            )
        if not is_there(path.parent / file):
            raise CheckpointError(
                f"{path}: shard {file!r} is missing", hint="download all shards into one folder"
            )
        shards[file] = open_file(path.parent / file)
    tensors: dict[str, TensorRef] = {}
    unread: dict[str, str] = {}
    for name, file in places.items():
        if name in shards[file].tensors:
            tensors[name] = shards[file].tensors[name]
        elif name in shards[file].unread:
            unread[name] = shards[file].unread[name]
        else:
            raise CorruptFile(
                f"{path}: shard {file!r} has no tensor {name!r}", hint="download index and shards again"
            )
    if not (tensors or unread):
        raise NothingToAnalyse(
            f"{path}: a shard index without a single tensor", hint="name a file that holds weights"
        )
    for file, shard in shards.items():
        for name in shard.tensors.keys() | shard.unread.keys():
            if places.get(name, file) != file:
                raise CorruptFile(
                    f"{path}: tensor {name!r} stands in shard {file!r}, too, not only in {places[name]!r}",
                    hint="which of them a reader takes is not said: download index and shards again",
                )
    extra = sum(name not in places for shard in shards.values() for name in shard.tensors)
    notes: tuple[str, ...] = (
        (f"{extra} tensors of the shards are not in the index: left out",) if extra else ()
    )
    for file, shard in shards.items():
        notes += tuple(f"{file}: {note}" for note in shard.notes if is_payload_note(note))
    kinds = {shard.format for shard in shards.values()}
    form = "safetensors-sharded" if kinds == {"safetensors"} else "torch-sharded"
    aliases = {}
    metadata: dict[str, Any] = {}
    for shard in shards.values():
        # Names are tied only inside one shard.
        aliases.update(
            {name: first for name, first in shard.aliases.items() if {name, first} <= tensors.keys()}
        )
        metadata.update(shard.metadata)
    metadata["index"] = index.get("metadata") or {}
    read = ShardReader({path.parent / file: shard.reader for file, shard in shards.items()})
    return Checkpoint(path, form, tensors, aliases, metadata, None, notes, read, unread)


def open_folder(path: Path, open_file: Open) -> Checkpoint:
    """Read a Hugging Face folder: the weights under their usual name, sharded or not, with their JSON.

    Raises:
        UnrecognisedFormat: If there are no weights under a usual name; the hint lists files that could be meant.
    """
    for name in _WEIGHTS:
        if (path / name).is_file():
            chosen = open_file(path / name)
            _check_choice(path, name, chosen)
            other = name.removesuffix(_INDEX) if name.endswith(_INDEX) else f"{name}{_INDEX}"
            notes = (f"ignored {other!r} (beside {name!r})",) if (path / other).is_file() else ()
            return replace(chosen, path=path, format="huggingface", notes=(*chosen.notes, *notes))
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise unreadable(path, error) from error
    # A pipeline keeps one model per folder: unet, vae, text_encoder…
    found = [entry.name for entry in entries if any((entry / name).is_file() for name in _WEIGHTS)]
    found += [entry.name for entry in entries if entry.name.endswith(_SUFFIXES)]
    hint = f"name one of these inside it: {', '.join(found[:8])}" if found else "name a checkpoint file"
    raise UnrecognisedFormat(f"{path} is a folder without weights under a Hugging Face name", hint=hint)


def _check_choice(path: Path, name: str, chosen: Checkpoint) -> None:
    """Refuse a folder whose configuration makes transformers load another file.

    Raises:
        UnrecognisedFormat: If it does; the hint names the file.
    """
    config = chosen.metadata.get("config")
    meant = config.get("transformers_weights") if isinstance(config, dict) else None
    if meant is not None and meant != name:
        raise UnrecognisedFormat(
            f"{path}: its config.json says that the weights are not {name} but {str(meant)[:200]!r}",
            hint="name the file itself",
        )


def beside(path: Path, limits: Limits) -> dict[str, Any]:
    """Return the JSON that Hugging Face puts beside weights, by its name in ``Checkpoint.metadata``.

    Only for files under a usual name: a ``config.json`` beside any other file says nothing about it.

    Raises:
        CorruptFile, LimitExceeded: If such a file is damaged or too large.
    """
    if path.name not in _WEIGHTS:
        return {}
    found = {}
    for key, name in _CONFIGS.items():
        file = path.parent / name
        if file.is_file():
            source = Source(file)
            limits.check("header_bytes", source.size, f"{file}: the JSON text")
            found[key] = parse_object(source.read(0, source.size), str(file), limits, infinities=True)
    return found
