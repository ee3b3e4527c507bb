"""The nearest checkpoint whose operators obey their limits, certified after writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectool.api.calibration import calibrated_means, read_inputs
from spectool.api.devices import choose_device, choose_dtype
from spectool.api.job import Job, Selection, numbered, open_job, report_of, settings_of
from spectool.api.limits import Bounds, as_bounds
from spectool.api.rows import Load, Options, analysed_row, listed_row
from spectool.api.settling import refined_row
from spectool.api.sources import InputShapes, Ways
from spectool.checkpoint import Checkpoint, can_write, write_checkpoint
from spectool.clip import Constraint, Problem, Projected, Stored, group, prove_limit, solve, store
from spectool.clip import Options as ClipOptions
from spectool.clip.project import Method
from spectool.clip.recentre import recentred
from spectool.errors import OperatorError, OutputError, UsageError
from spectool.graph import Region, Skipped
from spectool.graph.types import BatchNorm, Conv, Embedding, Linear, Node
from spectool.graph.writing import Writer
from spectool.progress import Progress, Step, silent
from spectool.report.clip import ClipReport, ClipRow, Enclosed
from spectool.report.row import Row

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
        calibrate: Inputs ``(n, …)`` (a tensor, or a .npz or .pt file) on which means are matched instead; needs a
            program that may run (``arch``, ``trust`` or a recognised file).
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
        progress: Receives steps.

    Returns:
        What became of every row, and the certificates.

    Raises:
        UsageError: If an argument cannot be used, or a pattern matches no row.
        CheckpointError: If the file cannot be read.
        NothingToAnalyse: If there is no operator, or the filters leave none.
        OutputError: If ``out`` cannot be written; nothing is left half written.
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
    ways = Ways(assume_bn, key, arch, arch_args, recognise, trust)
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
    inputs = None if calibrate is None else read_inputs(calibrate)
    progress(Step("finding operators"))
    job = open_job(source, ways, selection, input_shape)
    bounds.check_used((item.key, item.weights) for item in job.wanted)
    checkpoint, writer = job.found.checkpoint, job.found.survey.writer
    if checkpoint is None:
        raise UsageError("only a file can be clipped here", hint="use spectool.clip_ for a live module")
    clip_options = ClipOptions(method, exact, all_sizes, seed, options.device)
    run = _Run(job, checkpoint, writer, options, clip_options, prove, progress)
    entries = [run.measure(index, item, bounds, kinds) for index, item in enumerate(job.items)]
    run.clip(entries)
    if recenter != "none" and run.edits:
        run.recentre(entries, inputs, biases=recenter == "bias")
    if target is not None:
        progress(Step("writing"))
        write_checkpoint(checkpoint, target, run.edits, force=force)
        again = open_job(target, ways, selection, input_shape)
        load: Load = again.load
        items = {(item.key, _level(item)): item for item in again.items}
        job_after = again
    else:
        load = job.load if writer is None else writer.reload(run.edits)
        items = {(item.key, _level(item)): item for item in job.items}
        job_after = job
    rows = tuple(run.certified(entry, items, load) for entry in entries)
    report = report_of(job_after.found, [row.row for row in rows], settings, hash=hash)
    return ClipReport(
        rows,
        report,
        None if target is None else str(target),
        tuple(run.edits),
        prove,
        tensors=len(checkpoint.tensors),
        source=str(source),
    )


def _checked_target(source: Path, out: Path, force: bool) -> Path:
    """Refuse a target that cannot be meant before anything is computed."""
    if out.exists() and not force:
        same = source.exists() and out.samefile(source)
        raise OutputError(
            f"{out} is the file to read" if same else f"{out} exists already",
            hint="--in-place --force replaces it" if same else "--force replaces it",
        )
    if not out.parent.exists():
        raise OutputError(f"there is no folder {out.parent}", hint="create it first")
    return out


def _level(item: Region | Skipped) -> str:
    return item.level if isinstance(item, Region) else "layer"


@dataclass
class _Entry:
    """One row on its way."""

    item: Region | Skipped
    row: Row
    limit: float | None
    action: str
    reason: str = ""
    projected: Projected | None = None
    raw_change: float | None = None
    recentered: tuple[str, ...] = ()


@dataclass
class _Run:
    """One clip of one file."""

    job: Job
    checkpoint: Checkpoint
    writer: Writer | None
    options: Options
    clip_options: ClipOptions
    prove: bool
    progress: Progress
    edits: dict[str, Tensor] = field(default_factory=dict)

    def measure(self, index: int, item: Region | Skipped, bounds: Bounds, kinds: Sequence[str]) -> _Entry:
        """Return a row as it is before, and whether anything is asked of it."""
        limit = bounds.for_row(item.key, item.weights)
        reason = _not_gated(item, limit, kinds)
        if reason:
            return _Entry(item, listed_row(item), limit, "listed", reason)
        report = numbered(self.progress, item.key, index, len(self.job.items))
        report(Step(item.key))
        row = analysed_row(item, self.job.load, self.options, report)
        if row.status != "ok" or not row.sigma or limit is None:
            return _Entry(item, row, limit, "refused", row.note or "it was not analysed")
        return _Entry(item, row, limit, "clip" if row.sigma[0] > limit else "kept")

    def clip(self, entries: list[_Entry]) -> None:
        """Project every problem that has a row above its limit; collect edits of stored tensors."""
        gated = [entry for entry in entries if entry.action in ("clip", "kept")]
        constraints = [Constraint(_region(entry.item), entry.limit or 0.0) for entry in gated]
        problems, refused = group(constraints, self.job.load, self.writer)
        for index, reason in refused.items():
            if gated[index].action == "clip":
                gated[index].action, gated[index].reason = "refused", reason
        by_region = {
            id(constraint.region): entry for constraint, entry in zip(constraints, gated, strict=True)
        }
        for number, problem in enumerate(problems):
            members = [by_region[id(constraint.region)] for constraint in problem.constraints]
            if not any(entry.action == "clip" for entry in members):
                continue
            report = numbered(self.progress, problem.key, number, len(problems))
            report(Step(problem.key))
            try:
                projected, stored = self._solve(problem, members, report)
            except OperatorError as error:
                for entry in members:
                    if entry.action == "clip":
                        entry.action, entry.reason = "refused", f"{error}"
                continue
            self.edits.update(stored.edits)
            for entry in members:
                entry.projected = projected
                entry.raw_change = _raw_change(stored.edits, self.checkpoint)
                if entry.action == "clip":
                    entry.action = "clipped"

    def _solve(
        self, problem: Problem, members: Sequence[_Entry], progress: Progress
    ) -> tuple[Projected, Stored]:
        if self.writer is None:
            raise OperatorError("nothing can be written back to this source")
        read = self.checkpoint.read
        homes = {home for name in problem.names for home in self.writer.homes(name) or ()}
        for home in sorted(homes):
            if home not in self.checkpoint.tensors:
                raise OperatorError(f"{home} is no tensor of the file")
            reason = can_write(self.checkpoint, home)
            if reason:
                raise OperatorError(f"{home} cannot be written: {reason}")
        types: Callable[[str], torch.dtype] = lambda name: read(name).dtype  # noqa: E731
        before = 0.0
        for entry in members:
            before = builtin_max(before, entry.row.sigma[0] / (entry.limit or 1.0))
        projected = solve(problem, before, self.clip_options, progress)
        seed = self.clip_options.seed
        stored = store(problem, projected.weights, self.writer, types, read, seed=seed)
        if self.prove:
            stored = prove_limit(problem, projected.weights, stored, self.writer, types, read, seed=seed)
        final = {name: stored.load(name).double() for name in problem.names}
        return replace(projected, change=projected.distance(final)), stored

    def recentre(self, entries: Sequence[_Entry], inputs: Tensor | None, *, biases: bool) -> None:
        """Move the running means (or biases) behind changed weights."""
        survey, writer = self.job.found.survey, self.writer
        if writer is None:
            return
        new = writer.reload(self.edits)
        if inputs is not None:
            if survey.live is None:
                raise UsageError(
                    "--calibrate runs the network, and this file has no program that may run",
                    hint="give --arch, or --trust for a pickled module",
                )
            self.progress(Step("calibrating"))
            moved = calibrated_means(survey.live, self.checkpoint, self.edits, inputs)
            self.edits.update(moved)
            for entry in entries:
                if entry.projected is not None and isinstance(entry.item, Region):
                    homes = {home for name in _means(entry.item) for home in writer.homes(name) or ()}
                    entry.recentered = tuple(name for name in moved if name in homes)
            return
        if survey.graph is None:
            return
        changed = {
            node.inputs[1]
            for entry in entries
            if entry.projected is not None
            for node in _operators(entry.item)
        }
        maximal = [item for item in survey.items if isinstance(item, Region) and item.maximal]
        found = recentred(maximal, survey.graph, self.job.load, new, changed, biases=biases)
        stored: dict[str, str] = {}
        for name, value in found.means.items():
            for home, tensor in writer.edits({name: value}, self.checkpoint.read).items():
                known = self.checkpoint.tensors.get(home)
                if known is not None and can_write(self.checkpoint, home) is None and home not in self.edits:
                    self.edits[home] = tensor.to(self.checkpoint.read(home).dtype)
                    stored[name] = home
        for entry in entries:
            if isinstance(entry.item, Region):
                reads = [name for node in entry.item.nodes for name in node.inputs]
                entry.recentered = tuple(stored[name] for name in dict.fromkeys(reads) if name in stored)

    def certified(
        self, entry: _Entry, items: Mapping[tuple[str, str], Region | Skipped], load: Load
    ) -> ClipRow:
        """Return the row of an operator as it now stands."""
        row, limit = entry.row, entry.limit
        if entry.action == "listed":
            return ClipRow(row, "listed", limit, reason=entry.reason)
        before = _enclosed(row)
        after_row = row
        item = items.get((entry.item.key, _level(entry.item)))
        if row.status == "ok" and item is not None:
            cold = replace(self.options, certify=True, seed=self.options.seed + 1)
            self.progress(Step(item.key, message="measuring what is stored"))
            after_row = analysed_row(item, load, cold)
            loose = after_row.upper is None or after_row.upper > (limit or 0.0)
            if loose or after_row.upper_kind == "probabilistic":
                after_row = refined_row(item, load, cold, after_row) or after_row
        after = _enclosed(after_row)
        after = replace(after, proven=None if after_row.upper_kind == "probabilistic" else after.upper)
        if entry.action == "refused" or entry.projected is None:
            action = "refused" if entry.action == "refused" else "kept"
            return ClipRow(
                after_row,
                action,  # type: ignore[arg-type]
                limit,
                before,
                after,
                recentered=entry.recentered,
                reason=entry.reason,
            )
        made = entry.projected
        return ClipRow(
            row=after_row,
            action="clipped" if entry.action == "clipped" else "kept",
            limit=limit,
            before=before,
            after=after,
            metric=made.metric,
            change=made.change,
            change_lower_bound=made.lower,
            change_scaling=made.scaling,
            raw_change=entry.raw_change,
            below_limit_disturbed=_disturbed(row, after_row, limit or 0.0),
            recentered=entry.recentered,
            iterations=made.iterations,
            solver=made.method,
            reason=made.note,
        )


builtin_max = max


def _region(item: Region | Skipped) -> Region:
    if not isinstance(item, Region):
        raise OperatorError(f"{item.key} was not analysed")
    return item


def _operators(item: Region | Skipped) -> list[Node]:
    nodes = item.nodes if isinstance(item, Region) else ()
    return [node for node in nodes if isinstance(node.op, (Conv, Linear, Embedding))]


def _means(region: Region) -> list[str]:
    return [node.inputs[3] for node in region.nodes if isinstance(node.op, BatchNorm) and node.inputs[3]]


def _enclosed(row: Row) -> Enclosed:
    return Enclosed(row.sigma[0] if row.sigma else None, row.lower, row.upper)


def _not_gated(item: Region | Skipped, limit: float | None, kinds: Sequence[str]) -> str:
    if isinstance(item, Skipped) and item.status == "nonlinear":
        return "not linear"
    if item.operators == 0 and not kinds:
        return f"no weight matrix (--kind {item.kind} gates it)"
    return "" if limit is not None else "no limit matches it"


def _raw_change(edits: Mapping[str, Tensor], checkpoint: Checkpoint) -> float:
    """Return ‖W′ − W‖/‖W‖ over the stored tensors that changed."""
    moved = total = 0.0
    for name, value in edits.items():
        old = checkpoint.read(name).double()
        moved += float((value.double() - old).square().sum())
        total += float(old.square().sum())
    return (moved / total) ** 0.5 if total > 0 else 0.0


def _disturbed(before: Row, after: Row, limit: float) -> float | None:
    """Return the largest change, over the limit, of a computed value that was below it; None if none was computed."""
    pairs = [(b, a) for b, a in zip(before.sigma, after.sigma, strict=False) if b < limit]
    return builtin_max(abs(a - b) for b, a in pairs) / limit if pairs else None
