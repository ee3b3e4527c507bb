"""The commands, and how their help looks."""

from __future__ import annotations

import difflib
import inspect as introspection
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from spectool import __version__
from spectool.cli import check, clip, inspect, ls
from spectool.cli.options import COMPUTE, MESSAGES, OUTPUT, READ, SELECT
from spectool.errors import UsageError

EXAMPLES = """
spectool inspect net.onnx                                 singular values of every layer
spectool inspect net.pt --input 1x3x224x224 -o net.xlsx   the same, as a workbook
spectool clip net.pt --max 1.0 -o net.clipped.pt          the nearest checkpoint within a limit
spectool check net.onnx --max 1.05                        prove a limit, for scripts
spectool ls net.safetensors                               what the file holds
"""
_PANELS = (COMPUTE, SELECT, READ, OUTPUT, MESSAGES)


class Command(TyperCommand):
    """A command whose help begins with examples and groups its options."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the sentence, then the examples."""
        module = introspection.getmodule(self.callback)
        _write_text(formatter, self.help or "", getattr(module, "EXAMPLES", ""))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, a section each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                other = "Arguments" if param.param_type_name == "argument" else MESSAGES
                groups.setdefault(getattr(param, "rich_help_panel", None) or other, []).append(record)
        for title in ("Arguments", *_PANELS):
            if title in groups:
                with formatter.section(title):
                    formatter.write_dl(groups[title])
        formatter.write(
            "\nEvery option can also be set as SPECTOOL_<OPTION>, or in [tool.spectool] of pyproject.toml.\n"
        )


class Group(TyperGroup):
    """The program: its help begins with examples, and a wrong command is met with the right one."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the sentence, then the examples."""
        _write_text(formatter, self.help or "", EXAMPLES)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command.

        Raises:
            UsageError: If there is no such command; the hint names the nearest.
        """
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(self.list_commands(ctx))}"
            if Path(name).exists():
                hint = f"did you mean spectool inspect {name}?"
            raise UsageError(f"there is no command called {name!r}", hint=hint)
        return super().resolve_command(ctx, args)


def _write_text(formatter: Any, sentence: str, examples: str) -> None:
    formatter.write_paragraph()
    formatter.write_text(introspection.cleandoc(sentence))
    with formatter.section("Examples"):
        for line in examples.strip().splitlines():
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"spectool {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Group,
    name="spectool",
    # Plain help: no Rich import, readable in a pipe, and options grouped all the same.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback()
def spectool(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Certified singular values of every implicitly linear layer in a neural-network checkpoint."""


app.command(cls=Command)(inspect.inspect)
app.command(cls=Command)(clip.clip)
app.command(cls=Command)(check.check)
app.command(cls=Command)(ls.ls)
