"""Run a command line and turn whatever happens into one message and one exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import typer

from spectool.cli.commands import app
from spectool.cli.config import Commands, Settable, load_defaults
from spectool.cli.messages import say
from spectool.cli.signals import Stop, stoppable
from spectool.cli.streams import drop_stdout, finish_stdout, open_streams
from spectool.errors import OutputError, SpectoolError

INTERNAL = 3
# Click's own root of errors, wherever click lives: newer versions of typer bundle it.
_CLICK_ERROR = cast("type[Exception]", typer.BadParameter.__mro__[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run spectool and return its exit code.

    Args:
        arguments: What follows the program's name; None for the process's own.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    open_streams()
    with stoppable(process=arguments is None) as stop:
        try:
            return _run(args)
        except (KeyboardInterrupt, typer.Abort) as interrupt:
            return _stopped(stop, interrupt)
        except Exception as error:
            # An interrupt in the middle of an import can come out as any exception.
            return _stopped(stop, error) if stop.number else _failed(error, args)


def _stopped(stop: Stop, error: BaseException) -> int:
    for note in getattr(error, "__notes__", ()):
        say(note, label="note")
    say("terminated" if stop.number == signal.SIGTERM else "interrupted")
    return stop.exit_code


def _failed(error: Exception, args: list[str]) -> int:
    """Report an error and return its exit code."""
    if isinstance(error, SpectoolError):
        return _report(error, error.exit_code, str(error), error.hint, args)
    if isinstance(error, _CLICK_ERROR):
        return _report(error, 2, *_explain(error), args)
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has seen enough.
        drop_stdout()
        return 0
    if isinstance(error, OSError):
        # Nobody's defect: a folder that vanished, too many open files, a full disk behind stdout.
        try:
            finish_stdout()
        except OutputError as refused:
            return _failed(refused, args)
        where = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
        what = f"the system refused ({error.strerror or error}){where}"
        return _report(error, 2, what, "run it again with --debug to see where", args)
    if isinstance(error, MemoryError):
        return _report(
            error, 2, "there is not enough memory", "close other programs, or raise its limit", args
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("spectool"):
        # Mapping a library fails where memory is limited.
        what = f"a library cannot be loaded ({error})".splitlines()[0]
        return _report(
            error, 2, what, "see what limits memory (ulimit -v), and whether pip check is content", args
        )
    what = f"internal: {type(error).__name__}: {error}".splitlines()[0]
    return _report(error, INTERNAL, what, "run it again with --debug and report what it says", args)


def _run(args: list[str]) -> int:
    command: Any = typer.main.get_command(app)
    if "_SPECTOOL_COMPLETE" in os.environ:
        command(prog_name="spectool")
    if not args:
        with command.make_context("spectool", [], resilient_parsing=True) as context:
            sys.stderr.write(f"{context.get_help()}\n")
        return 2
    defaults: dict[str, dict[str, Any]] = {}
    if not {"-h", "--help", "--version"} & set(args):
        defaults, _ = _defaults(command)
    try:
        with command.make_context("spectool", args, default_map=defaults) as context:
            code = command.invoke(context)
        finish_stdout()
    except typer.Exit as leave:
        finish_stdout()
        return leave.exit_code
    return code if isinstance(code, int) else 0


def _defaults(command: Any) -> tuple[dict[str, dict[str, Any]], Path | None]:
    try:
        here = Path.cwd()
    except OSError:
        return {}, None  # the working directory was removed
    return load_defaults(here, settable(command))


def settable(command: Any) -> Commands:
    """Return what a configuration file may set: command → long option without dashes → parameter."""
    return {
        name: {
            max(param.opts, key=len).lstrip("-"): Settable(param.name, bool(param.multiple))
            for param in entry.params
            if param.param_type_name == "option"
        }
        for name, entry in _commands(command).items()
    }


def _commands(command: Any) -> Mapping[str, Any]:
    commands: Mapping[str, Any] = command.commands
    return commands


def _report(error: BaseException, code: int, what: str, hint: str, args: list[str]) -> int:
    if "--debug" in args or os.environ.get("SPECTOOL_DEBUG", "").lower() in ("1", "true", "yes", "on"):
        traceback.print_exception(error)
    say(what, label="error")
    if hint:
        say(hint, label="hint")
    return code


def _explain(error: Any) -> tuple[str, str]:
    """Return what and what to do, from one of click's errors."""
    # Newer versions of typer speak through pydantic, which says more than anyone wants to know.
    what = error.format_message().rstrip(".").replace("Value error, ", "").partition(", unable to parse")[0]
    what = what[:1].lower() + what[1:]
    near = getattr(error, "possibilities", None)
    if near:
        return what.partition(" (Possible")[0].partition(" Did you mean")[
            0
        ], f"did you mean {sorted(near)[0]}?"
    context: Any = getattr(error, "ctx", None)
    param: Any = getattr(error, "param", None)
    if context is None:
        return what, "`spectool --help` shows how"
    source = context.get_parameter_source(param.name) if param is not None else None
    match getattr(source, "name", ""):
        case "ENVIRONMENT":
            hint = f"it comes from the environment: {param.envvar}={os.environ.get(param.envvar, '')}"
        case "DEFAULT_MAP":
            hint = f"it comes from {_defaults(context.find_root().command)[1]}"
        case _:
            hint = f"`{context.command_path} --help` shows how"
    return what, hint
