"""Turn option texts into values; what does not parse says how it should look."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectool.errors import CheckpointError, UsageError

# No size has more digits than a 64-bit number.
_SHAPE = re.compile(r"\d{1,19}(?:[x×,]\d{1,19})*", re.IGNORECASE)
_INTEGER = re.compile(r"-\d{1,19}|0{1,19}")
_REAL = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False}
Shape = tuple[int, ...]
Scalar = int | float | bool


def parse_inputs(texts: Sequence[str]) -> Shape | dict[str, Shape | Scalar] | None:
    """Return the values of ``--input``: None, one shape, or a shape or number per input name.

    A whole number above 0 is read as the length of an axis; a program that wants a number takes it for one.

    Args:
        texts: ``1x3x224x224`` (once) or ``name=1x3x224x224``, ``name=16000``, ``name=0.5``, ``name=true`` (any
            number).

    Raises:
        UsageError: If one is no shape, or unnamed and named shapes are mixed.
    """
    if not texts:
        return None
    named: dict[str, Shape | Scalar] = {}
    for text in texts:
        name, _, shape = text.rpartition("=")
        if name in named:
            twice = f"--input names {name!r} twice" if name else "--input gives more than one unnamed shape"
            raise UsageError(twice, hint="several inputs are named: --input a=1x3x32x32 --input b=1x10")
        number = _parse_number(shape) if name else None
        named[name] = _parse_shape(shape, text) if number is None else number
    if "" not in named:
        return named
    if len(named) > 1:
        raise UsageError(
            "--input mixes a named and an unnamed shape",
            hint="name all of them: --input a=1x3x32x32 --input b=1x10",
        )
    only = named[""]
    return only if isinstance(only, tuple) else None


def _parse_number(text: str) -> Scalar | None:
    """Return a truth value, a number with a point or an exponent, or one below 1; None for anything else."""
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _REAL.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _parse_shape(shape: str, text: str) -> Shape:
    if not _SHAPE.fullmatch(shape.strip()):
        raise UsageError(
            f"--input {text!r} is no shape",
            hint="write 1x3x224x224 (with the batch axis) or name=1x3x224x224",
        )
    sizes = tuple(int(size) for size in re.split(r"[x×,]", shape.strip().lower()))
    if 0 in sizes:
        raise UsageError(
            f"--input {text!r} has an axis of size 0", hint="every axis holds at least one entry"
        )
    return sizes


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Return (i, n) for ``i/n``.

    Raises:
        UsageError: If it is no such thing.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,19})/(\d{1,19})", text.strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shard {text!r} makes no sense", hint="write i/n with 1 <= i <= n, e.g. 2/8")
    return int(found[1]), int(found[2])


def split_list(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the words of repeated options that also take commas."""
    return tuple(word.strip() for text in texts for word in text.split(",") if word.strip())


def parse_arguments(text: str | None) -> dict[str, Any] | None:
    """Return the arguments of ``--arch-args``.

    Raises:
        UsageError: If it is no JSON object.
    """
    if text is None:
        return None
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"--arch-args is no JSON ({error})", hint="write e.g. '{\"num_classes\": 10}'"
        ) from error
    if not isinstance(arguments, dict):
        raise UsageError("--arch-args is no JSON object", hint="write e.g. '{\"num_classes\": 10}'")
    return arguments


def check_numbers(k: int, tol: float, max_matvecs: int | None) -> None:
    """Refuse counts and tolerances that make no sense.

    Raises:
        UsageError: If one does not.
    """
    if k < 1:
        raise UsageError(f"--top-k {k} asks for no singular value", hint="use -k 1 or more")
    if not (math.isfinite(tol) and 0 < tol < 1):
        raise UsageError(
            f"--tol {tol} is no relative tolerance", hint="use a number between 0 and 1, e.g. 1e-5"
        )
    if max_matvecs is not None and max_matvecs < 1:
        raise UsageError(f"--max-matvecs {max_matvecs} allows no work", hint="use 1 or more, or leave it out")


def check_source(path: Path) -> None:
    """Refuse a path where nothing is.

    Raises:
        CheckpointError: If nothing is there, or it cannot be asked; the hint names what is called nearly so.
    """
    try:
        if path.exists():
            return
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error})", hint="check the path, and who may read it"
        ) from error
    folder = path.parent
    near = difflib.get_close_matches(path.name, _names(folder) - {path.name}, n=1)
    hint = f"did you mean {folder / near[0]}?" if near else "check the path"
    what = f"{path} is a link to nothing" if path.is_symlink() else f"there is no file {path}"
    raise CheckpointError(what, hint=hint)


def same_file(one: Path, other: Path) -> bool:
    """Tell whether two paths lead to one file that is there."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError:
        return set()
