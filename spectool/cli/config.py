"""Defaults from `[tool.spectool]` in pyproject.toml or spectool.toml: below flags and environment."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectool.errors import UsageError

_NAMES = ("spectool.toml", "pyproject.toml")
#: A folder may be a stranger's; no honest configuration is longer.
_MOST_BYTES = 10**6
# Where a result is written, and what it replaces, is never up to a file that happens to lie in the folder.
_FLAGS_ONLY = frozenset({"output", "report", "force", "in-place", "debug", "trust"})
# Whoever looks at a repository they have just downloaded stands in it: its configuration must not run its code.
_INERT_ARCHITECTURES = ("torchvision:", "timm:")


@dataclass(frozen=True)
class Settable:
    """An option that a file may set.

    Attributes:
        parameter: Name of the command's parameter.
        repeats: Whether it can be given more than once.
    """

    parameter: str
    repeats: bool


Commands = Mapping[str, Mapping[str, Settable]]


def load_defaults(start: Path, commands: Commands) -> tuple[dict[str, dict[str, Any]], Path | None]:
    """Return defaults per command, and the file they stand in.

    The nearest folder upward from ``start`` that has a spectool.toml, or a pyproject.toml with ``[tool.spectool]``,
    decides; the search ends at the root of a repository. Keys are option names; a table named like a command holds
    keys for that command only.

    Args:
        start: Folder to begin at.
        commands: Command → long option without dashes → what it sets.

    Raises:
        UsageError: If the file is no TOML, or holds a key that is no option.
    """
    for folder in (start, *start.parents):
        for name in _NAMES:
            path = folder / name
            # A folder that may not be searched says nothing.
            table = _table(path) if os.path.isfile(path) else None  # noqa: PTH113
            if table is not None:
                return _checked(path, table, commands), path
        if os.path.exists(folder / ".git"):  # noqa: PTH110
            break
    return {}, None


def _table(path: Path) -> Mapping[str, Any] | None:
    import tomllib

    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it is longer than {_MOST_BYTES} bytes")
        document = tomllib.loads(data.decode("utf-8"))
    # ValueError: no TOML, no UTF-8, an integer of thousands of digits; RecursionError: nested too deeply.
    except (ValueError, RecursionError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="correct or remove it") from error
    tool = document.get("tool", {})
    table = tool.get("spectool") if isinstance(tool, Mapping) else None
    if table is None and path.name == "spectool.toml":
        table = document
    if table is not None and not isinstance(table, Mapping):
        raise UsageError(
            f"[tool.spectool] in {path} is no table", hint="write [tool.spectool] and keys below it"
        )
    return table


def _checked(path: Path, table: Mapping[str, Any], commands: Commands) -> dict[str, dict[str, Any]]:
    every = {name: settable for options in commands.values() for name, settable in options.items()}
    defaults: dict[str, dict[str, Any]] = {command: {} for command in commands}
    shared = {_option(path, key, every): value for key, value in table.items() if key not in commands}
    for command, options in commands.items():
        own = table.get(command, {})
        if not isinstance(own, Mapping):
            raise UsageError(f"{command} in {path} is no table", hint=f"write [tool.spectool.{command}]")
        given = {name: value for name, value in shared.items() if name in options}
        given |= {_option(path, key, options): value for key, value in own.items()}
        if not str(given.get("arch", "timm:")).startswith(_INERT_ARCHITECTURES):
            raise UsageError(
                f"arch in {path} may name a model of torchvision or timm only: other code is not run for a file's sake",
                hint="give --arch on the command line, or SPECTOOL_ARCH in the environment",
            )
        for name, value in given.items():
            defaults[command][options[name].parameter] = _shaped(value, options[name].repeats)
    return defaults


def _option(path: Path, key: str, known: Mapping[str, Settable]) -> str:
    name = key.replace("_", "-")
    if name in _FLAGS_ONLY:
        raise UsageError(
            f"{key} in {path} cannot be set in a file", hint=f"give --{name} on the command line"
        )
    if name not in known:
        near = difflib.get_close_matches(name, set(known) - _FLAGS_ONLY, n=1)
        hint = f"did you mean {near[0]}?" if near else "`spectool inspect --help` lists the options"
        raise UsageError(f"{key} in {path} is no option", hint=hint)
    return name


def _shaped(value: Any, repeats: bool) -> Any:
    """Return a value as the command line would give it: lists for what repeats, text with commas for what lists."""
    if repeats:
        return list(value) if isinstance(value, list) else [value]
    if isinstance(value, list):
        return ",".join(str(entry) for entry in value)
    return value
