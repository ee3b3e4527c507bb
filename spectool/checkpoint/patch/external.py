"""ONNX models with external data: the model and data files of its own, under names that are free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from spectool.checkpoint.patch.folder import write_copy
from spectool.checkpoint.patch.onnxfields import external_names
from spectool.checkpoint.patch.place import place_each, sync_folder
from spectool.checkpoint.patch.plan import Plan
from spectool.checkpoint.patch.temporary import temporary_folder
from spectool.checkpoint.patch.types import Written
from spectool.checkpoint.patch.verify import verify
from spectool.checkpoint.patch.wire import Messages
from spectool.checkpoint.source import Source
from spectool.errors import OutputError, SpectoolError


def write_external(plan: Plan, out: Path, target: Path, force: bool) -> Written:
    """Write a model and its data files; the model appears last, and with it the whole.

    Raises:
        OutputError: If the model names data files that are not known to be its own, or as ``write_checkpoint``.
    """
    path = plan.checkpoint.path
    old = {file: file.relative_to(path.parent).as_posix() for file in plan.sources if file != path}
    if strange := _locations(plan.sources[path], plan) - set(old.values()):
        raise OutputError(
            f"{path} has external data that is not read ({', '.join(sorted(strange)[:3])})",
            hint="load it and save it again with onnx",
        )
    new = _free_names(target, list(old.values()))
    contents = plan.contents({name: new[name] for name in old.values() if new[name] != name})
    stale = _replaced_data(target, plan) if force else {}
    with temporary_folder(target) as ready:
        names = {file: ready / new[name] for file, name in old.items()} | {path: ready / target.name}
        homes = {file: target.parent / staged.relative_to(ready) for file, staged in names.items()}
        homes[path] = target
        for file, staged in names.items():
            staged.parent.mkdir(parents=True, exist_ok=True)
            write_copy(staged, file, plan, contents, homes[file])
        verify(ready / target.name, plan.checkpoint, plan.edits, out)
        plan.check_sources()
        place_each([(staged, homes[file], force and file == path) for file, staged in names.items()])
    for file, number in stale.items():
        with suppress(OSError):
            # By now the name may belong to another writer.
            if file.stat().st_ino == number:
                file.unlink()
    sync_folder(target.parent)
    runs = ((homes[file], *run) for file, content in contents.items() for run in content.changed())
    return Written(out, tuple(homes.values()), tuple(runs))


def _free_names(target: Path, names: list[str]) -> dict[str, str]:
    """Return old name → new name of every data file: the old one if it is free, else one made from the model's."""
    taken = {target.name}
    chosen = {}
    for name in names:
        for candidate in chain((name,), _own_names(target)):
            place = target.parent / candidate
            inside = place.resolve().is_relative_to(target.parent.resolve())
            blocked = any(part.is_symlink() or part.is_file() for part in _between(place, target.parent))
            if (
                candidate not in taken
                and inside
                and not blocked
                and not place.exists()
                and not place.is_symlink()
            ):
                break
        taken.add(candidate)
        chosen[name] = candidate
    return chosen


def _between(place: Path, folder: Path) -> list[Path]:
    return [parent for parent in place.parents if parent != folder and parent.is_relative_to(folder)]


def _own_names(target: Path) -> Iterator[str]:
    yield f"{target.name}.data"
    number = 2
    while True:
        yield f"{target.name}.{number}.data"
        number += 1


def _locations(source: Source, plan: Plan) -> set[str]:
    """Return the relative paths of all external data that a model's bytes name."""
    return external_names(Messages(source.read(0, source.size, "the ONNX model")), plan.checkpoint.program)


def _replaced_data(target: Path, plan: Plan) -> dict[Path, int]:
    """Return the data files of the model that is replaced, if their names say that they are its own, with inodes."""
    if not target.is_file():
        return {}
    try:
        names = _locations(Source(target), plan)
    except (SpectoolError, ValueError):
        return {}
    own = {name for name in names if name.startswith(f"{target.name}.") and name.endswith(".data")}
    files = {target.parent / name for name in own if "/" not in name}
    inputs = {file.resolve() for file in plan.sources}
    return {file: file.stat().st_ino for file in files if file.is_file() and file.resolve() not in inputs}
