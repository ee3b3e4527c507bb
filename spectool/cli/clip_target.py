"""Where `spectool clip` writes the checkpoint, and what it must not write over."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from spectool.checkpoint.patch.place import destination, explained, refuse_mounted
from spectool.cli.messages import say
from spectool.cli.numbers import readable_bytes
from spectool.cli.parsing import same_file
from spectool.errors import OutputError, UsageError
from spectool.report.files import descriptor_of


def choose_checkpoint(
    source: Path, output: str | None, *, in_place: bool, force: bool, dry_run: bool, quiet: bool = False
) -> Path | None:
    """Return the checkpoint to write, None for a dry run; refuse what cannot work before anything is computed.

    Args:
        source: The checkpoint to read; it exists.
        output: What ``-o`` says.
        in_place: Whether to write to ``source`` itself.
        force: Whether what is there may be replaced.
        dry_run: Whether nothing is to be written.
        quiet: Whether warnings are left out.

    Raises:
        UsageError: If it is not said where to write, or said twice.
        OutputError: If nothing can be written there.
    """
    if in_place and output is not None:
        raise UsageError("-o and --in-place name two files to write", hint="give one of them")
    if dry_run:
        return None
    if in_place:
        if not force:
            raise UsageError(
                f"--in-place replaces {source}, which cannot be undone", hint="add --force, or give -o OUT"
            )
        _check_writable(source)
        return source
    if output is None:
        raise UsageError(
            "there is nowhere to write", hint="give -o OUT, or --dry-run to see what would change"
        )
    if output == "-" or descriptor_of(Path(output)) == 1:
        raise UsageError(
            "a checkpoint is not written to stdout", hint="name a file: -o OUT; the result goes to stdout"
        )
    out = Path(output)
    if same_file(out, source) and not force:
        raise OutputError(f"{out} is the file to read", hint="name another, or replace it: --force")
    if os.path.exists(out) and not (out.is_file() or out.is_dir()):  # noqa: PTH110
        raise OutputError(
            f"{out} is neither a file nor a folder", hint="name a file, or compute only: --dry-run"
        )
    if os.path.lexists(out) and not force:
        raise OutputError(f"{out} exists already", hint="--force replaces it")
    _check_writable(out)
    refuse_mounted(out)
    if not quiet:
        _warn_of_room(source, out)
    return out


def warn_of_suffix(source: Path, out: Path) -> None:
    """Say if the name of what was written promises another format than it has."""
    if out.suffix.lower() != source.suffix.lower() and not source.is_dir():
        kind = f"ends in {out.suffix}" if out.suffix else "has no suffix"
        say(f"{out} {kind}, but what is written has the format of {source}", label="warning")


def spare_inputs(source: Path, out: Path | None, result: Path | None, calibrate: Path | None) -> None:
    """Refuse files that are to be two things at once.

    Args:
        source: The checkpoint to read.
        out: The checkpoint to write.
        result: The file of the report.
        calibrate: Inputs of the model.

    Raises:
        UsageError: If one would be written over another, or the inputs are not there.
    """
    if calibrate is not None and not calibrate.exists():
        raise UsageError(f"there is no file {calibrate}", hint="--calibrate wants inputs of the model")
    if result is not None and out is not None and _same(result, out):
        raise UsageError(
            f"{out} cannot be both the checkpoint and the report", hint="name another file after --report"
        )
    for path, flag in ((out, "-o"), (result, "--report")):
        if path is not None and calibrate is not None and _same(path, calibrate):
            raise UsageError(
                f"{path} holds the inputs; it is not overwritten", hint=f"name another file after {flag}"
            )


def choose_recentering(name: str, off: bool) -> str:
    """Return how means follow: what ``--recenter`` says, ``none`` for ``--no-recenter``.

    Raises:
        UsageError: If the two contradict each other.
    """
    if off and name == "bias":
        raise UsageError("--no-recenter and --recenter bias contradict each other", hint="give one of them")
    return "none" if off else name


def _check_writable(out: Path) -> None:
    """Refuse a place that cannot be written; minutes of work would come before the writer says so.

    Raises:
        OutputError: If the folder is missing or closed, or the name cannot be.
    """
    with explained(out):
        destination(out, force=True)
    place = Path(os.path.realpath(out))
    for needed in (place.parent, place) if place.is_dir() else (place.parent,):
        if not os.access(needed, os.W_OK):
            raise OutputError(
                f"cannot write {out}: no permission to write {needed}", hint="choose another place"
            )


def _warn_of_room(source: Path, out: Path) -> None:
    """Say if the disk seems too small for a copy; one that shares blocks may fit all the same."""
    with suppress(OSError):
        files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
        size = sum(file.stat().st_size for file in files)
        usage = shutil.disk_usage(Path(os.path.realpath(out)).parent)
        if 0 < usage.free < size <= usage.total:
            room = f"{readable_bytes(usage.free)} are free there, {source} has {readable_bytes(size)}"
            say(f"{out} may not fit on its disk: {room}", label="warning")


def _same(first: Path, second: Path) -> bool:
    return same_file(first, second) or os.path.realpath(first) == os.path.realpath(second)
