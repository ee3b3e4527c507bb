"""The gate for scripts: is σ₁ of every operator proven to be within its limit?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spectool.api.baselines import Earlier, Rows, read_baseline
from spectool.api.devices import choose_device, choose_dtype
from spectool.api.job import Job, Selection, numbered, open_job, report_of, settings_of
from spectool.api.limits import Bounds, as_bounds
from spectool.api.rows import Options, listed_row
from spectool.api.settling import level_of, settle
from spectool.api.sources import InputShapes, Ways
from spectool.api.verdicts import Gate, judge, ungated
from spectool.checkpoint.limits import DEFAULT, Limits
from spectool.errors import NothingToAnalyse, UsageError
from spectool.graph import Region, Skipped
from spectool.progress import Progress, Step, silent
from spectool.report.check import BaselineFile, CheckReport, CheckRow
from spectool.report.row import Row
from spectool.spectrum.types import Method


def check(
    source: str | Path | torch.nn.Module,
    max: float | Mapping[str, float] | Bounds | None = None,
    *,
    slack: float = 0.0,
    accept_probabilistic: bool = False,
    baseline: str | Path | None = None,
    tolerance: float = 0.01,
    input_shape: InputShapes | None = None,
    method: Method = "auto",
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    level: str = "composed",
    layers: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Sequence[str] = (),
    assume_bn: bool = False,
    key: str | None = None,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    recognise: bool = True,
    trust: bool = False,
    shard: tuple[int, int] | None = None,
    hash: bool = False,
    limits: Limits = DEFAULT,
    progress: Progress = silent,
) -> CheckReport:
    """Decide for every operator whether its largest singular value is within a limit.

    A verdict follows from the interval that encloses σ₁, never from the estimate: ``proven`` if its upper end is at
    most C(1+slack), ``violated`` if its lower end is greater, ``undecided`` otherwise. Upper ends are deterministic
    (as with ``certify``). An operator that stands for a layer of unknown geometry bounds it from above only and is
    never ``violated``. A skipped or failed operator is ``undecided``. Regions without a matrix weight are
    ``unlimited``, unless ``kinds`` names them, and so are rows that no limit matches; neither is computed.

    Args:
        source: A checkpoint file or directory, or a live module.
        max: Limit on σ₁, or a mapping from glob (of a row's key or a weight's name) to limit: the last that matches
            counts, ``*`` is the default of rows that no other matches. Optional with a baseline.
        slack: Relative amount by which limits may be exceeded: the same as limits greater by that factor.
        accept_probabilistic: Whether an upper bound that fails with probability at most 1e-9 is a proof.
        baseline: JSON result of an earlier ``inspect`` or ``check`` to compare σ₁ with.
        tolerance: Relative growth over the baseline's upper bound that is no regression.
        input_shape: Shape of the model's input with its batch axis, or a mapping from input name to shape.
        method: ``auto``, ``exact``, ``lanczos``, ``power`` or ``powerqr``.
        tol: Relative residual to reach.
        max_matvecs: Cap on operator applications per row.
        seed: Seed of the start vectors.
        device: ``auto``, ``cpu``, ``cuda[:i]`` or ``mps``.
        dtype: ``float32`` (default) or ``float64``, of the arithmetic.
        level: ``composed`` (maximal regions, a lone operator being its own), ``layer`` or ``both``.
        layers: Globs of row keys to keep.
        exclude: Globs of row keys to drop.
        kinds: Kinds to keep.
        assume_bn: Whether to guess conv–batch-norm pairs where the file has no program.
        key: Which branch of a nested training checkpoint to take.
        arch: Architecture of a file without a program.
        arch_args: Keyword arguments of the architecture's factory.
        recognise: Whether to look a bare state dict up among known architectures.
        trust: Whether the code of a pickled module may run to give exact operators.
        shard: (i, n): check every n-th operator from the i-th.
        hash: Whether to hash the file.
        limits: What the file may ask for.
        progress: Receives steps.

    Returns:
        The verdicts; ``.ok``, ``.verdict``, ``.counts`` and ``.exit_code()`` sum them up.

    Raises:
        UsageError: If an argument cannot be used, a pattern matches no row, or the baseline is none.
        CheckpointError: If the file cannot be read.
        NothingToAnalyse: If there is no operator, the filters leave none, or no limit concerns any.

    Example:
        >>> import spectool
        >>> report = spectool.check("sample_models/digits_mlp_state.pt", max=100.0)
        >>> report.verdict, report.counts["proven"] == len(report.rows)
        ('pass', True)
    """
    bounds = as_bounds(max)
    if not bounds and baseline is None:
        raise UsageError(
            "there is no limit to check", hint="give one, e.g. --max 1.0, or --baseline old.json"
        )
    gate = Gate(_relative(slack, "slack"), _relative(tolerance, "tolerance"), accept_probabilistic)
    earlier = None if baseline is None else read_baseline(baseline)
    options = Options(1, method, tol, max_matvecs, True, seed, choose_device(device), choose_dtype(dtype))
    ways = Ways(assume_bn, key, arch, arch_args, recognise, trust, limits)
    selection = Selection(level, layers, exclude, kinds, shard)
    settings = {
        **settings_of(options, ways, selection, input_shape),
        "max": bounds.to_dict(),
        "slack": gate.slack,
        "accept_probabilistic": accept_probabilistic,
        "baseline": None if baseline is None else str(baseline),
        "tolerance": None if baseline is None else gate.tolerance,
    }
    progress(Step("finding operators"))
    job = open_job(source, ways, selection, input_shape)
    bounds.check_used((item.key, item.weights) for item in job.wanted)
    vanished = () if earlier is None else _vanished(earlier, job, str(baseline))
    rows: list[CheckRow] = []
    for index, item in enumerate(job.items):
        limit = bounds.for_row(item.key, item.weights)
        reason = _not_gated(item, limit, kinds, compared=earlier is not None)
        if reason:
            rows.append(ungated(listed_row(item), reason))
            continue
        report_step = numbered(progress, item.key, index, len(job.items))
        report_step(Step(item.key))
        then = None if earlier is None else earlier.get((item.key, level_of(item)))

        def verdict(row: Row, limit: float | None = limit, then: Earlier | None = then) -> CheckRow:
            return judge(row, limit, gate, then, compared=earlier is not None)

        rows.append(settle(item, job.load, options, verdict, report_step))
    if shard is None and not any(row.gated for row in rows):
        raise NothingToAnalyse(
            f"nothing is asked of any of the {len(rows)} rows: {rows[0].reason}",
            hint="give a limit that concerns them, --max 1.0, or name their kind with --kind",
        )
    report = report_of(job.found, [row.row for row in rows], settings, hash=hash)
    compared = None if baseline is None else BaselineFile(str(baseline), gate.tolerance, vanished)
    return CheckReport(tuple(rows), report, compared)


def _not_gated(item: Region | Skipped, limit: float | None, kinds: Sequence[str], *, compared: bool) -> str:
    """Return why nothing is asked of an operator; empty if something is."""
    if isinstance(item, Skipped) and item.status == "nonlinear":
        return "not linear"
    if item.operators == 0 and not kinds:
        return f"no weight matrix (--kind {item.kind} gates it)"
    return "" if limit is not None or compared else "no limit matches it"


def _vanished(earlier: Rows, job: Job, path: str) -> tuple[str, ...]:
    """Return the keys of the baseline that the file has at no level any more.

    Raises:
        UsageError: If the two have nothing in common.
    """
    have = {(item.key, level_of(item)) for item in job.found.survey.items}
    if not any(key in earlier for key in have):
        raise UsageError(
            f"the baseline {path} has no row in common with this file",
            hint="compare results of one model; keys and levels must agree",
        )
    return tuple(key for (key, level), row in earlier.items() if row.counted and (key, level) not in have)


def _relative(value: float, name: str) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (math.isfinite(value) and value >= 0)
    ):
        raise UsageError(f"{name}={value!r} is no relative amount", hint="use a number ≥ 0, e.g. 0.01")
    return float(value)
