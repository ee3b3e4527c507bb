"""Write docs/cli.md from the commands themselves: ``python -m spectool.cli.reference > docs/cli.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import typer

from spectool.cli.commands import EXAMPLES, app

_INTRODUCTION = """\
# Command line

Written by `python -m spectool.cli.reference`; a test keeps it equal to the program.

    {examples}

stdout carries data only; messages, progress and hints go to stderr. On a terminal the result is a table that fits its
width (what had to be left out is named on stderr); in a pipe it is TSV with all columns and digits. The last line on
stderr of `inspect`, `clip` and `check` is the coverage line, `21 of 21 linear maps analysed, 0 skipped`: it counts
operators with a weight matrix or kernel (convolutions, linear layers, embeddings, recurrent matrices).
`docs/formats.md` describes the formats. A file that `-o` or `--report` names is written whole or not at all, and
replaces what was there (never the input); `-` and `/dev/stdout` are stdout, pipes and `/dev/fd/N` are written as they
stand.

## Where a value comes from

Flags, then `SPECTOOL_*` environment variables (the last column below; several values are separated by spaces), then
`[tool.spectool]` in the nearest `spectool.toml` or `pyproject.toml` upward from the working directory, up to the root
of the repository. Keys are option names without dashes in front; `[tool.spectool.inspect]` is for one command only.
`--output`, `--report`, `--force`, `--in-place`, `--debug` and `--trust` cannot be set in a file, `--arch` only to a
model of torchvision or timm: a repository that you look at must not run its code by its configuration. `NO_COLOR` and
`COLUMNS` are respected.

    [tool.spectool]
    top-k = 4
    exclude = ["head.*"]

    [tool.spectool.inspect]
    certify = true

## Exit codes

| code | meaning |
| ---: | --- |
| 0 | done; `check`: every limit is proven; `clip`: every operator with a limit is within it |
| 1 | `check`: a proven violation |
| 2 | usage, an input that cannot be read, or an output that cannot be written |
| 3 | internal error (traceback with `--debug`) |
| 4 | `check`: undecided (an interval straddles its limit; a row not converged, failed or skipped) |
| 4 | `clip`: a row not clipped, failed or not converged; under `--prove` also a bound that exceeds its limit |
| 5 | `--strict`, and some linear operators were skipped |
| 130 | interrupted (SIGINT); 143 by SIGTERM, 129 by SIGHUP; no half file is left |

Where several apply, the first of 130, 3, 2, 1, 4, 5, 0 counts. A reader of stdout that goes away (`| head`) is no
error; a stdout that is full or closed is one. `docs/check.md` says how `check` decides, `docs/clip.md` what `clip`
writes, `docs/security.md` lists the limits that `--limit` names, and what they are for.
"""


def reference() -> str:
    """Return the text of docs/cli.md."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("spectool", [], resilient_parsing=True)
    parts = [_INTRODUCTION.format(examples="\n    ".join(EXAMPLES.strip().splitlines()))]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        parts.append("\n".join(_command(name, command, inner)))
    return "\n".join(parts)


def _command(name: str, command: Any, context: Any) -> Iterator[str]:
    examples = import_module(command.callback.__module__).EXAMPLES.strip().splitlines()
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    yield f"## `spectool {name}`\n"
    yield f"{command.help}\n"
    yield from (f"    {line}" for line in examples)
    yield "\n| argument | meaning |\n| --- | --- |"
    yield from (f"| `{param.metavar}` | {_cell(param.help)} |" for param in arguments)
    yield "\n| option | meaning | default | environment |\n| --- | --- | --- | --- |"
    for param in options:
        flags = ", ".join(f"`{flag}`" for flag in param.opts)
        value = "" if param.is_flag else f" `{param.metavar}`"
        yield f"| {flags}{_cell(value)} | {_cell(param.help)} | {_default(param)} | `{param.envvar}` |"
    yield ""


def _default(param: Any) -> str:
    value = param.default
    return "" if value is None or value is False else f"`{getattr(value, 'value', value)}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
