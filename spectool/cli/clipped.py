"""What `spectool clip` says at the end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any

from spectool.cli.messages import say
from spectool.cli.numbers import significant
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
        moved = means_line(report)
        if moved:
            say(moved, label="note")
    say(report.summary())
    if not target.quiet:
        say(written_line(report))
        for hint in next_steps(report):
            say(hint, label="hint")
    analysed, total, skipped = report.coverage
    say(f"{analysed} of {total} linear maps analysed, {skipped} skipped")


def means_line(report: ClipReport) -> str:
    """Return how many running means and biases moved with the weights; empty if none did."""
    moved = {name for row in report.rows for name in row.recentered} | set(report.adjusted)
    if not moved:
        return ""
    far = (
        f", by at most {significant(max(report.adjusted.values()))} standard deviations"
        if report.adjusted
        else ""
    )
    one = len(moved) == 1
    noun, them = ("running mean or bias follows", "it") if one else ("running means or biases follow", "them")
    return f"{len(moved)} {noun} the weights{far} (--no-recenter leaves {them} alone)"


def written_line(report: ClipReport) -> str:
    """Return what was written, and how little of it is new."""
    total = "" if report.tensors is None else f" of {report.tensors}"
    count = len(report.changed)
    tensors = f"{count}{total} tensor{'s' if total or count != 1 else ''}"
    if report.output is None:
        return f"nothing written (--dry-run): {tensors} would change"
    if not count:
        return f"wrote {report.output}: nothing changed, it is a copy"
    also = [name for name in report.files if name != report.output]
    places = " and ".join([report.output, *also]) if len(also) == 1 else report.output
    return f"wrote {places}: {tensors} changed, all other bytes are identical"


def next_steps(report: ClipReport) -> Iterator[str]:
    """Yield what would be useful to do next."""
    gated = [row for row in report.rows if row.action in ("clipped", "kept")]
    clipped = [row.row for row in gated if row.action == "clipped"]
    loose = sum(row.row.converged is False for row in gated)
    anywhere = sum(any(text.startswith("infinite grid") for text in row.assumed) for row in clipped)
    if anywhere and not report.report.settings.get("all_sizes"):
        way = (
            "--input" if report.report.format == "onnx" else "--arch with --input, or an ONNX or .pt2 export,"
        )
        yield f"{_count(anywhere, 'row')} clipped for every input size: {way} would change less"
    if loose:
        yield f"{_count(loose, 'row')} not converged: raise --max-matvecs"
    elif report.output is None:
        yield from ["-o OUT instead of --dry-run writes it"] if report.changed else []
    elif any(_scaleless(row) for row in gated):
        yield "factors without alpha: their scale is not known, and no limit on their product can be proven"
    elif gated:
        yield from _certificate(report, [row for row in gated if row.proven is False])


def _certificate(report: ClipReport, open_rows: Sequence[ClipRow]) -> Iterator[str]:
    """Yield how to prove what was written, unless rows were refused: they decide what `check` says."""
    check = f"spectool check {_call(report.output or '', report)}"
    if open_rows:
        near = [excess for row in open_rows if (excess := _excess(row)) is not None and excess <= _NEAR]
        # A bound found again is the same up to rounding; the share that is printed must do.
        slack = f" --slack {_share(max(near) * (1 + 1e-6))}" if near else ""
        more = "" if report.prove else "; clip --prove goes on until the bound itself is within"
        yield f"{_count(len(open_rows), 'row')} not proven within: {check}{slack} decides{more}"
    elif not report.counts["refused"]:
        yield f"{check} proves it"


def _call(path: str, report: ClipReport) -> str:
    """Return a file and the options that find the same operators in it and ask the same of them."""
    return " ".join(shlex.quote(word) for word in (path, *_words(report.report.settings)))


def _words(settings: Mapping[str, Any]) -> Iterator[str]:
    for pattern, limit in (settings.get("max") or {}).items():
        number = repr(float(limit)).removesuffix(".0")
        yield from ("--max", number if pattern == "*" else f"{pattern}={number}")
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


def _scaleless(row: ClipRow) -> bool:
    return any(text.startswith("alpha") for text in row.row.assumed)


def _excess(row: ClipRow) -> float | None:
    """Return by what share the proven bound exceeds the limit; None where there is no bound."""
    if row.after is None or row.after.proven is None or row.limit is None:
        return None
    return row.after.proven / row.limit - 1


def _share(value: float) -> str:
    """Return a share in per cent to two digits, rounded up.

    Example:
        >>> _share(0.00501), _share(0.0000341), _share(1e-16)
        ('0.51%', '0.0035%', '0.0000010%')
    """
    rounded = Context(prec=2, rounding=ROUND_CEILING).create_decimal(Decimal(max(value * 100, 1e-6)))
    return f"{rounded:f}%"


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
