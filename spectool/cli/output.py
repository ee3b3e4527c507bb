"""Where a result goes: a terminal, a pipe or a file."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spectool.cli.messages import say
from spectool.errors import UsageError
from spectool.report.layout import Layout, WriteOptions
from spectool.report.writers import FORMATS, check_target, format_of, render, replace_file

if TYPE_CHECKING:
    from rich.console import RenderableType

TABLE = "table"
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
        OutputError: If the file cannot be written.
    """
    path = None if output in (None, "-") else Path(str(output))
    known = (TABLE, *FORMATS, *(more or {}))
    if format is not None and format not in known:
        raise UsageError(f"there is no format called {format!r}", hint=f"formats: {', '.join(known)}")
    if path is None:
        chosen = format or (TABLE if sys.stdout.isatty() else "tsv")
        if chosen == "xlsx" and sys.stdout.isatty():
            raise UsageError("a workbook is no text for a terminal", hint=f"name a file: {flag} result.xlsx")
        return Target(chosen, None, quiet, flag)
    suffix = path.suffix.lower().removeprefix(".")
    own = next((name for name, suffixes in (more or {}).items() if suffix in suffixes), None)
    chosen = format or own or format_of(path)
    check_target(path)
    if path.exists() and source.exists() and path.samefile(source):
        raise UsageError(
            f"{path} is the file to read; it is not overwritten", hint=f"name another file after {flag}"
        )
    return Target(chosen, path, quiet, flag)


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


def emit(data: bytes) -> None:
    """Write data to stdout; a reader that has gone away (`| head`) is no error."""
    try:
        if sys.stdout.isatty():
            # A bare CR would move the cursor over what stands there.
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\\r")
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends; let it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
