"""What `spectool clip` says at the end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from spectool.cli.messages import say
from spectool.cli.numbers import rounded_up, significant
from spectool.cli.output import Target
from spectool.report.clip import ClipReport, ClipRow

# Bounds that exceed σ₁ by more are better found anew, as `check` does, than allowed for.
_NEAR = 0.05


def conclude_clip(report: ClipReport, target: Target, *, verbose: bool = False) -> None:
    """Say why (``-v``), what to know, what was done and written, what to do next, and last the coverage line.

    Args:
        report: What was delivered.
        target: Where it went.
        verbose: Whether to say what made each row.
    """
    if verbose:
        for row in report.rows:
            if row.solver:
                rounds = "" if row.iterations is None else f", {_count(row.iterations, 'round')}"
                say(f"{row.row.layer}: {row.solver}{rounds}")
    if not target.quiet:
        for note in report.report.notes:
            say(note, label="note")
        if report.adjusted:
            verb = "follows" if len(report.adjusted) == 1 else "follow"
            say(
                f"{_count(len(report.adjusted), 'mean')} {verb} the weights, by at most "
                f"{significant(max(report.adjusted.values()))} standard deviations",
                label="note",
            )
    say(report.summary())
    if not target.quiet:
        say(written_line(report))
        hint = next_step(report)
        if hint:
            say(hint, label="hint")
    analysed, total, skipped = report.coverage
    say(f"{analysed} of {total} linear maps analysed, {skipped} skipped")


def written_line(report: ClipReport) -> str:
    """Return what was written, and how little of it is new."""
    total = "" if report.tensors is None else f" of {report.tensors}"
    count = len(report.changed)
    tensors = f"{count}{total} tensor{'s' if total or count != 1 else ''}"
    if report.output is None:
        return f"nothing written (--dry-run): {tensors} would change"
    if not count:
        return f"wrote {report.output}: nothing had to change, it is a copy"
    return f"wrote {report.output}: {tensors} changed, all other bytes are identical"


def next_step(report: ClipReport) -> str:
    """Return the most useful thing to do next; empty if there is none."""
    gated = [row for row in report.rows if row.action in ("clipped", "kept")]
    loose = sum(row.row.converged is False for row in gated)
    open_rows = [row for row in gated if row.proven is False]
    if loose:
        return f"{_count(loose, 'row')} not converged: raise --max-matvecs"
    if report.output is None:
        return "-o OUT instead of --dry-run writes it" if report.changed else ""
    if not gated:
        return ""
    check = f"spectool check {_call(report.output, report)}"
    if not open_rows:
        return "" if report.counts["refused"] else f"{check} proves it"
    near = [excess for row in open_rows if (excess := _excess(row)) is not None and excess <= _NEAR]
    # A bound found again is the same up to rounding; the share that is printed must do.
    slack = f" --slack {rounded_up(max(near) * 100 * (1 + 1e-6) + 1e-7)}%" if near else ""
    more = "" if report.prove else "; clip --prove goes on until the bound itself is within"
    return f"{_count(len(open_rows), 'row')} not proven within: {check}{slack} decides{more}"


def _call(path: str, report: ClipReport) -> str:
    """Return a file and the options that find the same operators in it and ask the same of them."""
    return " ".join(shlex.quote(word) for word in (path, *_words(report.report.settings)))


def _words(settings: Mapping[str, Any]) -> Iterator[str]:
    for pattern, limit in (settings.get("max") or {}).items():
        yield from ("--max", f"{limit:.17g}" if pattern == "*" else f"{pattern}={limit:.17g}")
    for name, shape in (settings.get("input_shape") or {}).items():
        text = "x".join(str(size) for size in shape) if isinstance(shape, (list, tuple)) else str(shape)
        yield from ("--input", f"{name}={text}" if name else text)
    for flag in ("arch", "key"):
        if settings.get(flag):
            yield from (f"--{flag}", str(settings[flag]))
    if settings.get("level", "composed") != "composed":
        yield from ("--level", str(settings["level"]))
    for flag, name in (("layers", "layers"), ("exclude", "exclude"), ("kind", "kinds")):
        for value in settings.get(name) or ():
            yield from (f"--{flag}", str(value))
    for flag, on in (("--assume-bn", "assume_bn"), ("--trust", "trust")):
        if settings.get(on):
            yield flag
    if settings.get("recognise") is False:
        yield "--no-recognise"


def _excess(row: ClipRow) -> float | None:
    """Return by what share the proven bound exceeds the limit; None where there is no bound."""
    if row.after is None or row.after.proven is None or row.limit is None:
        return None
    return row.after.proven / row.limit - 1


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
