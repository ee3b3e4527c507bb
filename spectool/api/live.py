"""The nearest weights of a live module whose operators obey their limits, put in place and measured there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from spectool.api.attached import Attached, apart, attach
from spectool.api.clip_run import ClipRun
from spectool.api.clipping import METHODS
from spectool.api.job import Selection, report_of, settings_of
from spectool.api.limits import Bounds, as_bounds
from spectool.api.rows import Options
from spectool.api.settling import level_of
from spectool.api.sources import InputShapes, Ways
from spectool.clip import Options as ClipOptions
from spectool.clip.project import Method
from spectool.errors import UsageError
from spectool.progress import Progress, Step, silent
from spectool.report.clip import ClipReport

RECENTER = ("none", "auto", "bias")


def clip_(
    module: torch.nn.Module,
    max: float | Mapping[str, float] | Bounds,
    input_shape: InputShapes | None = None,
    *,
    level: str = "composed",
    layers: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Sequence[str] = (),
    exact: bool = False,
    prove: bool = False,
    method: Method = "auto",
    recenter: str = "none",
    k: int = 8,
    seed: int = 0,
    progress: Progress = silent,
) -> ClipReport:
    """Give a live module the nearest weights with σ₁ of every operator at most its limit, in place.

    Operators are those of evaluation mode, whatever mode the module is in; its mode, buffers, gradients, random
    state, and the identity, type and layout of its parameters stay. Only weights of operators above their limit
    change, all of them at the end. Under weight norm and spectral norm the parameters behind a weight change; what old
    hooks keep as ``weight`` is new from the next forward on. A weight that cannot be set (computed from other
    parameters in another way) is a ``refused`` row that says so.

    Args:
        module: The module, or a ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile`` wrapper of it;
            under ``DistributedDataParallel`` every process has to call this.
        max: Limit on σ₁, or a mapping from glob (of a row's key or a weight's name) to limit.
        input_shape: Shape of the input with its batch axis, or a mapping from input name to shape; None where no
            operator depends on it.
        level: ``composed`` (maximal regions such as conv∘BN, a lone operator being its own), ``layer`` or ``both``.
        layers: Globs of row keys to keep.
        exclude: Globs of row keys to drop.
        kinds: Kinds to keep.
        exact: Whether to go on to within half a percent of the least possible change.
        prove: Whether to go on until the proven bound of every operator, not only its σ₁, is within the limit.
        method: ``auto``, ``svd``, ``bundle``, ``symbol``, or one to compare with: ``scale``, ``fastclip``,
            ``sedghi``.
        recenter: ``none`` leaves every buffer alone; ``auto`` moves running means so that the mean of what a batch
            norm gives stays, which keeps most of the accuracy; ``bias`` moves biases where there is no running mean.
        k: How many singular values to report per row.
        seed: Seed of the start vectors.
        progress: Receives steps.

    Returns:
        What became of every row, measured on the parameters as they now are.

    Raises:
        UsageError: If an argument cannot be used, or a pattern matches no row.
        GraphError: If the module cannot be followed.
        NothingToAnalyse: If there is no operator, or the filters leave none.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> report = clip_(net, 0.5)
        >>> bool(torch.linalg.matrix_norm(net[0].weight.double(), 2) <= 0.5 + 1e-9)
        True
    """
    bounds = checked_limits(max, method)
    if recenter not in RECENTER:
        raise UsageError(f"recenter={recenter!r} makes no sense", hint=f"use {', '.join(RECENTER)}")
    selection = Selection(level, layers, exclude, kinds, None)
    progress(Step("finding operators"))
    attached = attach(module, selection, input_shape)
    bounds.check_used((item.key, item.weights) for item in attached.job.wanted)
    options = ClipOptions(method=method, exact=exact, seed=seed)
    return clip_attached(
        attached,
        bounds,
        selection,
        input_shape,
        options,
        k=k,
        prove=prove,
        recenter=recenter,
        progress=progress,
    )


def checked_limits(max: float | Mapping[str, float] | Bounds, method: str) -> Bounds:
    """Return limits; refuse none at all, and methods that do not exist.

    Raises:
        UsageError: If there is no limit or no such method.
    """
    bounds = as_bounds(max)
    if not bounds:
        raise UsageError("there is no limit to clip to", hint="give one, e.g. max=1.0")
    if method not in METHODS:
        raise UsageError(f"no method is called {method!r}", hint=f"use {', '.join(METHODS)}")
    return bounds


def clip_attached(
    attached: Attached,
    bounds: Bounds,
    selection: Selection,
    input_shape: InputShapes | None,
    options: ClipOptions,
    *,
    k: int = 8,
    prove: bool = False,
    recenter: str = "none",
    progress: Progress = silent,
) -> ClipReport:
    """Clip a module whose operators are known; see ``clip_``."""
    # What the job remembers may be gone by now.
    job = replace(attached.job, load=attached.load)
    measuring = Options(k=k, seed=options.seed)
    settings = {
        **settings_of(measuring, Ways(), selection, input_shape),
        "max": bounds.to_dict(),
        "clip_method": options.method,
        "exact": options.exact,
        "prove": prove,
        "recenter": recenter,
    }
    run = ClipRun(
        job, attached.as_checkpoint(), attached.writer, measuring, options, prove=prove, progress=progress
    )
    with apart():
        entries = [run.measure(index, item, bounds, selection.kinds) for index, item in enumerate(job.items)]
        run.clip(entries)
        if recenter != "none" and run.edits:
            run.recentre(entries, None, biases=recenter == "bias")
        attached.write(run.edits)
        if attached.group is not None:
            attached.agree(sorted(attached.owners))
        items = {(item.key, level_of(item)): item for item in job.items}
        rows = tuple(run.certified(entry, items, attached.load) for entry in entries)
    report = report_of(job.found, [row.row for row in rows], settings)
    return ClipReport(rows, report, None, tuple(run.edits), prove)
