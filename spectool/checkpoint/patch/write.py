"""Copy a checkpoint with some tensors changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spectool.checkpoint.patch.content import Content
from spectool.checkpoint.patch.copy import write_content
from spectool.checkpoint.patch.folder import replace_each, write_folder, write_index
from spectool.checkpoint.patch.place import destination, explained, look_of, place_file
from spectool.checkpoint.patch.plan import Plan, plan_of
from spectool.checkpoint.patch.temporary import new_file, temporary_file
from spectool.checkpoint.patch.types import Written
from spectool.checkpoint.patch.verify import verify
from spectool.checkpoint.types import Checkpoint
from spectool.errors import OutputError

if TYPE_CHECKING:
    import torch


def write_checkpoint(
    checkpoint: Checkpoint, out: Path, edits: Mapping[str, torch.Tensor], *, force: bool = False
) -> Written:
    """Write a copy of a checkpoint in which only the bytes of the edited tensors differ.

    Zip checksums, and the lengths that ONNX puts around values, are put right; everything else (metadata, optimizer
    state, ties, strides, order of keys, the program) stays byte for byte. Tensors that share bytes change together.
    A gzipped checkpoint is packed again under its old header. The copy is written under a temporary name beside
    ``out``, forced to the disk, opened and compared, and then given its name in one step; it has the permissions of
    the original, or those (and the owner, as far as may be) of the file that it replaces. What fails or is interrupted
    leaves no file, what is killed at most ``.NAME.spectool-XXXXXXXX.tmp``, which the next run to ``out`` removes.

    A checkpoint of several files is written as a folder: for a Hugging Face folder with everything in it (``.git``
    apart), for a shard index with the shards and the usual JSON beside it; ``out`` may then also name the new index.
    An ONNX model with external data gets data files of its own, under the old names if those are free in the folder
    of ``out`` and as ``OUT.data`` otherwise.

    Args:
        checkpoint: An opened checkpoint.
        out: File or folder to write.
        edits: Checkpoint key → new values, in the stored type and shape. Tied names are all right, with equal values.
        force: Replace what is there: a file, the file that a link points to, or a folder whose entries are all in
            the new one too. If ``out`` is the checkpoint itself, only the files that change are replaced, each in
            one step (several of them one after the other).

    Returns:
        Which files were written, and which bytes of them are new.

    Raises:
        KeyError: If there is no such tensor.
        ValueError: If type or shape are not as stored, or two edits give one byte different values.
        OutputError: If a tensor cannot be written (see ``can_write``), or nothing can be written there.
        CorruptFile: If the original changes meanwhile, or is not what its structure said.
    """
    out = Path(out)
    plan = plan_of(checkpoint, edits)
    with explained(out):
        itself = _is_input(checkpoint, out)
        if itself and not force:
            raise OutputError(f"{out} is the input itself", hint="name another output, or give --in-place")
        _spare_inputs(plan, out, itself)
        target = destination(out, force)
        several = checkpoint.path.is_dir() or checkpoint.format.endswith("-sharded")
        if itself and (several or len(plan.sources) > 1):
            return replace_each(plan, out)
        if checkpoint.path.is_dir():
            return write_folder(plan, out, target, force)
        if several:
            return write_index(plan, out, target, force)
        if target.is_dir():
            raise OutputError(f"{out} is a folder", hint="name a file in it")
        if len(plan.sources) > 1:
            from spectool.checkpoint.patch.external import write_external

            return write_external(plan, out, target, force)
        return _write_file(plan, out, target, force)


def _write_file(plan: Plan, out: Path, target: Path, force: bool) -> Written:
    path = plan.checkpoint.path
    content = plan.contents().get(path) or Content(plan.sources[path], [])
    with temporary_file(target) as ready:
        mode, owner = look_of(target, content.source.mode)
        with new_file(ready, mode, owner=owner, made=True) as descriptor:
            write_content(content, descriptor)
        verify(ready, plan.checkpoint, plan.edits, out)
        plan.check_sources()
        place_file(ready, target, force)
    return Written(out, (target,), tuple((target, *run) for run in content.changed()))


def _is_input(checkpoint: Checkpoint, out: Path) -> bool:
    """Tell whether the output is the input under whatever name, or the folder of a shard index."""
    if not out.exists():
        return False
    if checkpoint.path.exists() and out.samefile(checkpoint.path):
        return True
    return checkpoint.format.endswith("-sharded") and out.samefile(checkpoint.path.parent)


def _spare_inputs(plan: Plan, out: Path, itself: bool) -> None:
    """Refuse to write over another file of the input: a shard, a data file."""
    if itself or not out.exists():
        return
    for file in plan.sources:
        if file.exists() and out.samefile(file):
            raise OutputError(f"{out} is a part of the input", hint="name another output")
