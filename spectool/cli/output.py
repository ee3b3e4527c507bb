"""Where a result goes: a terminal, a pipe or a file."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spectool.cli.messages import say
from spectool.cli.parsing import same_file
from spectool.cli.streams import check_stdout, emit
from spectool.errors import SpectoolError, UsageError
from spectool.report.files import check_target, descriptor_of, replace_file
from spectool.report.layout import Layout, WriteOptions
from spectool.report.writers import FORMATS, format_of, render

if TYPE_CHECKING:
    from rich.console import RenderableType

TABLE = "table"
_AGREE = {("json", "sarif")}  # suffixes that promise nothing wrong though they ask for another format
Drawing = Callable[[int | None], "tuple[RenderableType, list[str]]"]


@dataclass(frozen=True)
class Target:
    """Where a result goes, and as what.

    Attributes:
        format: ``table`` or a key of ``FORMATS``.
        path: File; None for stdout.
        quiet: Whether messages that are no errors are left out.
        flag: The option that names the file, for hints.
    """

    format: str
    path: Path | None
    quiet: bool = False
    flag: str = "-o"


def choose_target(
    output: str | None,
    format: str | None,
    source: Path,
    *,
    quiet: bool = False,
    more: Mapping[str, tuple[str, ...]] | None = None,
    flag: str = "-o",
) -> Target:
    """Decide format and place, and refuse what cannot work before anything is computed.

    Args:
        output: What ``flag`` says: a file, ``-`` for stdout, None for stdout.
        format: What ``--format`` says; None to guess: by suffix, a table on a terminal, TSV in a pipe.
        source: The file that is read, which is never written.
        quiet: Whether messages are left out.
        more: Formats that only this command has, each with the suffixes that ask for it.
        flag: The option that names the file.

    Raises:
        UsageError: If the format is unknown or cannot go there.
        OutputError: If the file, or stdout, cannot be written.
    """
    path = None if output in (None, "-") else Path(str(output))
    if path is not None and descriptor_of(path) == 1:
        path = None  # what stands in it already, it being a file, is not to be replaced
    known = (TABLE, *FORMATS, *(more or {}))
    if format is not None and format not in known:
        raise UsageError(f"there is no format called {format!r}", hint=f"formats: {', '.join(known)}")
    if path is None:
        chosen = format or (TABLE if sys.stdout.isatty() else "tsv")
        if chosen == "xlsx" and sys.stdout.isatty():
            raise UsageError("a workbook is no text for a terminal", hint=f"name a file: {flag} result.xlsx")
        check_stdout()
        return Target(chosen, None, quiet, flag)
    suffix = path.suffix.lower().removeprefix(".")
    own = next((name for name, suffixes in (more or {}).items() if suffix in suffixes), None)
    chosen = format or own or format_of(path)
    check_target(path)
    promised = own or (suffix if suffix in FORMATS else chosen)
    if promised != chosen and (suffix, chosen) not in _AGREE and not quiet:
        say(f"{path} ends in .{suffix}, but --format says {chosen}, and that is written", label="warning")
    if same_file(path, source):
        raise UsageError(
            f"{path} is the file to read; it is not overwritten", hint=f"name another file after {flag}"
        )
    if (own is None and suffix not in FORMATS) or suffix == "json":
        _spare_parts(path, source, flag)
    return Target(chosen, path, quiet, flag)


def _spare_parts(path: Path, source: Path, flag: str) -> None:
    """Refuse to write over another file of what is read: a shard, an index, external data.

    Raises:
        UsageError: If the result would be written there.
    """
    home = source if source.is_dir() else source.parent
    if not (path.is_file() and path.resolve().is_relative_to(home.resolve())):
        return
    part = path.name in ("config.json", "adapter_config.json") or path.name.endswith(".index.json")
    if path.suffix.lower() != ".json" and not part:
        from spectool.checkpoint import open_checkpoint

        with suppress(SpectoolError):  # which reading it will say again
            sources = getattr(open_checkpoint(source).reader, "sources", {})
            part = any(same_file(path, file) for file in sources)
    if part:
        raise UsageError(
            f"{path} belongs to what is read; it is not overwritten", hint=f"name another file after {flag}"
        )


def deliver(
    layout: Layout,
    target: Target,
    options: WriteOptions,
    draw: Drawing,
    more: Mapping[str, Callable[[], bytes]] | None = None,
) -> None:
    """Write a result where it was asked for.

    Args:
        layout: Its tables and JSON.
        target: From ``choose_target``.
        options: Guarding.
        draw: Draws the terminal table for a width (None: any), and says which columns did not fit.
        more: Writers of the formats that only this command has.

    Raises:
        OutputError: If the file cannot be written.
    """
    remark = ""
    if target.format == TABLE:
        data, hidden = _drawn(draw, target)
        if hidden:
            remark = (
                f"too narrow for {', '.join(hidden)}: widen the terminal or write a file with {target.flag}"
            )
    elif more and target.format in more:
        data = more[target.format]()
    else:
        rendered = render(layout, target.format, options)
        data = rendered.data
        if rendered.guarded:
            cells = "1 text cell" if rendered.guarded == 1 else f"{rendered.guarded} text cells"
            remark = f"{cells} guarded by a leading ' against spreadsheets (--no-guard leaves them alone)"
    if target.path is not None:
        replace_file(target.path, data)
    elif data:
        emit(data)
    if not target.quiet:
        for text in filter(None, (remark, f"wrote {target.path}" if target.path else "")):
            say(text)


def terminal_width() -> int:
    """Return the cells of a line of the terminal (COLUMNS, else what it says of itself)."""
    return max(shutil.get_terminal_size((100, 24)).columns, 20)


def _drawn(draw: Drawing, target: Target) -> tuple[bytes, list[str]]:
    """Draw on a terminal at its width, elsewhere at full width and without colour."""
    from rich.console import Console

    live = target.path is None and sys.stdout.isatty()
    width = terminal_width() if live else None
    drawing, hidden = draw(width)
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width or 100_000,
        force_terminal=live,
        no_color=None if live else True,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    console.print(drawing, crop=False)
    if not stream.getvalue().strip():
        return b"", hidden
    # Rich pads every line to the width of the table.
    lines = stream.getvalue().rstrip("\n").split("\n")
    return "".join(f"{line.rstrip()}\n" for line in lines).encode("utf-8", "replace"), hidden
