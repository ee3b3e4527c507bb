"""The nearest checkpoint whose operators obey their limits, certified after writing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectool.api.calibration import read_inputs
from spectool.api.clip_run import ClipRun
from spectool.api.covariances import tap_covariances
from spectool.api.devices import choose_device, choose_dtype
from spectool.api.job import Selection, open_job, report_of, settings_of
from spectool.api.limits import Bounds, as_bounds
from spectool.api.rows import Load, Options
from spectool.api.settling import level_of
from spectool.api.sources import InputShapes, Ways
from spectool.checkpoint import write_checkpoint
from spectool.checkpoint.limits import DEFAULT, Limits
from spectool.checkpoint.patch.place import destination
from spectool.checkpoint.patch.sharing import sharing
from spectool.clip import Options as ClipOptions
from spectool.clip.project import Method
from spectool.errors import OutputError, SpectoolError, UsageError
from spectool.progress import Progress, Step, silent
from spectool.report.clip import ClipReport

RECENTERINGS = ("auto", "bias", "none")
METHODS = ("auto", "svd", "bundle", "symbol", "scale", "fastclip", "sedghi")


def clip(
    source: str | Path,
    *,
    max: float | Mapping[str, float] | Bounds,
    out: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    prove: bool = False,
    exact: bool = False,
    all_sizes: bool = False,
    method: Method = "auto",
    recenter: str = "auto",
    calibrate: str | Path | Tensor | None = None,
    k: int = 8,
    input_shape: InputShapes | None = None,
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
    hash: bool = False,
    limits: Limits = DEFAULT,
    progress: Progress = silent,
) -> ClipReport:
    """Write the nearest checkpoint with σ₁ of every operator at most its limit.

    Only weights of operators above their limit change; everything else in the file stays byte for byte. What is
    written is read again and measured by a cold start.

    Args:
        source: A checkpoint file or directory.
        max: Limit on σ₁, or a mapping from glob (of a row's key or a weight's name) to limit.
        out: File (or directory) to write; not needed for a dry run.
        force: Whether ``out`` may replace what is there, ``source`` itself included.
        dry_run: Whether to compute and measure everything but write nothing.
        prove: Whether to go on until the proven bound of every operator, not only its σ₁, is within the limit.
        exact: Whether to go on to within half a percent of the least possible change.
        all_sizes: Whether limits of convolutions are to hold for every input size.
        method: ``auto``, ``svd``, ``bundle``, ``symbol``, or a method to compare with: ``scale``, ``fastclip``,
            ``sedghi``.
        recenter: ``auto``: running means behind changed weights follow, where the mean of the input is known
            without data, or from ``calibrate``; ``bias``: the bias of a convolution does where no batch norm is;
            ``none``.
        calibrate: Inputs ``(n, …)`` (a tensor, or a .npz or .pt file) on which means are matched instead, and whose
            covariance at every layer measures its change (metric ``data``); needs a program that may run (``arch``,
            ``trust`` or a recognised file).
        k: How many singular values to report per row.
        input_shape: Shape of the model's input with its batch axis, or a mapping from input name to shape.
        tol: Relative residual of the reported values.
        max_matvecs: Cap on operator applications per reported row.
        seed: Seed of the start vectors.
        device: ``auto``, ``cpu``, ``cuda[:i]`` or ``mps``.
        dtype: ``float32`` (default) or ``float64``, of the arithmetic of reported values.
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
        hash: Whether to hash the file.
        limits: What the file may ask for.
        progress: Receives steps.

    Returns:
        What became of every row, and the certificates.

    Raises:
        UsageError: If an argument cannot be used, or a pattern matches no row.
        CheckpointError: If the file cannot be read.
        NothingToAnalyse: If there is no operator, or the filters leave none.
        OutputError: If ``out`` cannot be written; nothing is left half written.

    Example:
        >>> import spectool
        >>> report = spectool.clip("sample_models/digits_mlp_state.pt", max=3.0, dry_run=True)
        >>> [(row.row.layer, row.action) for row in report.rows][:2]
        [('fc1.weight', 'clipped'), ('fc2.weight', 'kept')]
        >>> row = report.rows[0]
        >>> row.after.sigma <= 3.0 and row.change_lower_bound <= row.change < row.change_scaling
        True
    """
    bounds = as_bounds(max)
    if not bounds:
        raise UsageError("there is no limit to clip to", hint="give one, e.g. --max 1.0")
    if method not in METHODS:
        raise UsageError(f"no method is called {method!r}", hint=f"use {', '.join(METHODS)}")
    if recenter not in RECENTERINGS:
        raise UsageError(f"recenter={recenter!r} is not known", hint=f"use {', '.join(RECENTERINGS)}")
    if out is None and not dry_run:
        raise UsageError(
            "there is nowhere to write", hint="give -o OUT, or --dry-run to see what would change"
        )
    target = None if out is None or dry_run else _checked_target(Path(source), Path(out), force)
    options = Options(k, "auto", tol, max_matvecs, False, seed, choose_device(device), choose_dtype(dtype))
    ways = Ways(assume_bn, key, arch, arch_args, recognise, trust, limits)
    selection = Selection(level, layers, exclude, kinds, None)
    settings = {
        **settings_of(options, ways, selection, input_shape),
        "max": bounds.to_dict(),
        "clip_method": method,
        "exact": exact,
        "prove": prove,
        "all_sizes": all_sizes,
        "recenter": recenter,
        "calibrate": None if calibrate is None or isinstance(calibrate, Tensor) else str(calibrate),
        "dry_run": dry_run,
    }
    if recenter == "bias" and calibrate is not None:
        raise UsageError(
            "biases are not matched on inputs, running means are",
            hint="leave --recenter bias or --calibrate away",
        )
    inputs = None if calibrate is None else read_inputs(calibrate)
    progress(Step("finding operators"))
    job = open_job(source, ways, selection, input_shape)
    bounds.check_used((item.key, item.weights) for item in job.wanted)
    checkpoint, writer = job.found.checkpoint, job.found.survey.writer
    if checkpoint is None:
        raise UsageError("only a file can be clipped here", hint="use spectool.clip_ for a live module")
    clip_options = ClipOptions(method, exact, all_sizes, seed, options.device)
    run = ClipRun(job, checkpoint, writer, options, clip_options, prove, progress)
    if inputs is not None and job.found.survey.live is None:
        raise UsageError(
            "--calibrate runs the network, and this file has no program that may run",
            hint="give --arch, or --trust for a pickled module",
        )
    entries = [run.measure(index, item, bounds, kinds) for index, item in enumerate(job.items)]
    if inputs is not None and job.found.survey.live is not None:
        progress(Step("calibrating"))
        run.covariances = tap_covariances(job.found.survey.live, checkpoint, inputs, run.wanted(entries))
    run.clip(entries)
    if recenter != "none" and run.edits:
        run.recentre(entries, inputs, biases=recenter == "bias")
    written: tuple[str, ...] = ()
    if target is not None:
        progress(Step("writing"))
        written = tuple(map(str, write_checkpoint(checkpoint, target, run.edits, force=force).files))
    with _remembered(target):
        if target is not None:
            job_after = open_job(target, ways, selection, input_shape)
            load: Load = job_after.load
        else:
            job_after = job
            load = job.load if writer is None else writer.reload(run.edits)
        items = {(item.key, level_of(item)): item for item in job_after.items}
        rows = tuple(run.certified(entry, items, load) for entry in entries)
        report = report_of(job_after.found, [row.row for row in rows], settings, hash=hash)
    if also := [name for name in sharing(checkpoint, run.edits) if checkpoint.aliases.get(name) is None]:
        shown = ", ".join(also[:5]) + (", …" if len(also) > 5 else "")
        report = replace(report, notes=(*report.notes, f"changed, too, where they share bytes: {shown}"))
    return ClipReport(
        rows,
        report,
        None if target is None else str(target),
        tuple(run.edits),
        prove,
        run.adjusted,
        tensors=len(checkpoint.tensors),
        source=str(source),
        files=written,
    )


@contextmanager
def _remembered(target: Path | None) -> Iterator[None]:
    """Whatever ends the measuring of what was written says that it was written."""
    try:
        yield
    except SpectoolError as error:
        if target is None:
            raise
        raise OutputError(
            f"{target} was written, but could not be measured: {error}",
            hint=error.hint or f"`spectool check {target}` measures it",
        ) from error
    except KeyboardInterrupt as stop:
        if target is not None:
            stop.add_note(f"{target} was written, but not measured: `spectool check` does that")
        raise


def _checked_target(source: Path, out: Path, force: bool) -> Path:
    """Refuse a target that cannot be meant before anything is computed."""
    if os.path.lexists(out) and not force:
        same = out.exists() and source.exists() and out.samefile(source)
        raise OutputError(
            f"{out} is the file to read" if same else f"{out} exists already",
            hint="--in-place --force replaces it" if same else "--force replaces it",
        )
    if not out.parent.exists():
        raise OutputError(f"there is no folder {out.parent}", hint="create it first")
    destination(out, force)
    return out
