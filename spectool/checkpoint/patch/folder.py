"""Checkpoints in several files: folders built beside their target and renamed whole."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path

from spectool.checkpoint.patch.content import Content
from spectool.checkpoint.patch.copy import write_content
from spectool.checkpoint.patch.place import look_of, place_each, place_folder, refuse_mounted, sync_folder
from spectool.checkpoint.patch.plan import Plan
from spectool.checkpoint.patch.temporary import (
    dress_folder,
    new_file,
    remove,
    temporary_file,
    temporary_folder,
)
from spectool.checkpoint.patch.types import Written
from spectool.checkpoint.patch.verify import verify
from spectool.checkpoint.source import Source
from spectool.errors import OutputError

#: What a model folder has beside its weights that loading it may need.
_COMPANIONS = (
    *("config.json", "*_config.json", "adapter_config.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.*", "spiece.*"),
)
_LEFT_OUT = ".git"


def write_folder(plan: Plan, out: Path, target: Path, force: bool) -> Written:
    """Write a copy of a whole Hugging Face folder.

    Raises:
        OutputError: If a link in it leaves the folder, or the target is a file or holds something else.
    """
    root = plan.checkpoint.path
    files = {relative: root / relative for relative in _walk(root, plan.sources)}
    return _write(plan, out, target, files, Path(), force)


def write_index(plan: Plan, out: Path, target: Path, force: bool) -> Written:
    """Write a shard index, its shards and what stands beside them.

    Under the name of an index (``out`` ends with ``.json``) they go into the folder that holds it, the index last;
    else into a new folder.

    Raises:
        OutputError: If a name is taken, or as ``write_folder``.
    """
    index = plan.checkpoint.path
    named = out.suffix == ".json" and not target.is_dir()
    name = Path(target.name if named else index.name)
    files = {Path(shard.name): shard for shard in plan.sources}
    for entry in sorted(index.parent.iterdir()):
        companion = any(fnmatchcase(entry.name, pattern) for pattern in _COMPANIONS)
        if companion and entry.is_file() and entry != index and Path(entry.name) not in files:
            _check_link(entry, index.parent, plan.sources)
            files[Path(entry.name)] = entry
    files[name] = index
    if not named:
        return _write(plan, out, target, files, name, force)
    homes = {relative: target.parent / relative for relative in files}
    for home in homes.values():
        if home.exists() and any(home.samefile(source) for source in files.values()):
            raise OutputError(f"{home} is a part of the input", hint="write into another folder")
        if os.path.lexists(home) and not force:
            raise OutputError(f"{home} exists already", hint="write into another folder, or give --force")
    contents = plan.contents()
    with temporary_folder(target) as ready:
        for relative, source in files.items():
            write_copy(ready / relative, source, plan, contents, homes[relative])
        verify(ready / name, plan.checkpoint, plan.edits, out)
        plan.check_sources()
        place_each([(ready / relative, home, force) for relative, home in homes.items()])
    names = {source: homes[relative] for relative, source in files.items()}
    return Written(out, tuple(homes.values()), _runs(contents, names))


def replace_each(plan: Plan, out: Path) -> Written:
    """Replace the files of a checkpoint that change, each in one step, all of them written before the first.

    What happens between the first and the last step, ``place_each`` says.
    """
    contents = plan.contents()
    with ExitStack() as stack:
        ready = {}
        # The model of an ONNX file goes last: it is what names the others.
        for file in sorted(contents, key=lambda file: file == plan.checkpoint.path):
            ready[file] = stack.enter_context(temporary_file(file))
            mode, owner = look_of(file, contents[file].source.mode)
            with new_file(ready[file], mode, owner=owner, made=True) as descriptor:
                write_content(contents[file], descriptor)
            if plan.checkpoint.format == "onnx":
                _compare_bytes(ready[file], contents[file])
            else:
                verify(ready[file], plan.checkpoint, plan.edits, out, shard=file)
        plan.check_sources()
        place_each([(finished, file, True) for file, finished in ready.items()])
    return Written(out, tuple(ready), _runs(contents, {file: file for file in ready}))


def write_copy(path: Path, source: Path, plan: Plan, contents: Mapping[Path, Content], home: Path) -> None:
    """Write one file of several: with its changes if it has any, as it is otherwise.

    Args:
        path: Where it is made.
        source: What it is a copy of.
        plan: The write it belongs to.
        contents: The contents of every file that changes.
        home: The name it will get; it looks like what it replaces there.
    """
    content = contents.get(source) or Content(plan.sources.get(source) or Source(source), [])
    mode, owner = look_of(home, content.source.mode)
    with new_file(path, mode, owner=owner) as descriptor:
        write_content(content, descriptor)


def _write(
    plan: Plan, out: Path, target: Path, files: Mapping[Path, Path], entry: Path, force: bool
) -> Written:
    refuse_mounted(target)
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise OutputError(f"{target} holds files already", hint="name a new folder, or give --force")
        if lost := _strangers(target, files):
            some = ", ".join(str(target / path) for path in lost[:5])
            raise OutputError(
                f"{target} holds files that the new folder would not have ({some})",
                hint="remove the folder first, or name another",
            )
    elif target.exists() and not target.is_dir():
        raise OutputError(f"{out} is a file; this checkpoint is written as a folder", hint="name a folder")
    contents = plan.contents()
    home = plan.checkpoint.path if plan.checkpoint.path.is_dir() else plan.checkpoint.path.parent
    with temporary_folder(target) as ready:
        for relative, source in files.items():
            (ready / relative).parent.mkdir(parents=True, exist_ok=True)
            write_copy(ready / relative, source, plan, contents, target / relative)
        verify(ready / entry, plan.checkpoint, plan.edits, out)
        for folder, _, _ in os.walk(ready, topdown=False):
            sync_folder(Path(folder))
        mode, owner = look_of(target, stat.S_IMODE(home.stat().st_mode))
        dress_folder(ready, mode | stat.S_IRWXU, owner)
        plan.check_sources()
        old = place_folder(ready, target, force)
        if old is not None:
            for path in _strangers(old, files):
                # Somebody put it there since we looked.
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (old / path).rename(target / path)
            remove(old)
    names = {source: target / relative for relative, source in files.items()}
    return Written(out, tuple(target / relative for relative in files), _runs(contents, names))


def _strangers(folder: Path, files: Mapping[Path, Path]) -> list[Path]:
    """Return what a folder holds besides these files."""
    present = []
    for place, folders, names in os.walk(folder):
        links = (name for name in folders if Path(place, name).is_symlink())
        present += [Path(place, name).relative_to(folder) for name in (*names, *links)]
    return sorted(path for path in present if path not in files)


def _runs(contents: Mapping[Path, Content], names: Mapping[Path, Path]) -> tuple[tuple[Path, int, int], ...]:
    return tuple((names[file], *run) for file, content in contents.items() for run in content.changed())


def _walk(root: Path, sources: Iterable[Path]) -> list[Path]:
    """Return every regular file below a folder, by its relative path."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name != _LEFT_OUT)
        for name in [*folders, *sorted(files)]:
            path = Path(folder, name)
            _check_link(path, root, sources)
            if path.is_file():
                found.append(path.relative_to(root))
    return found


def _check_link(path: Path, root: Path, sources: Iterable[Path]) -> None:
    """Refuse links that would bring files from elsewhere into the copy; those of the Hugging Face cache are known."""
    if not path.is_symlink() or path in sources:
        return
    real, home = path.resolve(), root.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not real.is_file() or not any(real.is_relative_to(folder) for folder in allowed):
        raise OutputError(
            f"{path} is a link that leaves its folder or leads to no file",
            hint="put the file itself there, or remove the link",
        )


def _compare_bytes(path: Path, content: Content) -> None:
    """Refuse a file whose size or changed bytes are not those that were meant."""
    written = Source(path)
    good = content.source.gzipped or written.size == content.size
    if good and not content.source.gzipped:
        for splice, (start, stop) in zip(content.splices, content.changed(), strict=True):
            good = good and written.read(start, stop - start) == bytes(splice.make())
    if not good:
        raise OutputError(f"{path} was not written as it was meant", hint="try another disk")
