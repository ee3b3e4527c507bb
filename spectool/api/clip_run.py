"""One clip on its way: measure, project, store, move means, certify."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spectool.api.calibration import calibrated_means
from spectool.api.covariances import Covariances
from spectool.api.job import Job, numbered
from spectool.api.limits import Bounds
from spectool.api.rows import Load, Options, analysed_row, listed_row
from spectool.api.settling import level_of, refined_row
from spectool.api.verdicts import unknown_scale
from spectool.checkpoint import Checkpoint, can_write
from spectool.clip import Constraint, Problem, Projected, Stored, group, prove_limit, solve, store
from spectool.clip import Options as ClipOptions
from spectool.clip.grouping import coupled, joined
from spectool.clip.recentre import recentred
from spectool.errors import OperatorError, UsageError
from spectool.graph import Region, Skipped
from spectool.graph.types import BatchNorm, Conv, Embedding, Level, Linear, Node
from spectool.graph.writing import Writer
from spectool.progress import Progress, Step
from spectool.report.clip import ClipRow, Enclosed
from spectool.report.row import Row

_MORE = 10_000
"""Operator applications for a row as written that did not converge with the usual number."""


@dataclass
class Entry:
    """One row on its way."""

    item: Region | Skipped
    row: Row
    limit: float | None
    action: str
    reason: str = ""
    projected: Projected | None = None
    raw_change: float | None = None
    recentered: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass
class ClipRun:
    """One clip of one file."""

    job: Job
    checkpoint: Checkpoint
    writer: Writer | None
    options: Options
    clip_options: ClipOptions
    prove: bool
    progress: Progress
    edits: dict[str, Tensor] = field(default_factory=dict)
    adjusted: dict[str, float] = field(default_factory=dict)
    covariances: Covariances | None = None

    def measure(self, index: int, item: Region | Skipped, bounds: Bounds, kinds: Sequence[str]) -> Entry:
        """Return a row as it is before, and whether anything is asked of it."""
        limit = bounds.for_row(item.key, item.weights)
        reason = not_gated(item, limit, kinds)
        if reason:
            return Entry(item, listed_row(item), limit, "listed", reason)
        report = numbered(self.progress, item.key, index, len(self.job.items))
        report(Step(item.key))
        row = analysed_row(item, self.job.load, self.options, report)
        if row.status != "ok" or not row.sigma or limit is None:
            return Entry(item, row, limit, "refused", row.note or "it was not analysed")
        action = "clip" if row.sigma[0] > limit else "kept"
        return Entry(item, row, limit, action, seconds=row.seconds or 0.0)

    def clip(self, entries: list[Entry]) -> None:
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
        count = 0
        for unit in coupled(problems, self.writer):
            start = time.perf_counter()
            solved: list[tuple[Problem, list[Entry], Projected]] = []
            kept: list[Problem] = []
            for problem in unit:
                members = [by_region[id(constraint.region)] for constraint in problem.constraints]
                report = numbered(self.progress, problem.key, count, len(problems))
                count += 1
                if not any(entry.action == "clip" for entry in members):
                    kept.append(problem)
                    continue
                report(Step(problem.key))
                try:
                    solved.append((problem, members, self._project(problem, members, report)))
                except OperatorError as error:
                    _refuse(members, error)
            if not solved:
                continue
            wanted = {name: value for _, _, made in solved for name, value in made.weights.items()}
            try:
                stored = self._store(joined([*(problem for problem, _, _ in solved), *kept]), wanted)
            except OperatorError as error:
                for _, members, _ in solved:
                    _refuse(members, error)
                continue
            self.edits.update(stored.edits)
            spent = (time.perf_counter() - start) / sum(len(members) for _, members, _ in solved)
            for problem, members, made in solved:
                projected = self._as_stored(problem, made, stored)
                for entry in members:
                    entry.seconds += spent
                    entry.projected = projected
                    entry.raw_change = self._raw_change(problem, stored)
                    if entry.action == "clip":
                        entry.action = "clipped"

    def _project(self, problem: Problem, members: Sequence[Entry], progress: Progress) -> Projected:
        if self.writer is None:
            raise OperatorError("nothing can be written back to this source")
        homes = {home for name in problem.names for home in self.writer.homes(name) or ()}
        for home in sorted(homes):
            if home not in self.checkpoint.tensors:
                raise OperatorError(f"{home} is no tensor of the file")
            reason = can_write(self.checkpoint, home)
            if reason:
                raise OperatorError(f"{home} cannot be written: {reason}")
        before = 0.0
        for entry in members:
            before = max(before, entry.row.sigma[0] / (entry.limit or 1.0))
        return solve(problem, before, self._with_covariances(problem), progress)

    def _store(self, problem: Problem, wanted: Mapping[str, Tensor]) -> Stored:
        """Return stored values that obey the limits; constants without a wanted value are to stay."""
        if self.writer is None:
            raise OperatorError("nothing can be written back to this source")
        # Several problems may change parts of one tensor: each goes on from what the ones before it made.
        read: Load = lambda name: self.edits[name] if name in self.edits else self.checkpoint.read(name)  # noqa: E731
        types: Callable[[str], torch.dtype] = lambda name: read(name).dtype  # noqa: E731
        seed = self.clip_options.seed
        values = {
            name: wanted[name] if name in wanted else problem.load(name).double() for name in problem.names
        }
        stored = store(problem, values, self.writer, types, read, seed=seed)
        if self.prove:
            stored = prove_limit(problem, values, stored, self.writer, types, read, seed=seed)
        return stored

    def _as_stored(self, problem: Problem, made: Projected, stored: Stored) -> Projected:
        """Return a projection with what was stored of it."""
        final = {name: stored.load(name).double() for name in problem.names}
        remark = training_remark(problem, self.writer) if self.writer is not None else ""
        return replace(made, change=made.distance(final)).with_note(remark)

    def wanted(self, entries: Sequence[Entry]) -> set[str]:
        """Return the stored tensors, one to a weight, of all weights that may change."""
        if self.writer is None:
            return set()
        names = [node.inputs[1] for e in entries if e.action == "clip" for node in _operators(e.item)]
        return {homes[0] for name in names if (homes := self.writer.homes(name))}

    def _with_covariances(self, problem: Problem) -> ClipOptions:
        """Return the options with what is known of the constants of a problem."""
        if self.covariances is None or self.writer is None:
            return self.clip_options
        seen = {name: (self.writer.homes(name) or ("",))[0] for name in problem.names}
        found, missing = self.covariances.found, self.covariances.missing
        return replace(
            self.clip_options,
            covariances={name: found[home] for name, home in seen.items() if home in found},
            uncovered={"": missing[""]}
            | {name: missing[home] for name, home in seen.items() if home in missing},
        )

    def _raw_change(self, problem: Problem, stored: Stored) -> float:
        """Return ‖W′ − W‖/‖W‖ over the weights, or, where some are the same entries, over the stored tensors."""
        if problem.places is None:
            pairs = [(problem.load(name), stored.load(name)) for name in problem.names]
        else:
            pairs = [(self.checkpoint.read(name), value) for name, value in stored.edits.items()]
        moved = sum(float((new.double() - old.double()).square().sum()) for old, new in pairs)
        total = sum(float(old.double().square().sum()) for old, _ in pairs)
        return float((moved / total) ** 0.5) if total > 0 else 0.0

    def recentre(self, entries: Sequence[Entry], inputs: Tensor | None, *, biases: bool) -> None:
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
            self.adjusted.update(_shifts(moved, self.checkpoint))
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
                    if name in found.shifts:
                        self.adjusted[home] = found.shifts[name]
        for entry in entries:
            if isinstance(entry.item, Region):
                reads = [name for node in entry.item.nodes for name in node.inputs]
                entry.recentered = tuple(stored[name] for name in dict.fromkeys(reads) if name in stored)
                why = found.reasons.get(entry.item.key)
                if why and entry.projected is not None and not entry.recentered:
                    note = f"means stay: {why}"
                    entry.projected = entry.projected.with_note(note)

    def _settled(self, item: Region | Skipped, load: Load, options: Options) -> Row:
        """Return a row as written; where values that crowd at the limit keep it from converging, with more effort.

        What a clip leaves is a cluster at the limit: k values of it take long, and the last resort is σ₁ alone.
        """
        row = analysed_row(item, load, options)
        if row.converged is not False or options.max_matvecs is not None:
            return row
        for tried in (replace(options, max_matvecs=_MORE), replace(options, k=1, max_matvecs=_MORE)):
            again = analysed_row(item, load, tried)
            if again.converged:
                return again
        return row

    def certified(
        self, entry: Entry, items: Mapping[tuple[str, Level], Region | Skipped], load: Load
    ) -> ClipRow:
        """Return the row of an operator as it now stands."""
        row, limit = entry.row, entry.limit
        if entry.action == "listed":
            return ClipRow(row, "listed", reason=entry.reason)  # a limit that is not asked of it is none
        before = _enclosed(row)
        after_row = row
        item = items.get((entry.item.key, level_of(entry.item)))
        if row.status == "ok" and item is not None:
            cold = replace(self.options, certify=True, seed=self.options.seed + 1)
            self.progress(Step(item.key, message="measuring what is stored"))
            after_row = self._settled(item, load, cold)
            loose = after_row.upper is None or after_row.upper > (limit or 0.0)
            if loose or after_row.upper_kind == "probabilistic":
                after_row = refined_row(item, load, cold, after_row) or after_row
            after_row = replace(after_row, seconds=(after_row.seconds or 0.0) + entry.seconds)
        after = _enclosed(after_row)
        open_end = after_row.upper_kind == "probabilistic" or unknown_scale(after_row.assumed)
        after = replace(after, proven=None if open_end else after.upper)
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


def _refuse(entries: Sequence[Entry], error: OperatorError) -> None:
    for entry in entries:
        if entry.action == "clip":
            entry.action, entry.reason = "refused", error.in_full


def _region(item: Region | Skipped) -> Region:
    if not isinstance(item, Region):
        raise OperatorError(f"{item.key} was not analysed")
    return item


def _shifts(means: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, float]:
    """Return running mean → its largest move over the standard deviation of its channel, where that is stored."""
    found = {}
    for name, value in means.items():
        spread = f"{name.removesuffix('mean')}var"
        if name.endswith("running_mean") and spread in checkpoint.tensors:
            moved = (value.double() - checkpoint.read(name).double()).abs()
            found[name] = float((moved / checkpoint.read(spread).double().clamp_min(1e-30).sqrt()).max())
    return found


def _operators(item: Region | Skipped) -> list[Node]:
    nodes = item.nodes if isinstance(item, Region) else ()
    return [node for node in nodes if isinstance(node.op, (Conv, Linear, Embedding))]


def _means(region: Region) -> list[str]:
    return [node.inputs[3] for node in region.nodes if isinstance(node.op, BatchNorm) and node.inputs[3]]


def _enclosed(row: Row) -> Enclosed:
    return Enclosed(row.sigma[0] if row.sigma else None, row.lower, row.upper)


def not_gated(item: Region | Skipped, limit: float | None, kinds: Sequence[str]) -> str:
    """Return why nothing is asked of an operator; empty if something is."""
    if isinstance(item, Skipped) and item.status == "nonlinear":
        return "not linear"
    if item.operators == 0 and not kinds:
        return f"no weight matrix (--kind {item.kind} gates it)"
    return "" if limit is not None else "no limit matches it"


def training_remark(problem: Problem, writer: Writer) -> str:
    """Return what a forward in training mode makes of new weights, in words; empty where they stay."""
    made = [writer.derived(name) for name in problem.names]
    return next((weight.training for weight in made if weight is not None and weight.training), "")


def _disturbed(before: Row, after: Row, limit: float) -> float | None:
    """Return the largest change, over the limit, of a computed value that was below it; None if none was computed."""
    pairs = [(b, a) for b, a in zip(before.sigma, after.sigma, strict=False) if b < limit]
    return max(abs(a - b) for b, a in pairs) / limit if pairs else None
